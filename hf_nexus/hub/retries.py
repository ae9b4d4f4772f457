"""Timeouts and retries of uploads: how long to wait, and which errors a retry can solve."""

import random
from dataclasses import dataclass
from typing import Any

from huggingface_hub import get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

__all__ = ["CONFLICTS", "CardRefusedError", "RetryPolicy", "http_status", "is_permanent", "limit_requests"]

CONFLICTS = (409, 412)  # another commit was made in between: retry at once
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

    def delay(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row, with jitter to spread the retries of several runs."""
        return min(self.last_retry, self.first_retry * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)


def limit_requests(seconds: float) -> None:
    """Set a timeout for all requests of `huggingface_hub` in this process, which has none by default."""
    template = get_session()

    def set_timeout(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def client() -> Any:
        hooks = {**template.event_hooks, "request": [*template.event_hooks["request"], set_timeout]}
        return type(template)(event_hooks=hooks, follow_redirects=True, timeout=seconds)

    set_client_factory(client)


def is_permanent(error: BaseException) -> bool:
    """Whether an error stays until a user acts, for example a missing permission or an invalid card."""
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TRANSIENT
    return isinstance(error, CardRefusedError | HFValidationError)


def http_status(error: BaseException | None) -> int | None:
    """HTTP status of an error or of its causes: the client wraps the errors of LFS uploads and of cards."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None
