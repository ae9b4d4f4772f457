"""The process that sends, as the training run sees it: started when needed, woken, killed."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .job import Target
from .uploader_process import Patience, settings_line

__all__ = ["Child"]

logger = logging.getLogger(__name__)

_COMMAND = [sys.executable, "-m", f"{__package__}.uploader_process"]


class Child:
    """
    Runs `uploader_process`. Nothing here raises on account of that process.

    Args:
        folder (`Path`): The queue's folder.
        token, endpoint (`str`, *optional*): As in [`Publisher`].
        patience ([`Patience`]): Timeouts and waiting times.
    """

    def __init__(self, folder: Path, token: str | None, endpoint: str | None, patience: Patience):
        self.folder, self.patience = folder, patience
        self._token = token
        # In the environment, as `create_repo` of an existing repository takes the address of any other for a mistake.
        self._environment = _environment({} if endpoint is None else {"HF_ENDPOINT": endpoint})
        self._process: subprocess.Popen[str] | None = None
        self._started = float("-inf")

    def check(self, target: Target, seconds: float) -> dict[str, Any]:
        """
        Try for some seconds to prepare `target`.

        Returns:
            `dict[str, Any]`: with `repo_id`, or with `error` and whether it is `permanent`.
        """
        line = settings_line(self.patience, self._token, target=asdict(target), seconds=seconds)
        options: dict[str, Any] = {"env": self._environment, "text": True, "capture_output": True}
        try:
            process = subprocess.run(_COMMAND, input=line, timeout=seconds + 10, **options)
            return json.loads(process.stdout.strip().rpartition("\n")[2])
        except ValueError:  # no answer
            return {"error": process.stderr[-500:], "permanent": False}
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"error": f"no answer ({type(error).__name__})", "permanent": False}

    def wake(self) -> None:
        """Have the queue looked at now, whatever was to be waited for."""
        self.ensure()
        try:
            if self._process is not None:
                assert self._process.stdin is not None
                self._process.stdin.write("\n")
                self._process.stdin.flush()
        except OSError:
            pass  # it has just ended; the next call starts another

    def ensure(self) -> None:
        """Start the process, or again if it ended itself (a deadline passed, memory ran out), but not in a rush."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._started < self.patience.first_retry:
            return
        self._started = time.monotonic()
        line = settings_line(self.patience, self._token, folder=str(self.folder.resolve()))
        try:
            with open(self.folder / "uploader.log", "a") as log:
                self._process = subprocess.Popen(
                    _COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    env={**self._environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                    start_new_session=True,  # Ctrl-C is for the training, which then decides what to wait for
                )
            assert self._process.stdin is not None
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError as error:
            logger.warning(f"What is queued for the Hub stays on disk, as nothing can be started to send it: {error}")

    def kill(self) -> None:
        """End the process, whatever it waits for."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _environment(more: dict[str, str]) -> dict[str, str]:
    """The environment of a process that finds this package where it was found here."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}
