"""A lock on a folder, which ends with its process and names it to others."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import read_plain, require_folder, write_atomic

__all__ = ["HOLDER_NAME", "LOCK_NAME", "locked"]

logger = logging.getLogger(__name__)

# Pushes of an output folder leave out names that begin with an underscore.
LOCK_NAME = "_running.lock"
HOLDER_NAME = "_running.json"

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
    holder = path.with_name(HOLDER_NAME)
    try:
        # One second, because a holder that ends deletes the file. It is then made again.
        lock = FileLock(path, timeout=1, fallback_to_soft=False).acquire()
    except Timeout as error:
        raise ValueError(
            f"{path.parent} is used by {_name(_read(holder))}. Wait for it, or choose another output_dir. If that "
            f"process is gone, delete {path}."
        ) from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}). Make sure that no other run uses it.")
        yield
        return
    with lock:
        earlier, host = _read(holder), socket.gethostname()
        if earlier.get("host", host) != host:
            logger.warning(f"{folder} was used by {_name(earlier)}, which did not end. If it still runs, stop it.")
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        _held.add(path)
        try:
            write_atomic(holder, json.dumps({"pid": os.getpid(), "host": host, "since": since}))
            yield
        finally:
            _held.discard(path)
            holder.unlink(missing_ok=True)
            with suppress(PermissionError):  # of an open file on Windows, where filelock deletes it
                path.unlink(missing_ok=True)


def _read(holder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_plain(holder))
    except (OSError, ValueError, RecursionError):  # not written yet
        return {}
    return found if isinstance(found, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
