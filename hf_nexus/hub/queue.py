"""What waits for the Hub, as folders on disk: it outlives the process that saved it."""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .job import Job, Target

__all__ = ["QUEUE_NAME", "UploadQueue"]

QUEUE_NAME = "hub_queue"  # inside the output folder

_JOB = re.compile(r"(\d{6,})-step-\d+(\.sending)?")
_SENDING = ".sending"
_LINK_FROM = 1 << 20  # bytes; smaller files are copied, which is as fast and lets nobody change them


class UploadQueue:
    """
    Jobs as folders of hard links and copies. One process adds, one (the holder of `lock`) sends; either may die at
    any moment: a job appears, is claimed and disappears by one rename.

    Args:
        folder (`Path`): The queue's folder, created by the first `add`.

    Example:
        ```python
        >>> queue = UploadQueue(Path("out", "hub_queue"))
        >>> queue.jobs()
        []

        ```
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._last = 0
        self._unwritten: dict[str, Any] | None = None

    # ---- The side that saves ----

    def add(
        self,
        files: Mapping[str, Path],
        slots: tuple[str, ...],
        step: int,
        message: str,
        target: Target,
        write_once: Path | None = None,
    ) -> Job:
        """
        Put a job aside: from now on what happens to the given files is of no consequence to it.

        Args:
            files (`Mapping[str, Path]`): The files by path in the repository.
            slots, step, message, target: As in [`Job`].
            write_once (`Path`, *optional*): Large files below it are linked rather than copied.

        Raises:
            OSError: the disk is full, a file vanished; nothing is left behind then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"new-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            stamps: dict[str, tuple[int, int] | None] = {}
            for name, source in files.items():
                copy = scratch / "files" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                once = write_once is not None and source.is_relative_to(write_once)
                linked = _set_aside(source, copy, link=once and source.stat().st_size >= _LINK_FROM)
                stat = copy.stat()
                stamps[name] = (stat.st_size, stat.st_mtime_ns) if linked else None
            job = Job(scratch, 0, step, message, target, slots, stamps)
            job.write()
            return self._publish(job)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _publish(self, job: Job) -> Job:
        numbers = [other.number for other in self.jobs()]
        numbers += [number for slots in self.state().get("sent", {}).values() for number in slots.values()]
        while True:
            self._last = max([self._last, *numbers]) + 1
            path = self.folder / f"{self._last:06d}-step-{job.step}"
            try:
                job.path.rename(path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            else:
                return replace(job, path=path, number=self._last)

    def prune(self) -> None:
        """Delete the jobs that newer ones make superfluous, but for one that is being sent."""
        for job, slots in self.todo():
            if not slots and job.path.suffix != _SENDING:
                self.remove(job)

    # ---- The side that sends ----

    def claim(self, job: Job) -> Job | None:
        """Keep the job from being pruned; `None` if that has already happened."""
        claimed = self.resting_place(job).with_suffix(_SENDING)
        try:
            job.path.rename(claimed)
        except FileNotFoundError:
            return None
        return Job.read(claimed)

    def release(self, job: Job) -> None:
        """The opposite of `claim`."""
        job.path.rename(self.resting_place(job))

    def resting_place(self, job: Job) -> Path:
        """The job's folder while it is not being sent."""
        return job.path.with_suffix("")

    def sweep(self) -> None:
        """Finish deletions that a sender began and did not survive. Only for the holder of the lock."""
        for path in self.folder.glob("old-*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self, job: Job) -> None:
        """Delete a job; a rename comes first, so that no half-deleted one is ever seen."""
        trash = job.path.with_name(f"old-{job.path.name}")
        try:
            job.path.rename(trash)
        except FileNotFoundError:
            return  # the other side was faster
        shutil.rmtree(trash, ignore_errors=True)

    def keep_only(self, job: Job, name: str) -> None:
        """Make a file of the root all that is left of a job."""
        replace(job, slots=("",), stamps={name: job.stamps[name]}).write()
        for other, path in job.files().items():
            if other != name:
                path.unlink(missing_ok=True)

    # ---- Both ----

    def jobs(self) -> list[Job]:
        """What waits, oldest first."""
        names = self._names()
        while True:
            jobs = [job for name in names if (job := Job.read(self.folder / name)) is not None]
            before, names = names, self._names()
            if names == before:  # else one was claimed meanwhile, and may have been missed under both of its names
                return sorted(jobs, key=lambda job: job.number)

    def todo(self) -> list[tuple[Job, tuple[str, ...]]]:
        """What waits, newest first, each with those of its slots that no newer job has renewed or is about to."""
        covered = {target: dict(slots) for target, slots in self.state().get("sent", {}).items()}
        found = []
        for job in reversed(self.jobs()):
            newest = covered.setdefault(str(job.target), {})
            found.append((job, tuple(slot for slot in job.slots if newest.get(slot, 0) <= job.number)))
            newest.update({slot: max(job.number, newest.get(slot, 0)) for slot in job.slots})
        return found

    def _names(self) -> set[str]:
        try:
            return {name for name in os.listdir(self.folder) if _JOB.fullmatch(name)}
        except FileNotFoundError:
            return set()

    def state(self) -> dict[str, Any]:
        """What the sender last wrote down: what was sent, and the error that holds up the rest."""
        if self._unwritten is not None:
            return dict(self._unwritten)
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace the state in one piece; if the disk is full, keep it in memory and raise `OSError`."""
        self._unwritten = state
        write_atomic(self.folder / "state.json", json.dumps(state))
        self._unwritten = None


def _set_aside(source: Path, copy: Path, link: bool) -> bool:
    """
    Link or copy a file, the other way if the first is not possible (two file systems; no space for a copy).

    Returns:
        `bool`: whether it is a link.
    """
    if link:
        try:
            os.link(source, copy)
            return True
        except OSError:
            shutil.copy2(source, copy)
            return False
    try:
        shutil.copy2(source, copy)
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        copy.unlink(missing_ok=True)
        os.link(source, copy)
        return True
