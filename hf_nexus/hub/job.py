"""One commit that is to be made, as a folder on disk."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_atomic

__all__ = ["Job", "SpoiledJobError", "Target"]


class SpoiledJobError(RuntimeError):
    """A queued file is no longer what it was when it was queued."""


@dataclass(frozen=True)
class Target:
    """Where a job goes.

    Args:
        repo_id (`str`): `"user/name"`, or `"name"` in the namespace of whoever is logged in.
        private (`bool`, *optional*): Visibility of a repository that is yet to be created.
        revision (`str`, *optional*): Branch, created when missing; the default branch if `None`.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision or 'main'}"


@dataclass(frozen=True)
class Job:
    """One commit that is to be made.

    Args:
        path (`Path`): The job's folder.
        number (`int`): Order of arrival.
        step (`int`): Training step of what it holds.
        message (`str`): Title of the commit.
        target (`Target`): Where it goes.
        slots (`tuple[str, ...]`): The folders of the repository that the job renews as a whole; `""` is the root. A
            newer job with the same slots makes this one superfluous.
        stamps (`dict[str, tuple[int, int] | None]`): The files by path in the repository; of those that are hard links
            the size and modification time (ns).
    """

    path: Path
    number: int
    step: int
    message: str
    target: Target
    slots: tuple[str, ...]
    stamps: dict[str, tuple[int, int] | None]

    @classmethod
    def read(cls, path: Path) -> "Job | None":
        """`None` if another process has renamed or deleted it meanwhile, or the machine crashed while writing."""
        try:
            fields = json.loads((path / "job.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        stamps = {name: stamp and tuple(stamp) for name, stamp in fields.pop("stamps").items()}
        target, slots = Target(**fields.pop("target")), tuple(fields.pop("slots"))
        return cls(path, int(path.name.partition("-")[0]), target=target, slots=slots, stamps=stamps, **fields)

    def write(self) -> None:
        """Make the folder a job; it must hold the files already."""
        fields = asdict(self)
        del fields["path"], fields["number"]  # the folder's name says both
        write_atomic(self.path / "job.json", json.dumps(fields))

    def files(self, slots: tuple[str, ...] | None = None) -> dict[str, Path]:
        """The files of some slots, of all by default, by path in the repository."""
        wanted = self.slots if slots is None else slots
        return {name: self.path / "files" / name for name in self.stamps if self.slot(name) in wanted}

    def size(self) -> int:
        """Bytes, of what is still there."""
        return sum(path.stat().st_size for path in self.files().values() if path.exists())

    def slot(self, name: str) -> str:
        """The slot that a path in the repository belongs to."""
        return next((slot for slot in self.slots if slot and name.startswith(f"{slot}/")), "")

    def verify(self, files: Mapping[str, Path]) -> None:
        """
        Raises:
            SpoiledJobError: a file is gone; or a hard link was written to after it was queued, by a run that resumed
                from an earlier checkpoint, for example.
        """
        for name, path in files.items():
            try:
                stat = path.stat()
            except FileNotFoundError as error:
                raise SpoiledJobError(f"{name} of step {self.step} is gone from {self.path}.") from error
            if self.stamps[name] not in (None, (stat.st_size, stat.st_mtime_ns)):
                raise SpoiledJobError(f"{name} of step {self.step} was overwritten after it was queued.")
