"""The training side of publishing: it puts results aside and never waits for the Hub, nor fails because of it."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .child import Child
from .contents import STRATEGIES, checkpoint_files, files_below, output_files
from .job import Target
from .queue import QUEUE_NAME, UploadQueue
from .status import Status
from .uploader_process import Patience

__all__ = ["Publisher"]

logger = logging.getLogger(__name__)

_Contents = tuple[dict[str, Path], tuple[str, ...]]  # what `checkpoint_files` returns
_SCANNED = 16 << 20  # bytes; a token could only be in a small file


class Publisher:
    """
    Sends what a run saves to the Hub, from a process of its own (`uploader_process`), through a queue on disk.

    For the main process of a run only. Nothing but `check` waits for the network, `flush` within its bound; no method
    but `check` raises on account of the Hub or of the disk.

    Args:
        repo_id (`str`): `"user/name"`, or `"name"` for the user's own.
        output_dir (`str` or `os.PathLike`): The run's folder; the queue is kept in its `hub_queue`.
        token (`str`, *optional*): With write access; the one that is logged in by default. It is never written down.
        private (`bool`, *optional*): Visibility of a repository that is yet to be created.
        revision (`str`, *optional*): Branch, created when missing.
        endpoint (`str`, *optional*): Of the Hub; `HF_ENDPOINT` by default.
        patience ([`Patience`], *optional*): Timeouts and waiting times.

    Raises:
        ValueError: a name that the Hub would not accept.

    Example:
        ```python
        >>> publisher = Publisher("user/model", "out")
        >>> publisher.status().waiting
        ()

        ```
    """

    def __init__(
        self,
        repo_id: str,
        output_dir: str | os.PathLike[str],
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        endpoint: str | None = None,
        patience: Patience | None = None,
    ):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id={repo_id!r} is not possible: {error} Use 'user/name'.") from error
        self.target = Target(repo_id, private, revision)
        self.output_dir = Path(output_dir)
        self.queue = UploadQueue(self.output_dir / QUEUE_NAME)
        self._token = token
        self._child = Child(self.queue.folder, token, endpoint, patience or Patience())
        self._unqueued: tuple[Callable[[], bool], str] | None = None  # how to try the newest again, and what failed
        self._reported: str | None = None
        for scratch in self.queue.folder.glob("new-*"):
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed while saving

    # ---- Before the first step ----

    def check(self, seconds: float = 60.0) -> str | None:
        """
        Create repository and branch, and make sure that they can be written to.

        Args:
            seconds (`float`, *optional*, defaults to 60): How long to try; what may be temporary is then put off.

        Returns:
            `str`, *optional*: the full id of the repository, `None` if it could not be reached.

        Raises:
            ValueError: the Hub refuses (no or a wrong token, no right to write, an impossible name).
        """
        found = self._child.check(self.target, seconds)
        if "repo_id" in found:
            return found["repo_id"]
        if found["permanent"]:
            raise ValueError(
                f"The Hub refuses to let this run push to {self.target}: {found['error']} Log in with `hf auth login` "
                "or pass a hub_token with write access, and check hub_model_id; or leave out push_to_hub."
            )
        logger.warning(f"The Hub cannot be reached, so pushing to {self.target} is put off: {found['error']}")
        return None

    # ---- During training ----

    def submit_checkpoint(
        self, checkpoint: str | os.PathLike[str], step: int, strategy: str, extras: Iterable[str] = ()
    ) -> bool:
        """
        Queue a checkpoint as `hub_strategy` says: not at all (`"end"`), the model (`"every_save"`), and also the whole
        checkpoint to resume from, as `last-checkpoint` (`"checkpoint"`) or under its own name (`"all_checkpoints"`).

        Args:
            checkpoint (`str` or `os.PathLike`): A folder whose files are written once.
            step (`int`): Training step.
            strategy (`str`): One of `STRATEGIES`.
            extras (`Iterable[str]`): Files and folders of the output folder that belong to the model: card, plots,
                results.

        Returns:
            `bool`: whether it waits on disk now; `status` says what was wrong.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"hub_strategy={strategy!r} is not allowed; use one of {list(STRATEGIES)}.")
        if strategy == "end":
            return False
        folder = Path(checkpoint)

        def collect() -> _Contents:
            files, slots = checkpoint_files(folder, strategy)
            for name in extras:
                files |= files_below(self.output_dir / name, name)
            return files, slots

        return self._add(collect, step, f"Training in progress, step {step}", write_once=folder)

    def submit(self, step: int, message: str, skip: Iterable[str] = ()) -> bool:
        """
        Queue the output folder but for its checkpoints, files starting with `_`, and the queue.

        Args:
            step (`int`): Training step.
            message (`str`): Title of the commit.
            skip (`Iterable[str]`): Further names at the top of the folder to leave out.

        Returns:
            `bool`: as `submit_checkpoint`.
        """
        return self._add(lambda: (output_files(self.output_dir, skip), ("",)), step, message)

    def _add(self, collect: Callable[[], _Contents], step: int, message: str, write_once: Path | None = None) -> bool:
        try:
            files, slots = collect()
            if not files:
                raise FileNotFoundError(f"the files of step {step} are gone")
            self.queue.add(self._without_token(files), slots, step, message, self.target, write_once)
            self.queue.prune()
        except OSError as error:
            again = partial(self._add, collect, step, message, write_once)
            self._unqueued = (again, f"step {step}: {error}")
            logger.warning(f"Step {step} could not be put aside for the Hub, training goes on: {error}")
            return False
        self._unqueued = None
        self._child.wake()
        return True

    def _without_token(self, files: Mapping[str, Path]) -> dict[str, Path]:
        token = (self._token or get_token() or "").encode()
        small = {name: path for name, path in files.items() if path.stat().st_size < _SCANNED}
        leaks = [name for name, path in small.items() if token and token in path.read_bytes()]
        if leaks:
            logger.warning(f"Not sent to the Hub, as they hold the access token: {', '.join(leaks)}.")
        return {name: path for name, path in files.items() if name not in leaks}

    def status(self) -> Status:
        """What is on the Hub and what is not. Cheap enough for every log line; logs an error once."""
        status = Status.read(self.queue.folder, str(self.target))
        if self._unqueued is not None:
            status = replace(status, unqueued=self._unqueued[1])
        if status.error is not None and status.error != self._reported:
            logger.warning(f"Pushing to {status.target} failed, and will be tried again: {status.error}")
        self._reported = status.error
        if status.waiting:
            self._child.ensure()
        return status

    # ---- After the last step ----

    def flush(self, seconds: float) -> Status:
        """
        Wait until everything is sent, until the Hub refuses what is left, or until the time is over.

        Args:
            seconds (`float`): The bound. What is not sent by then stays on disk.
        """
        deadline = time.monotonic() + seconds
        if self._unqueued is not None:
            self._unqueued[0]()  # there may be space by now
        status = self.status()
        if status.waiting:
            began = time.time()
            self._child.wake()
            while (status := self.status()).waiting and time.monotonic() < deadline:
                if status.permanent and self.queue.state()["error"]["time"] > began:
                    break
                time.sleep(0.05)
        return status

    def close(self) -> None:
        """End the process that sends, wherever it is; the queue stays."""
        self._child.kill()
