"""Publishing a training run: files are queued for the Hub. Training never waits for the Hub or fails with it."""

import atexit
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import get_token
from huggingface_hub.utils import FORBIDDEN_FOLDERS, HFValidationError, validate_repo_id

from ..files import checkpoints_of, delete, hidden, printable, read_plain, step_of, without_folders, write_atomic
from ..lock import locked
from ..strict import Count, check, dump_yaml, parse_data
from .card import save_card
from .job import FINISHED_RUN, Target, is_repo_path, slot_of
from .queue import QUEUE_NAME, QueueStatus, UploadQueue, sending
from .retries import RetryPolicy
from .run_summary import SUMMARY_NAME, RunSummary
from .uploader_process import UploaderProcess
from .weights import convert_weights

__all__ = ["RUN_NAME", "FinalFlush", "Publisher", "check_repo_id", "checkpoint_files", "files_below"]

logger = logging.getLogger(__name__)

# Files that only a resumed run needs. The root of the repository is for users who load the model.
_RESUME_ONLY = (
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "pytorch_model_fsdp_",
    "global_step",
    "data_state",
    "manifest",
    "totals",
)
RUN_NAME = "RUN.md"  # quotes held-out rows, which may be private
# Files that may hold paths of this machine.
_NAME_FOLDERS = {"trainer_state.json", "adapter_config.json", "README.md"}
_NAME_FOLDERS |= {"pretrain.yaml", "run.yaml", "measured.yaml", "closeness.json", "benchmark_results.json"}
_TENSORBOARD = "events.out.tfevents"  # its logs hold all arguments, with folders of this machine
_FORMATS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    ".json": (json.loads, json.dumps),
    ".yaml": (partial(parse_data, where="The file"), dump_yaml),
}
_SCANNED = 16 << 20  # bytes; only smaller files are searched for the token


@dataclass(frozen=True, eq=False)
class _Save:
    """What `UploadQueue.add` needs, also for another attempt. `collect` finds the files of all `slots`."""

    collect: Callable[[], dict[str, Path]]
    slots: tuple[str, ...]
    step: int
    message: str
    target: Target
    write_once: Path | None = None


def check_repo_id(repo_id: str) -> None:
    """Raise `ValueError` if the Hub does not allow the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id={repo_id!r} is not allowed: {error} Use 'user/name'.") from error


class Publisher:
    """
    Sends saved files to the Hub, through a queue on disk and an upload process. For the main process of a run only.

    Only `check` and `flush` wait for the network, both for a bounded time. Only `check` raises if the Hub or the disk
    fails.

    The queue is the folder `hub_queue` of the run's `output_dir`. The `token`, which needs write access, is never
    written to disk; by default it is that of the logged-in user. `private` and `revision` are as for [`Target`].
    `dtype` is the type of the weights of the model; whole checkpoints stay as they are. The `endpoint` is that of
    `HF_ENDPOINT` if it is not given.

    Raises:
        ValueError: the Hub does not allow the name.
    """

    def __init__(
        self,
        repo_id: str,
        output_dir: str | os.PathLike[str],
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        endpoint: str | None = None,
        retry: RetryPolicy | None = None,
    ):
        check_repo_id(repo_id)
        self.target = Target(repo_id, private, revision)
        self.output_dir = Path(output_dir)
        self.queue = UploadQueue(self.output_dir / QUEUE_NAME)
        self._dtype = dtype
        self._scratch = self.output_dir / "_converted"
        self._token = token = hidden(token)
        self._process = UploaderProcess(self.queue.folder, token, endpoint, retry or RetryPolicy())
        # The newest save of each folder of a target that could not be queued, and why.
        self._unqueued: dict[tuple[Target, str], tuple[_Save, str]] = {}
        self._reported: str | None = None

    # ---- Before the first step ----

    def check(self, seconds: float = 60.0) -> str | None:
        """
        Create the repository and the branch, and check the write access. Temporary errors are retried for `seconds`.
        Returns the full id of the repository; `None` if the Hub cannot be reached.

        Raises:
            ValueError: the Hub refuses the token, the access or the name.
        """
        found = self._process.check(self.target, seconds)
        if "repo_id" in found:
            return found["repo_id"]
        if found["permanent"]:
            raise ValueError(
                f"The Hub refuses pushes to {self.target}: {found['error']} Log in with `hf auth login` or pass a "
                "hub_token with write access, and check hub_model_id. Or leave out push_to_hub."
            )
        logger.warning(f"The Hub cannot be reached, pushes to {self.target} wait on disk: {found['error']}")
        return None

    # ---- During training ----

    def submit_checkpoint(
        self, checkpoint: str | os.PathLike[str], step: int, strategy: str, extras: Iterable[str] = ()
    ) -> None:
        """
        Queue a checkpoint, whose files are never written again. If it cannot be queued, `status` has the reason.

        The strategy `"every_save"` queues the model. `"checkpoint"` also queues the whole checkpoint as
        `last-checkpoint`, `"all_checkpoints"` under its own name. `extras` are files and folders of the output folder
        to add: card, plots, results.
        """
        folder = Path(checkpoint)

        def collect() -> dict[str, Path]:
            files = checkpoint_files(folder, strategy)[0]
            if self._dtype is not None:
                files |= convert_weights(folder, self._scratch, self._dtype)
            for name in extras:
                files |= files_below(self.output_dir / name, name)
            return files

        message, slots = f"Training in progress, step {step}", _slots(folder, strategy)
        self._add(_Save(collect, slots, step, message, self.target, write_once=folder), slots)

    def submit(self, step: int, message: str, revision: str | None = None) -> None:
        """
        Queue the output folder without its checkpoints, the queue, `RUN.md`, logs of TensorBoard, and files that start
        with `_`. `message` is the title of the commit. `revision` is a branch to push to instead of that of the run.
        """
        target = self.target if revision is None else replace(self.target, revision=revision)
        self._add(_Save(lambda: _sent_files(self.output_dir), ("",), step, message, target), ("",))

    def queue_run(self, approve: Callable[[str], bool] = lambda question: False) -> None:
        """
        Queue the folder of a finished run of any trainer, as `submit` does, for [`push_queue`], unless pushes of the
        run itself wait. An earlier call is replaced. If the folder holds no model, that of the newest checkpoint is
        sent. Saved arguments stay: they are a pickle, which may hold secrets. A card of ours is written again, with
        the name of the repository. `approve` decides whether to send files that this user may not have written, as
        for [`push_queue`].

        Raises:
            ValueError: the folder holds no model, another process uses it, its card or summary is damaged, or its
                files are not approved.
            QueueBusyError: another process is sending an earlier call.
            OSError: the files cannot be queued.
        """
        folder = self.output_dir
        if any(job.message != FINISHED_RUN for job in self.queue.jobs()):
            return
        source = next((path for path in (folder, *reversed(checkpoints_of(folder))) if _holds_model(path)), None)
        if source is None:
            raise ValueError(f"{folder} holds no model: give the output_dir of a finished run.")
        if (folder / SUMMARY_NAME).is_file() and "/" not in self.target.repo_id:
            raise ValueError(f"--repo {self.target.repo_id}: the card names the repository. Pass --repo user/name.")
        with locked(folder):
            self.queue.clean()
            model = {} if source == folder else checkpoint_files(source, "every_save")[0]
            foreign = self._approved(_sent_files(folder) | model, approve)
            run = RunSummary.load(folder) if (folder / SUMMARY_NAME).is_file() else None
            if run is not None:
                if run.model_name == run.repo_id:  # and not what the user has called it
                    run.model_name = self.target.repo_id
                run.repo_id = self.target.repo_id
                save_card(run, folder)
                run.save(folder)
                if model and run.hyperparameters.get("save_dtype") == "bfloat16":
                    model |= convert_weights(source, self._scratch, "bfloat16")
            files = _sent_files(folder)
            if "README.md" in files:
                model.pop("README.md", None)  # a template of peft
            files |= model
            files.pop("training_args.bin", None)
            step = step_of(source) if model else _last_step(folder)
            once = None if foreign else folder  # a copy is this user's
            try:
                with sending(self.queue.folder):
                    earlier = self.queue.jobs()
                    self.queue.add(self._public(files), ("",), step, FINISHED_RUN, self.target, once)
                    for job in earlier:
                        self.queue.remove(job)
            finally:
                delete(self._scratch)

    def _approved(self, files: Mapping[str, Path], approve: Callable[[str], bool]) -> bool:
        """Whether this user may not have written the files. Raise `ValueError` if they are not approved."""
        names = self.queue.count_names()
        doubts = self.queue.doubts(
            names, {name: path.lstat() for name, path in files.items() if not path.is_symlink()}
        )
        why = f"{self.output_dir} may not be yours: {printable(doubts)}."
        if doubts and not approve(f"To {self.target}: {why}"):
            raise ValueError(f"{why} Check its files, and send it with hf-nexus push --yes.")
        return bool(doubts)

    def _add(self, save: _Save, slots: tuple[str, ...]) -> None:
        """Queue the files of some slots of a save."""
        try:
            found = save.collect()
            files = self._public({name: path for name, path in found.items() if slot_of(name, save.slots) in slots})
            if not files:
                raise FileNotFoundError(f"step {save.step} has no files, or they are gone")
            self.queue.add(files, slots, save.step, save.message, save.target, save.write_once)
            self.queue.prune()
        except OSError as error:
            why = printable(f"step {save.step}: {error}")
            self._unqueued |= {(save.target, slot): (save, why) for slot in slots}
            logger.warning(f"Step {save.step} could not be queued for the Hub, training continues: {printable(error)}")
        else:
            for slot in slots:
                self._unqueued.pop((save.target, slot), None)
            self._process.wake()
        finally:
            delete(self._scratch)

    def _public(self, files: Mapping[str, Path]) -> dict[str, Path]:
        """
        The files without links, names that a repository cannot have, and files with the access token, and copies of
        those that name folders of this machine.
        """
        token = hidden(self._token or get_token())

        def leaks(path: Path) -> bool:
            return bool(token and path.stat().st_size < _SCANNED and token.encode() in path.read_bytes())

        links = [name for name, path in files.items() if path.is_symlink() or not is_repo_path(name)]
        leaking = [name for name, path in files.items() if name not in links and leaks(path)]
        for names, why in (
            (links, "are links, or have names that a repository cannot have"),
            (leaking, "contain the access token"),
        ):
            if names:
                logger.warning(f"Not sent to the Hub because they {why}: {printable(', '.join(names))}.")
        public = {name: path for name, path in files.items() if name not in (*links, *leaking)}
        copies: dict[Path, Path] = {}  # a file may be sent to several folders
        for name, path in public.items():  # the card of a run is made by us and the user
            if path.name in _NAME_FOLDERS and path != self.output_dir / "README.md":
                if path not in copies:
                    copies[path] = _without_folders(path, self._scratch / name)
                public[name] = copies[path]
        return public

    def status(self) -> QueueStatus:
        """What is on the Hub and what is not; logs each new error once. Fast enough for every log line."""
        status = QueueStatus.read(self.queue.folder, str(self.target))
        status = replace(status, unqueued=tuple(dict.fromkeys(why for _, why in self._unqueued.values())))
        if status.error is not None and status.error != self._reported:
            logger.warning(f"A push to {status.target} failed and will be retried: {status.error}")
        self._reported = status.error
        if status.waiting:
            self._process.ensure_running()
        return status

    # ---- After the last step ----

    def flush(self, seconds: float) -> QueueStatus:
        """Wait until everything is sent, the Hub refuses the rest, or the time is over. The rest stays on disk."""
        deadline = time.monotonic() + seconds
        for save in dict.fromkeys(save for save, _ in self._unqueued.values()):  # the disk may have space again
            # Newer saves of its other slots may have been queued: they stay the newest.
            self._add(save, tuple(slot for (_, slot), (failed, _) in self._unqueued.items() if failed is save))
        status = self.status()
        if status.waiting:
            began = time.time()
            self._process.wake()
            while (status := self.status()).waiting and time.monotonic() < deadline:
                if status.permanent and self.queue.state().get("error", {}).get("time", 0.0) > began:
                    break
                time.sleep(0.05)
        return status

    def close(self) -> None:
        """End the upload process at once; the queue stays on disk."""
        self._process.kill()


class FinalFlush:
    """
    Flushes a publisher for at most `seconds` when the process exits, and prints one line about the result.

    At exit, a flush delays neither other ranks nor a final evaluation, and also sends what was saved before an
    exception. It ends the one of an earlier publisher of the folder, because a queue has one sender.
    """

    _open: ClassVar[dict[Path, "FinalFlush"]] = {}  # by the queue; a notebook may have dropped its trainer

    def __init__(self, publisher: Publisher, seconds: float):
        self.publisher, self.seconds = publisher, seconds
        self._queue = publisher.queue.folder.resolve()
        if self._queue in self._open:
            self._open[self._queue].end(0.0)
        self._open[self._queue] = self
        self._left = seconds
        self._printed = ""
        atexit.register(self.end)

    def wait(self, seconds: float) -> QueueStatus:
        """
        Flush now, and print what is on the Hub and what is not unless that line was printed before. Ctrl-C ends only
        the flush.
        """
        self._left = 0.0  # if this flush is incomplete, do not wait again at exit
        waiting = self.publisher.status().waiting
        if waiting and seconds:
            steps = ", ".join(str(step) for step in waiting)
            print(f"Uploading step {steps} to the Hub, for at most {seconds:g} s (Ctrl-C to stop).", flush=True)
        try:
            status = self.publisher.flush(seconds)
        except KeyboardInterrupt:
            status = self.publisher.status()
        if status.complete:
            self._left = self.seconds
            self.publisher.close()  # the next job starts the process again
        self._print(status)
        return status

    def end(self, seconds: float | None = None) -> None:
        """Flush for the last time and close the publisher. By default, skip the wait after an incomplete flush."""
        atexit.unregister(self.end)
        if self._open.get(self._queue) is self:
            del self._open[self._queue]
        try:
            if self.publisher.output_dir.exists():  # otherwise there is nothing to send
                self.wait(self._left if seconds is None else seconds)
        finally:
            self.publisher.close()

    def _print(self, status: QueueStatus) -> None:
        line = status.line(self.publisher.output_dir)
        if line != self._printed:
            print(line, flush=True)
        self._printed = line


# ---- Files ----


def checkpoint_files(checkpoint: Path, strategy: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Files of a checkpoint by their path in the repository, and slots of the [`Job`], for a `hub_strategy`."""
    whole = files_below(checkpoint, "")
    files = {name: path for name, path in whole.items() if not name.startswith(_RESUME_ONLY)}
    slots = _slots(checkpoint, strategy)
    for slot in slots[1:]:
        files |= {f"{slot}/{name}": path for name, path in whole.items()}
    return files, slots


def _slots(checkpoint: Path, strategy: str) -> tuple[str, ...]:
    if strategy == "every_save":
        return ("",)
    return ("", "last-checkpoint" if strategy == "checkpoint" else checkpoint.name)


def _sent_files(output_dir: Path) -> dict[str, Path]:
    """The files of an output folder that `Publisher.submit` queues, by their path in the repository."""
    files: dict[str, Path] = {}
    # `hf download` leaves `last-checkpoint`, which may be old, and `.cache`.
    kept = (QUEUE_NAME, RUN_NAME, "last-checkpoint", *FORBIDDEN_FOLDERS)
    for path in sorted(output_dir.iterdir()):
        if path.name not in kept and not path.name.startswith(("_", "checkpoint-")):
            files |= files_below(path, path.name)
    return {name: path for name, path in files.items() if not path.name.startswith(_TENSORBOARD)}


def _last_step(folder: Path) -> int:
    """The training step that a run has reached, by its state, or by its newest checkpoint if that cannot be read."""
    with suppress(OSError, LookupError, TypeError, ValueError, RecursionError):
        return check(json.loads(read_plain(folder / "trainer_state.json"))["global_step"], Count, "global_step")
    return max(map(step_of, checkpoints_of(folder)), default=0)


def _holds_model(folder: Path) -> bool:
    return any(any(folder.glob(name)) for name in ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin"))


def _without_folders(path: Path, copy: Path) -> Path:
    """A copy of a file without the folders of this machine, or the file if it has none."""
    text = path.read_text(encoding="utf-8", errors="replace")
    load, dump = _FORMATS.get(path.suffix, (str, str))
    try:
        values = load(text)
    except (ValueError, RecursionError):
        values, dump = text, str
    if (public := without_folders(values)) == values:
        return path
    public = dump(public)
    # A manifest has the size.
    return write_atomic(copy, public + " " * (path.stat().st_size - len(public.encode())))


def files_below(path: Path, name: str) -> dict[str, Path]:
    """A file or link, or all files and links of a folder, by their paths below `name`."""
    if path.is_symlink() or path.is_file():
        return {name: path}
    found = (file for file in sorted(path.rglob("*")) if file.is_symlink() or file.is_file())
    return {Path(name, file.relative_to(path)).as_posix(): file for file in found}
