"""
The process beside a training run that sends its queue, and the same from a command line.

A process and not a thread: neither `hf_xet` nor the client's thread pools can be interrupted, and the interpreter
waits for the latter before it ends. A process can be killed, whatever it waits for, and takes no time from the
training loop.
"""

import faulthandler
import json
import os
import random
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, get_session, set_client_factory
from huggingface_hub.utils import tqdm

from .job import Job, Target
from .queue import UploadQueue
from .uploader import Uploader, is_permanent

__all__ = ["Patience", "QueueBusyError", "bound_requests", "drain", "main", "settings_line"]


class QueueBusyError(RuntimeError):
    """Another process is sending what is in this queue."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds.

    Args:
        request (`float`): For the server to accept or send the next bytes.
        first_retry, last_retry (`float`): Before the first retry, doubled with each up to the last, with jitter.
        upload (`float`): For one attempt at a job, in addition to a second per `slowest_rate` bytes of it. Requests
            are bounded already; this is for what has no timeouts of its own.
        slowest_rate (`float`): Bytes per second of the slowest connection that is worth waiting for.
    """

    request: float = 60.0
    first_retry: float = 2.0
    last_retry: float = 300.0
    upload: float = 900.0
    slowest_rate: float = 250_000.0

    def before_retry(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row, with jitter so that runs do not march in step."""
        return min(self.last_retry, self.first_retry * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)


def drain(
    folder: Path,
    *,
    token: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
    attempts: int = 5,
    lock_timeout: float = 10.0,
) -> Exception | None:
    """
    Send what a run left in its queue, in this process, with the client's progress bars. From then on requests of
    `huggingface_hub` in this process have timeouts.

    Args:
        folder (`Path`): The queue's folder.
        token, revision, endpoint (`str`, *optional*): In place of the client's own, and of the branch asked for.
        patience ([`Patience`], *optional*): Timeouts.
        attempts (`int`, *optional*, defaults to 5): Passes before giving up on an error that may be temporary.
        lock_timeout (`float`, *optional*, defaults to 10): Seconds to wait for another sender to end.

    Returns:
        `Exception`, *optional*: why something is left; `None` if nothing is.

    Raises:
        QueueBusyError: another process is sending.

    Example:
        ```python
        >>> drain(Path("out", "hub_queue")) is None  # nothing was left
        True

        ```
    """
    queue, patience = UploadQueue(folder), patience or Patience()
    if not folder.is_dir():
        return None
    try:
        with FileLock(folder / "lock", timeout=lock_timeout):
            queue.sweep()
            bound_requests(patience.request)
            uploader = Uploader(queue, HfApi(endpoint=endpoint, token=token, library_name="hf-nexus"), revision)
            failure = None
            with tqdm(total=len(queue.jobs()), desc="Pushing", unit="checkpoint") as bar:
                for failures in range(1, attempts + 1):
                    failure = uploader.send_pending(lambda job: bar.set_description(f"Pushing step {job.step}"))
                    bar.update(bar.total - len(queue.jobs()) - bar.n)
                    if failure is None or is_permanent(failure):
                        break
                    if failures < attempts:
                        time.sleep(patience.before_retry(failures))
            return failure
    except Timeout as error:
        raise QueueBusyError(
            f"Another process is sending what is in {folder}: wait for it, or end the training run first."
        ) from error


def bound_requests(seconds: float) -> None:
    """Give every request of `huggingface_hub` in this process a timeout, also those that ask for none."""
    template = get_session()

    def bound(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def client() -> Any:
        hooks = {**template.event_hooks, "request": [*template.event_hooks["request"], bound]}
        return type(template)(event_hooks=hooks, follow_redirects=True, timeout=seconds)

    set_client_factory(client)


# ---- The process beside a training run ----


def _check(settings: dict[str, Any], api: HfApi, patience: Patience) -> dict[str, Any]:
    """Whether the target can be written to: its full id, or what is wrong and whether that may pass."""
    target = Target(**settings["target"])
    deadline = time.monotonic() + settings["seconds"]
    for failures in range(1, 1000):
        try:
            repo_id = Uploader(UploadQueue(Path()), api).prepare(target)
            api.auth_check(repo_id, write=True)  # an existing repository says yes to readers until then
            return {"repo_id": repo_id}
        except Exception as error:
            wait = patience.before_retry(failures)
            if is_permanent(error) or constants.is_offline_mode() or time.monotonic() + wait > deadline:
                return {"error": " ".join(str(error).split()), "permanent": is_permanent(error)}
            time.sleep(wait)
    raise AssertionError("the deadline ends the loop")


def _serve(folder: Path, api: HfApi, patience: Patience) -> None:
    """Send whatever comes into the queue until standard input ends; a line of it means: look now."""
    wake, queue = threading.Event(), UploadQueue(folder)

    def listen() -> None:
        for _ in sys.stdin:
            wake.set()
        os._exit(0)  # the training process is gone, or wants us gone

    def set_deadline(job: Job) -> None:
        faulthandler.dump_traceback_later(patience.upload + job.size() / patience.slowest_rate, exit=True)

    threading.Thread(target=listen, daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        queue.sweep()
        uploader, failures = Uploader(queue, api), 0
        while True:
            wake.clear()
            failure = uploader.send_pending(set_deadline)
            faulthandler.cancel_dump_traceback_later()
            failures = 0 if failure is None else failures + 1
            if failure is not None:
                with suppress(OSError):  # the log is on the same disk
                    print(f"{time.strftime('%F %T')} {type(failure).__name__}: {failure}", file=sys.stderr, flush=True)
            if wake.wait(None if failure is None else patience.before_retry(failures)):
                failures = 0


def main() -> None:
    """`python -m hf_nexus.hub.uploader_process`, with one line of JSON on standard input: the token is no argument."""
    settings = json.loads(sys.stdin.readline())
    patience = Patience(**settings["patience"])
    os.nice(10)  # training comes first
    bound_requests(patience.request)
    api = HfApi(token=settings["token"], library_name="hf-nexus")
    if "target" in settings:
        print(json.dumps(_check(settings, api, patience)))
    else:
        _serve(Path(settings["folder"]), api, patience)


def settings_line(patience: Patience, token: str | None, **more: Any) -> str:
    """What `main` reads."""
    return json.dumps({"patience": asdict(patience), "token": token, **more}) + "\n"


if __name__ == "__main__":
    main()
