"""
The upload process of a training run: `UploaderProcess` is the run's handle, `main` is the process.

It is a process and not a thread because hf_xet and the client's thread pools cannot be interrupted, and the
interpreter waits for them at exit. A process can be killed at any time, and takes no time from the training loop.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import is_google_colab

from ..files import Secret, hidden, printable
from .job import Target
from .queue import LOG_NAME, UploadQueue, sending
from .retries import RetryPolicy, is_permanent, limit_requests
from .uploader import Uploader, prepare

__all__ = ["UploaderProcess"]

logger = logging.getLogger(__name__)

_CODE = f"import sys; sys.path[:] = sys.argv[1:]; from {__package__}.uploader_process import main; main()"


class UploaderProcess:
    """Handle of the upload process of a queue. No method raises if the process fails."""

    def __init__(self, folder: Path, token: str | None, endpoint: str | None, retry: RetryPolicy):
        self.folder, self.retry = folder, retry
        self._token = token
        # Only the process of a notebook in Colab can read its secrets.
        self._secret = hidden(get_token()) if token is None and is_google_colab() else None
        # It imports what this process would: `-m` would look into the current folder first.
        self._command = [sys.executable, "-P", "-c", _CODE, *sys.path]
        self._environment = dict(os.environ)
        if endpoint is not None:  # `create_repo` of an existing repository reads the address from the environment only
            self._environment["HF_ENDPOINT"] = endpoint
        self._process: subprocess.Popen[str] | None = None
        self._started = float("-inf")

    def check(self, target: Target, seconds: float) -> dict[str, Any]:
        """
        Try for some seconds to create `target` and to check the access to it, in another process.

        Returns a dict with `repo_id`, or with `error` and whether it is `permanent`.
        """
        try:
            process = subprocess.run(
                self._command,
                input=self._settings(target=asdict(target), seconds=seconds),
                timeout=seconds + 10,
                env=self._environment,
                text=True,
                capture_output=True,
            )
            return json.loads(process.stdout.strip().rpartition("\n")[2])
        except ValueError:  # no answer
            return {"error": printable(process.stderr[-500:]), "permanent": False}
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"error": f"no answer ({type(error).__name__})", "permanent": False}

    def wake(self) -> None:
        """Make the process read the queue now, even if it waits for a retry."""
        self.ensure_running()
        if self._process is not None:
            with suppress(OSError):  # it has just ended; the next call starts another
                self._write("\n")

    def ensure_running(self) -> None:
        """Start the process if it is not running, at most once per `first_retry` seconds."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._started < self.retry.first_retry:
            return
        self._started = time.monotonic()
        try:
            with open(self.folder / LOG_NAME, "a") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    env={**self._environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                    start_new_session=True,  # Ctrl-C must reach only the training, which then decides how long to wait
                )
            self._write(self._settings(folder=str(self.folder.resolve())))
        except OSError as error:
            logger.warning(f"The upload process could not be started, the queue stays on disk: {error}")

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _write(self, text: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _settings(self, **more: Any) -> str:
        settings = {"retry": asdict(self.retry), "token": self._token, "secret": self._secret}
        return Secret(json.dumps(settings | more) + "\n")


# ---- Inside the process ----


def main() -> None:
    """Serve a queue or check a target, as one line of JSON on standard input says: arguments could show the token."""
    settings = json.loads(sys.stdin.readline())
    token, secret = map(hidden, (settings.pop("token"), settings.pop("secret")))
    if secret is not None and get_token() is None:  # the user's own token is read at each request: it may be renewed
        token = secret
    retry = RetryPolicy(**settings["retry"])
    if sys.platform != "win32":
        os.nice(10)  # training has priority
    limit_requests(retry.request)
    api = HfApi(token=token, library_name="hf-nexus")
    if "target" in settings:
        print(json.dumps(_check(Target(**settings["target"]), settings["seconds"], api, retry)))
    else:
        _serve(Path(settings["folder"]), api, retry)


def _check(target: Target, seconds: float, api: HfApi, retry: RetryPolicy) -> dict[str, Any]:
    """The answer of `UploaderProcess.check`."""
    deadline = time.monotonic() + seconds
    for failures in range(1, 1000):
        try:
            repo_id = prepare(target, api)
            api.auth_check(repo_id, write=True)  # `create_repo` of an existing repository succeeds for readers
            return {"repo_id": repo_id}
        except Exception as error:
            wait = retry.delay(failures)
            if is_permanent(error) or time.monotonic() + wait > deadline:
                offline = isinstance(error, OfflineModeIsEnabled)  # a run without a network leaves its saves on disk
                return {"error": printable(error), "permanent": is_permanent(error) and not offline}
            time.sleep(wait)
    raise AssertionError("the deadline ends the loop")


def _serve(folder: Path, api: HfApi, retry: RetryPolicy) -> None:
    """Send what is queued until standard input ends. Each line of standard input ends the wait for a retry."""
    wake, queue = threading.Event(), UploadQueue(folder)

    def listen() -> None:
        for _ in sys.stdin:
            wake.set()
        os._exit(0)  # the training process has ended

    threading.Thread(target=listen, daemon=True).start()
    with sending(folder, timeout=-1):
        queue.finish_deletions()
        uploader, failures = Uploader(queue, api, retry), 0
        while True:
            wake.clear()
            failure = uploader.send_all()
            failures = 0 if failure is None else failures + 1
            if failure is not None:
                with suppress(OSError):  # the disk of the log may be full
                    text = printable(f"{type(failure).__name__}: {failure}")
                    print(time.strftime("%F %T"), text, file=sys.stderr, flush=True)
            if wake.wait(None if failure is None else retry.delay(failures)):
                failures = 0
