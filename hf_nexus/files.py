"""Small helpers for files, messages and errors."""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["finite_json", "nearest", "one_line_errors", "write_atomic"]


def write_atomic(path: str | Path, text: str) -> Path:
    """
    Write a UTF-8 file by renaming: an interrupted process leaves the old file or the new one.

    The file is not forced to the disk, because this can wait for a whole checkpoint to be written. A power failure
    may therefore lose it.

    Args:
        path (`str` or `Path`):
            The file. Missing folders are created.
        text (`str`):
            Its content. Line ends are written as they are.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.files import write_atomic
        >>> write_atomic(Path(mkdtemp(), "new", "state.json"), "{}").read_text()
        '{}'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8", newline="\n")
    scratch.replace(path)
    return path


def finite_json(value: Any, **options: Any) -> str:
    """
    JSON text with `null` for numbers that are not finite, because the standard has no NaN.

    Args:
        value (`Any`):
            Plain data.
        options:
            As for `json.dumps`.

    Example:
        >>> from hf_nexus.files import finite_json
        >>> finite_json({"loss": float("nan"), "steps": [1, 2]})
        '{"loss": null, "steps": [1, 2]}'
    """
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nearest(word: Any, known: Iterable[str]) -> str:
    """
    A sentence for an error message that suggests the nearest known word, empty if none is near.

    Example:
        >>> from hf_nexus.files import nearest
        >>> "Unknown key." + nearest("inner_Ir", ["inner_lr", "optim"])
        "Unknown key. Did you mean 'inner_lr'?"
    """
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


@contextmanager
def one_line_errors(
    *, debug: bool = False, errors: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
) -> Iterator[None]:
    """
    End the process with one line for an error that the user can fix.

    Args:
        debug (`bool`, *optional*, defaults to `False`):
            Keep the traceback.
        errors (`tuple[type[Exception], ...]`, *optional*):
            Errors that end in one line. Any other error keeps its traceback.

    Raises:
        SystemExit: with the message, which the interpreter prints; the exit status is 1.
    """
    try:
        yield
    except errors as error:
        if debug:
            raise
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
