"""One upload job: the files of one future commit, in a folder of the upload queue."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_atomic

__all__ = ["Job", "SpoiledJobError", "Target"]


class SpoiledJobError(RuntimeError):
    """A queued file was changed or deleted after it was queued."""


@dataclass(frozen=True)
class Target:
    """Repository and branch that a job is sent to."""

    repo_id: str  # "user/name", or "name" in the namespace of the logged-in user
    private: bool | None = None  # if the repository must be created
    revision: str | None = None  # created when missing; None is the default branch

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision or 'main'}"


@dataclass(frozen=True)
class Job:
    """
    Files of one future commit.

    A slot is a folder of the repository that the job replaces as a whole; `""` is the root. A newer job with the same
    slots makes this one superfluous. `stamps` has the files by their path in the repository: of hard links, their size
    (bytes) and modification time (ns) at queueing, and `None` for copies.
    """

    path: Path
    number: int  # order of arrival
    step: int  # training step at which the files were saved
    message: str  # title of the commit
    target: Target
    slots: tuple[str, ...]
    stamps: dict[str, tuple[int, int] | None]

    @classmethod
    def read(cls, path: Path) -> "Job | None":
        """Read a job; `None` if another process has moved it, or the machine crashed during the write."""
        try:
            fields = json.loads((path / "job.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        stamps = {name: stamp and tuple(stamp) for name, stamp in fields.pop("stamps").items()}
        target, slots = Target(**fields.pop("target")), tuple(fields.pop("slots"))
        return cls(path, int(path.name.partition("-")[0]), target=target, slots=slots, stamps=stamps, **fields)

    def write(self) -> None:
        """Write `job.json`, which completes the job. Its files must be there already."""
        fields = asdict(self)
        del fields["path"], fields["number"]  # both are in the name of the folder
        write_atomic(self.path / "job.json", json.dumps(fields))

    def files(self, slots: tuple[str, ...] | None = None) -> dict[str, Path]:
        """Files of some slots, by default of all, by their path in the repository."""
        wanted = self.slots if slots is None else slots
        return {name: self.path / "files" / name for name in self.stamps if self._slot(name) in wanted}

    def size(self) -> int:
        """Bytes of the files that still exist."""
        return sum(path.stat().st_size for path in self.files().values() if path.exists())

    def _slot(self, name: str) -> str:
        return next((slot for slot in self.slots if slot and name.startswith(f"{slot}/")), "")

    def verify(self, files: Mapping[str, Path]) -> None:
        """
        Raise `SpoiledJobError` if a file is gone or a linked file was overwritten, for example by a run that resumed
        from an earlier checkpoint.
        """
        for name, path in files.items():
            try:
                stat = path.stat()
            except FileNotFoundError as error:
                raise SpoiledJobError(f"{name} of step {self.step} is gone from {self.path}.") from error
            if self.stamps[name] not in (None, (stat.st_size, stat.st_mtime_ns)):
                raise SpoiledJobError(f"{name} of step {self.step} was overwritten after it was queued.")
