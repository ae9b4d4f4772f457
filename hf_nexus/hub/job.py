"""One upload job: the files of one future commit, in a folder of the upload queue."""

import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub.utils import FORBIDDEN_FOLDERS

from ..files import printable, read_plain, write_atomic
from ..strict import check_fields, read

__all__ = ["FINISHED_RUN", "Job", "RefusedJobError", "SpoiledJobError", "Target", "is_repo_path", "slot_of"]

FINISHED_RUN = "Push a finished run"  # message of a job that the next of its kind replaces


class SpoiledJobError(RuntimeError):
    """A queued file was changed or deleted after it was queued."""


class RefusedJobError(RuntimeError):
    """A job that may not be sent as it is. It stays in the queue."""


@dataclass(frozen=True)
class Target:
    """Repository and branch that a job is sent to."""

    repo_id: str  # "user/name", or "name" in the namespace of the logged-in user
    private: bool | None = None  # if the repository must be created
    # A branch, which is created when missing, or "refs/pr/3", a pull request that exists. None is the default branch.
    revision: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision or 'main'}"


@dataclass(frozen=True)
class Job:
    """
    Files of one future commit.

    A slot is a folder of the repository that the job replaces as a whole; `""` is the root. A newer job with the same
    slots makes this one superfluous. `stamps` has the files by their path in the repository: of hard links, their size
    (bytes) and modification time (ns) at queueing, and `None` for copies.

    Raises:
        ValueError: a field has another type, or a path leads out of the repository.
    """

    path: Path
    number: int  # order of arrival
    step: int  # training step at which the files were saved
    message: str  # title of the commit
    target: Target
    slots: list[str]
    stamps: dict[str, list[int] | None]

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (*self.stamps, *filter(None, self.slots)):
            if not is_repo_path(name):
                raise ValueError(f"{name!r} is not a path inside a repository.")

    @classmethod
    def read(cls, path: Path) -> "Job | None":
        """
        Read a job; `None` if another process has moved it.

        Raises:
            ValueError: the folder is not a job. Another user may have written it, or the machine crashed.
        """
        try:
            if path.is_symlink():
                raise ValueError("it is a link, which is not followed.")
            fields = json.loads(read_plain(path / "job.json"))
            return read(cls, {**fields, "path": path, "number": int(path.name.partition("-")[0])})
        except (OSError, ValueError, TypeError, RecursionError) as error:
            if isinstance(error, OSError) and not path.exists():
                return None
            what = printable(error)[:300].rstrip(".")
            raise ValueError(f"{path} is not an upload job: {what}. Restore its job.json or delete it.") from error

    def write(self) -> None:
        """Write `job.json`, which completes the job. Its files must be there already."""
        fields = asdict(self)
        del fields["path"], fields["number"]  # both are in the name of the folder
        write_atomic(self.path / "job.json", json.dumps(fields))

    def files(self, slots: Iterable[str] | None = None) -> dict[str, Path]:
        """Files of some slots, by default of all, by their path in the repository."""
        wanted = self.slots if slots is None else slots
        return {name: self.path / "files" / name for name in self.stamps if slot_of(name, self.slots) in wanted}

    def stats(self) -> dict[str, os.stat_result]:
        """
        The files that still exist, as `os.lstat` describes them, by their path in the repository.

        Raises:
            RefusedJobError: a file is not regular, or it or one of its folders is a link.
        """
        found = {}
        for name, path in self.files().items():
            try:
                for parent in reversed(PurePosixPath("files", name).parents):
                    if not stat.S_ISDIR((self.path / parent).lstat().st_mode):
                        raise RefusedJobError(
                            f"{self.path / parent} is not a folder of the queue, but a link or file."
                        )
                found[name] = path.lstat()
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(found[name].st_mode):
                raise RefusedJobError(f"{path} is not a regular file of the queue, but a link or special file.")
        return found

    def size(self) -> int:
        """Bytes of the files that still exist."""
        return sum(stat.st_size for stat in self.stats().values())

    def verify(self, files: Mapping[str, Path]) -> None:
        """
        Raise `SpoiledJobError` if a file is gone or a linked file was overwritten, for example by a run that resumed
        from an earlier checkpoint. Raise `RefusedJobError` as `stats`.
        """
        found = self.stats()
        for name in files:
            if name not in found:
                raise SpoiledJobError(f"{name} of step {self.step} is gone from {self.path}.")
            if self.stamps[name] not in (None, [found[name].st_size, found[name].st_mtime_ns]):
                raise SpoiledJobError(f"{name} of step {self.step} was overwritten after it was queued.")


def slot_of(name: str, slots: Iterable[str]) -> str:
    """The slot that a file belongs to."""
    return next((slot for slot in slots if slot and name.startswith(f"{slot}/")), "")


def is_repo_path(name: str) -> bool:
    """Whether a name is a path inside a repository on every operating system, and one that the client sends."""
    path = PurePosixPath(name)
    # A server may answer without control characters. Surrogates are not text.
    is_text = all(unicodedata.category(character) not in ("Cc", "Cs") for character in name)
    outside = PureWindowsPath(name).anchor or "\\" in name or not {"..", *FORBIDDEN_FOLDERS}.isdisjoint(path.parts)
    return bool(path.parts) and path.as_posix() == name and is_text and not outside
