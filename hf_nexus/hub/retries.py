"""Timeouts and retries of uploads: how long to wait, and which errors a retry can solve."""

import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from .job import RefusedJobError

__all__ = ["CONFLICTS", "CardRefusedError", "RetryPolicy", "deadline", "http_status", "is_permanent", "limit_requests"]

CONFLICTS = (409, 412)  # another commit was made in between: retry at once
_LARGEST_ANSWER = 32 << 20  # bytes
# Control characters of a terminal, in UTF-8 and as escapes of JSON. The client prints texts of the server.
_CONTROLS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\\u00(0[0-8bcef]|1[0-9a-f]|7f|[89][0-9a-f])", re.I)
_TRANSIENT = (404, 408, 425, 429, *CONFLICTS)  # 404: the next attempt may create what is missing


class CardRefusedError(ValueError):
    """The Hub has all files of a job except the model card, which is invalid."""


@dataclass(frozen=True)
class RetryPolicy:
    """Timeouts and waiting times, in seconds."""

    request: float = 60.0  # for the server to accept or send the next bytes
    first_retry: float = 2.0  # doubles with each retry
    last_retry: float = 300.0
    # For one attempt at a job, plus one second per `slowest_rate` bytes. It ends uploads by hf_xet, without timeouts.
    upload: float = 900.0
    slowest_rate: float = 250_000.0  # bytes per second

    def seconds(self, size: int) -> float:
        """Seconds for one attempt at a job of `size` bytes."""
        return self.upload + size / self.slowest_rate

    def delay(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row, with jitter to spread the retries of several runs."""
        return min(self.last_retry, self.first_retry * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)


def limit_requests(seconds: float) -> None:
    """
    Limit all requests of `huggingface_hub` in this process: the time until the next bytes, and of answers that are
    read whole also their size and total time. Control characters are removed from these answers.
    """
    template = get_session()

    def set_timeout(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def client() -> Any:
        hooks = {**template.event_hooks, "request": [*template.event_hooks["request"], set_timeout]}
        made: Any = type(template)(event_hooks=hooks, follow_redirects=True, timeout=seconds)
        send = made.send

        def send_limited(request: Any, *, stream: bool = False, **options: Any) -> Any:
            response = send(request, stream=True, **options)
            return response if stream else _read_limited(response, seconds)

        made.send = send_limited
        return made

    set_client_factory(client)


def _read_limited(response: Any, seconds: float) -> Any:
    """A response with the same content, read within limits and without control characters."""
    body, end = bytearray(), time.monotonic() + seconds
    try:
        for part in response.iter_bytes():
            body += part
            if len(body) > _LARGEST_ANSWER or time.monotonic() > end:
                limits = f"{_LARGEST_ANSWER >> 20} MiB and {seconds:g} s"
                raise RuntimeError(f"The answer to {response.request.url} is over the limits of {limits}.")
    finally:
        response.close()
    headers = [(name, _CONTROLS.sub(b"", value)) for name, value in response.headers.raw]
    coded = (b"content-encoding", b"content-length", b"transfer-encoding") * bool(body)  # an answer to HEAD has none
    return type(response)(
        response.status_code,
        headers=[(name, value) for name, value in headers if name.lower() not in coded],
        content=_CONTROLS.sub(b"", bytes(body)),
        request=response.request,
        extensions=response.extensions,
        history=response.history,
    )


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """End the process if the context takes longer. hf_xet and the threads of the client cannot be interrupted."""

    def end() -> None:
        print(
            f"error: The upload of {what} was not complete after {seconds:g} s. Try again.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_permanent(error: BaseException) -> bool:
    """Whether an error stays until a user acts, for example a missing permission or an invalid card."""
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TRANSIENT
    return isinstance(error, CardRefusedError | HFValidationError | OfflineModeIsEnabled | RefusedJobError)


def http_status(error: BaseException | None) -> int | None:
    """HTTP status of an error or of its causes: the client wraps the errors of LFS uploads and of cards."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None
