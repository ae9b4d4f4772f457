"""A lock on a folder, which ends with its process and names it to others."""

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from .files import require_folder

__all__ = ["LOCK_NAME", "locked"]

logger = logging.getLogger(__name__)

# Pushes of an output folder leave out names that begin with an underscore.
LOCK_NAME = "_running.json"

_held: set[Path] = set()


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """
    Keep other processes out of a folder inside the context. The folder is created if it is missing. This process may
    enter it again.

    The operating system releases the lock when the process ends, also if it is killed. A folder on a file system that
    has no locks is used without.

    Raises:
        ValueError: another process holds the folder, whose number, host and start are in the message, or it cannot be
            written to.
    """
    path = Path(folder).resolve() / LOCK_NAME
    if path in _held:
        yield
        return
    require_folder(folder)
    try:
        file = _open(path)
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}). Make sure that no other run uses it.")
        yield
        return
    with file:
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            path.unlink(missing_ok=True)


def _open(path: Path) -> TextIO:
    while True:
        # A link would let the lock overwrite another file.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o644), "r+", encoding="utf-8")
        try:
            _lock(file)
        except OSError as error:
            other = _name(_holder(file))
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"{path.parent} is used by {other}. Wait for it, or choose another output_dir. If that process is "
                f"gone, delete {path}."
            ) from error
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # its holder deleted it in between
    earlier, host = _holder(file), socket.gethostname()
    if earlier.get("host", host) != host:
        logger.warning(f"{path.parent} was used by {_name(earlier)}, which did not end. If it still runs, stop it.")
    file.seek(0)
    file.truncate()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    json.dump({"pid": os.getpid(), "host": host, "since": since}, file)
    file.flush()
    return file


def _lock(file: TextIO) -> None:
    if sys.platform != "win32":
        import fcntl

        # Workers of a data loader inherit a lock of `flock`, but not this one. They may outlive their parent.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.load(file)
    except ValueError:  # not written yet
        return {}
    return found if isinstance(found, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
