"""Errors that users can fix: one line, and the line of the YAML file that it is about."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .files import printable
from .strict import line_of_key

__all__ = ["one_line_errors"]

# An error about a value of a file starts with the path of the file, then that of the key.
_PLACE = re.compile(r"(.+?): ([\w-]+(?:\.[\w-]+|\[\d+\])*)")


@contextmanager
def one_line_errors(
    *, debug: bool = False, errors: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
) -> Iterator[None]:
    """
    End the process with one line for an error that the user can fix, which is one of `errors`. Any other error keeps
    its traceback, and with `debug` all do.

    Raises:
        SystemExit: with the message, which the interpreter prints; the exit status is 1. If it is about a line of a
            YAML file, the line follows.
    """
    try:
        yield
    except errors as error:
        if debug:
            raise
        notes = getattr(error, "__notes__", None) or [_line_of(str(error))]
        raise SystemExit("\n".join([f"error: {printable(error)}", *filter(None, notes)])) from error


def _line_of(message: str) -> str:
    """The line of a file that an error message is about, if the message starts with the file and a key in it."""
    found = _PLACE.match(message)
    return line_of_key(*found.groups()) if found and os.path.isfile(found[1]) else ""
