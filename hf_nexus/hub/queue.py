"""The upload queue: job folders on disk, which survive the process that saved them, and their status."""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .job import Job, Target

__all__ = ["QUEUE_NAME", "QueueStatus", "UploadQueue"]

QUEUE_NAME = "hub_queue"  # inside the output folder

_JOB = re.compile(r"(\d{6,})-step-\d+(\.sending)?")
_SENDING = ".sending"
_LINK_FROM = 1 << 20  # bytes; copying a smaller file is as fast as linking it, and a copy cannot be overwritten


class UploadQueue:
    """
    Upload jobs, as folders of hard links and copies.

    One process adds jobs and one process, the holder of `lock`, sends them. Each may be killed at any time: a single
    rename adds, claims or removes a job. The first `add` creates the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._last = 0
        self._unwritten: dict[str, Any] | None = None

    # ---- The process that saves ----

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
        Queue a job with `files`, by their path in the repository. Later changes of these files do not affect it.

        Large files below `write_once` are linked instead of copied. Raises `OSError` and leaves the queue unchanged if
        the disk is full or a file is gone.
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
                linked = _link_or_copy(source, copy, link=once and source.stat().st_size >= _LINK_FROM)
                stat = copy.stat()
                stamps[name] = (stat.st_size, stat.st_mtime_ns) if linked else None
            job = Job(scratch, 0, step, message, target, slots, stamps)
            job.write()
            return self._number(job)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _number(self, job: Job) -> Job:
        """Move a complete job to its place in the queue, under a number that was never used."""
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
        """Delete superfluous jobs, except one that is being sent."""
        for job, slots in self.pending():
            if not slots and job.path.suffix != _SENDING:
                self.remove(job)

    # ---- The process that sends ----

    def claim(self, job: Job) -> Job | None:
        """Protect a job from `prune`; `None` if it was pruned already."""
        claimed = self.released_path(job).with_suffix(_SENDING)
        try:
            job.path.rename(claimed)
        except FileNotFoundError:
            return None
        return Job.read(claimed)

    def release(self, job: Job) -> None:
        """Undo `claim`."""
        job.path.rename(self.released_path(job))

    def released_path(self, job: Job) -> Path:
        """Folder of the job while it is not claimed."""
        return job.path.with_suffix("")

    def finish_deletions(self) -> None:
        """Delete what a killed sender left half deleted. The caller holds the lock."""
        for path in self.folder.glob("old-*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self, job: Job) -> None:
        """Delete a job; the rename before it hides the job at once."""
        trash = job.path.with_name(f"old-{job.path.name}")
        try:
            job.path.rename(trash)
        except FileNotFoundError:
            return  # the other process was faster
        shutil.rmtree(trash, ignore_errors=True)

    def keep_only(self, job: Job, name: str) -> None:
        """Reduce a job to one file of the root."""
        replace(job, slots=("",), stamps={name: job.stamps[name]}).write()
        for other, path in job.files().items():
            if other != name:
                path.unlink(missing_ok=True)

    # ---- Both processes ----

    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        names = self._names()
        while True:
            jobs = [job for name in names if (job := Job.read(self.folder / name)) is not None]
            before, names = names, self._names()
            if names == before:  # otherwise a job was claimed in between, and may have been missed under both names
                return sorted(jobs, key=lambda job: job.number)

    def pending(self) -> list[tuple[Job, tuple[str, ...]]]:
        """All jobs, newest first, each with those of its slots that no newer job, sent or queued, replaces."""
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
        """Last state that the sender wrote: what was sent, what was lost, and the current error."""
        if self._unwritten is not None:
            return dict(self._unwritten)
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace the state; on a full disk, keep it in memory and raise `OSError`."""
        self._unwritten = state
        write_atomic(self.folder / "state.json", json.dumps(state))
        self._unwritten = None


def _link_or_copy(source: Path, copy: Path, link: bool) -> bool:
    """Link or copy a file, or do the other (two file systems, no space); return whether the result is a link."""
    first, second = (os.link, shutil.copy2) if link else (shutil.copy2, os.link)
    try:
        first(source, copy)
        return link
    except OSError as error:
        if not link and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    copy.unlink(missing_ok=True)
    second(source, copy)
    return not link


@dataclass(frozen=True)
class QueueStatus:
    """
    What is on the Hub and what is not, as plain data.

    Args:
        target (`str`): Repository and branch, `"user/name@branch"`.
        pushed_step (`int`, *optional*): Training step of the model on the Hub.
        commit (`str`, *optional*): Its commit.
        waiting (`tuple[int, ...]`): Training steps of the queued jobs, oldest first.
        error (`str`, *optional*): Last error of the upload.
        permanent (`bool`): Whether the error stays until a user acts.
        lost (`tuple[str, ...]`): Jobs whose files were changed before they were sent, with the reason.
        unqueued (`str`, *optional*): Why the last save could not be queued.
    """

    target: str
    pushed_step: int | None
    commit: str | None
    waiting: tuple[int, ...]
    error: str | None
    permanent: bool
    lost: tuple[str, ...] = ()
    unqueued: str | None = None

    @classmethod
    def read(cls, folder: Path, target: str = "") -> "QueueStatus":
        """Read the status from the folder of a queue."""
        queue = UploadQueue(folder)
        jobs, state = queue.jobs(), queue.state()
        pushed, error = state.get("pushed"), state.get("error", {})
        if pushed is not None:
            target = f"{pushed['repo_id']}@{pushed['revision'] or 'main'}"
        elif jobs and not target:
            target = str(jobs[-1].target)
        return cls(
            target=target,
            pushed_step=pushed and pushed["step"],
            commit=pushed and pushed["commit"],
            waiting=tuple(job.step for job in jobs),
            error=error.get("text"),
            permanent=error.get("permanent", False),
            lost=tuple(state.get("lost", ())),
        )

    @property
    def complete(self) -> bool:
        """Whether every queued job was sent or replaced."""
        return not self.waiting and self.unqueued is None

    def logs(self) -> dict[str, int]:
        """Numbers for the training log."""
        logs = {"hub/pending": len(self.waiting) + (self.unqueued is not None)}
        return logs if self.pushed_step is None else {**logs, "hub/pushed_step": self.pushed_step}

    def line(self, output_dir: str | os.PathLike[str]) -> str:
        """One line: what is on the Hub, what is missing and why, and the command that sends it."""
        step = "nothing" if self.pushed_step is None else f"step {self.pushed_step}"
        line = f"On the Hub ({self.target}): {step}."
        if self.waiting:
            steps = ", ".join(str(step) for step in self.waiting)
            why = f" ({self.error})" if self.error else ""
            line += f" Not yet on the Hub: step {steps}{why}. Send the rest with: hf-nexus push {output_dir}"
        if self.lost:
            line += f" Lost: {'; '.join(self.lost)}"
        if self.unqueued is not None:
            line += f" Not queued, only in {output_dir}: {self.unqueued}."
        return line
