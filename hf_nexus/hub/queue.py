"""The upload queue: job folders on disk, which survive the process that saved them, and their status."""

import errno
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import delete, printable, read_plain, write_atomic
from ..strict import check
from .job import Job, RefusedJobError, Target

__all__ = ["LOG_NAME", "QUEUE_NAME", "QueueBusyError", "QueueStatus", "UploadQueue", "sending"]

logger = logging.getLogger(__name__)

QUEUE_NAME = "hub_queue"  # inside the output folder
LOG_NAME = "uploader.log"

_JOB = re.compile(r"(\d{6,})-step-(\d+)(\.sending)?")
_SENDING = ".sending"
_LINK_FROM = 1 << 20  # bytes; copying a smaller file is as fast as linking it, and a copy cannot be overwritten
_TARGETS = "_hub_targets.json"  # beside the queue: repositories and branches that the run has pushed to

# Of each part of the state, its type and the keys that it needs.
_STATE: dict[str, tuple[Any, set[str]]] = {
    "sent": (dict[str, dict[str, int]], set()),
    "texts": (dict[str, str], set()),  # of each target, the hash of the text of users on the last card of the run
    "pushed": (dict[str, int | str | None], {"step", "commit", "repo_id", "revision"}),
    "error": (dict[str, int | float | str | bool], {"text", "step", "permanent", "time"}),
    "lost": (list[str], set()),
    "refused": (list[str], set()),
}


class QueueBusyError(RuntimeError):
    """Another process is sending this queue."""


@contextmanager
def sending(folder: Path, timeout: float = 0.0) -> Iterator[None]:
    """
    Send the jobs of a queue, or replace them, inside the context. Another process has `timeout` seconds to end, any
    number if it is negative. A queue on a file system that has no locks is used without.

    Raises:
        QueueBusyError: another process is sending them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / "lock", timeout=timeout, fallback_to_soft=False).acquire()
    except Timeout as error:
        raise QueueBusyError(
            f"Another process is sending {folder}: wait until it is done, or end the training run first."
        ) from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}). Make sure that no other process sends it.")
        yield
        return
    with held:
        yield


class UploadQueue:
    """
    Upload jobs, as folders of hard links and copies.

    One process adds jobs and one process, the holder of `lock`, sends them. Each may be killed at any time: a single
    rename adds, claims or removes a job. The first `add` creates the folder.

    Another user may have written the folder. `pending` has the jobs that are sent. It calls `approve` for a job that
    this user may not have queued, with the reasons, and leaves such a job out if there is no `approve`. `instead` has
    fields of [`Target`] that replace those of the jobs.

    Raises:
        ValueError: the folder, or a file in it that is written in place, is a link or something else.
    """

    def __init__(
        self,
        folder: Path,
        instead: Mapping[str, Any] | None = None,
        approve: Callable[[Job, str], bool] | None = None,
    ):
        for path, is_right in (
            (folder, Path.is_dir),
            (folder / "lock", Path.is_file),
            (folder / LOG_NAME, Path.is_file),
        ):
            if path.is_symlink() or (path.exists() and not is_right(path)):
                raise ValueError(f"{path} is a link or something else that is not followed. Delete it.")
        self.folder = folder
        self._instead, self._approve = dict(instead or {}), approve
        self._approved: dict[int, bool] = {}
        self._last = 0
        self._unwritten: dict[str, Any] | None = None

    # ---- The process that saves ----

    def clean(self) -> None:
        """Delete what a process that was killed in `add` has left. No other process may add jobs."""
        for scratch in self.folder.glob("new-*"):
            delete(scratch)

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
        if target not in (recorded := self.targets()):
            write_atomic(self.folder.parent / _TARGETS, json.dumps([asdict(known) for known in [*recorded, target]]))
        scratch = self.folder / f"new-{os.getpid()}"
        delete(scratch)
        try:
            stamps: dict[str, list[int] | None] = {}
            for name, source in files.items():
                copy = scratch / "files" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                once = write_once is not None and source.is_relative_to(write_once)
                linked = _link_or_copy(source, copy, link=once and source.stat().st_size >= _LINK_FROM)
                stat = copy.stat()
                stamps[name] = [stat.st_size, stat.st_mtime_ns] if linked else None
            job = Job(scratch, 0, step, message, target, list(slots), stamps)
            job.write()
            return self._number(job)
        except BaseException:
            delete(scratch)
            raise

    def _number(self, job: Job) -> Job:
        """Move a complete job to its place in the queue, under a number that was never used."""
        numbers = [number for number, _ in self.waiting()]
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
        if len(self.waiting()) < 2:
            return  # most saves find no other job, and training waits for this
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
        return replace(job, path=claimed)

    def release(self, job: Job) -> None:
        """Undo `claim`."""
        job.path.rename(self.released_path(job))

    def released_path(self, job: Job) -> Path:
        """Folder of the job while it is not claimed."""
        return job.path.with_suffix("")

    def finish_deletions(self) -> None:
        """Delete what a killed sender left half deleted. The caller holds the lock."""
        for path in self.folder.glob("old-*"):
            delete(path)

    def remove(self, job: Job) -> None:
        """Delete a job; the rename before it hides the job at once."""
        trash = job.path.with_name(f"old-{job.path.name}")
        try:
            job.path.rename(trash)
        except FileNotFoundError:
            return  # the other process was faster
        delete(trash)

    def keep_only(self, job: Job, name: str) -> None:
        """Reduce a job to one file of the root."""
        others = job.stats().keys() - {name}
        replace(job, slots=[""], stamps={name: job.stamps[name]}).write()
        for other in others:
            job.files()[other].unlink()

    # ---- Which jobs are sent ----

    def targets(self) -> list[Target]:
        """The repositories and branches that the run has recorded."""
        try:
            return check(json.loads(read_plain(self.folder.parent / _TARGETS)), list[Target], _TARGETS)
        except (FileNotFoundError, ValueError, RecursionError):
            return []

    def destination(self, job: Job) -> Target | None:
        """
        Where a job is sent. What `job.json` says counts only if the run has recorded the same target. `None` if
        neither the record nor the command line names the repository.
        """
        if job.target in self.targets():
            return replace(job.target, **self._instead)
        return Target(**self._instead) if "repo_id" in self._instead else None

    def _judged(self) -> tuple[list[tuple[Job, str | None]], list[str]]:
        """As `_read`, each job with the reason why it may not be sent, or `None` if it may."""
        jobs, problems = self._read()
        names = self.count_names() if jobs else Counter()
        return [(job, self._refusal(job, names)) for job in jobs], problems

    def _refusal(self, job: Job, names: Counter[int]) -> str | None:
        """The reason of one job; `names` as for `doubts`."""
        try:
            if self.destination(job) is None:
                return f"{job.path} names {job.target!r}, which this run has not recorded. Pass --repo to send it."
            record = [self.folder.parent / _TARGETS] * (job.target in self.targets())
            others = [job.path, job.path / "files", job.path / "job.json", *record]
            doubts = self.doubts(names, job.stats(), others)
            if doubts:  # the count misses a checkpoint that rotation moves at that moment
                doubts = self.doubts(self.count_names(), job.stats(), others)
        except (OSError, RefusedJobError) as error:
            return str(error)[:500] if job.path.exists() else None  # another process has moved the job
        if doubts and self._approve is not None and job.number not in self._approved:
            self._approved[job.number] = self._approve(job, doubts)
        if doubts and not self._approved.get(job.number):
            return f"{job.path} may not be yours: {doubts}. Check its files, and send it with hf-nexus push --yes."
        return None

    def count_names(self) -> Counter[int]:
        """Of each file of the run, by inode, how many names it has there. Rotation may delete some at any time."""
        return Counter(_inodes(self.folder.parent))

    def doubts(self, names: Counter[int], stats: Mapping[str, os.stat_result], others: Iterable[Path] = ()) -> str:
        """
        Why another user may have written files, or linked them to files that are not part of the run; empty if there
        is no reason. The `names` were counted before the `stats` were read. Of the `others`, only the owner matters.
        """
        owners = {stat.st_uid for stat in (*stats.values(), *(path.lstat() for path in others))}
        doubts = [f"it belongs to the user {owner}" for owner in sorted(owners - {self._owner})]
        linked = [name for name, stat in stats.items() if stat.st_nlink > 1]
        # The run's checkpoints have other names of the file.
        outside = [name for name in linked if stats[name].st_nlink > names[stats[name].st_ino]]
        doubts += [f"{name} is also a file outside of {self.folder.parent}" for name in outside]
        return ", ".join(doubts)

    @cached_property
    def _owner(self) -> int:
        """The owner of files that this process writes here. Network disks may replace the user."""
        with tempfile.TemporaryFile(dir=self.folder.parent) as file:
            return os.fstat(file.fileno()).st_uid

    # ---- Both processes ----

    def waiting(self) -> list[tuple[int, int]]:
        """Number and training step of the jobs, oldest first, by the names of their folders."""
        matches = filter(None, map(_JOB.fullmatch, self._names()))
        return sorted({(int(match[1]), int(match[2])) for match in matches})  # a set: one may be claimed meanwhile

    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        return self._read()[0]

    def _read(self) -> tuple[list[Job], list[str]]:
        """All jobs, oldest first, and of each folder that should be a job and is not, the reason."""
        names = self._names()
        while True:
            jobs: list[Job] = []
            problems = []
            for name in sorted(names):
                try:
                    jobs += filter(None, [Job.read(self.folder / name)])
                except ValueError as error:
                    problems.append(str(error))
            before, names = names, self._names()
            if names == before:  # otherwise a job was claimed in between, and may have been missed under both names
                return sorted(jobs, key=lambda job: job.number), problems

    def refused(self) -> list[str]:
        """Why jobs may not be sent."""
        judged, problems = self._judged()
        return [*problems, *(why for _, why in judged if why is not None)]

    def pending(self) -> list[tuple[Job, tuple[str, ...]]]:
        """
        The jobs that may be sent, newest first, each with those of its slots that no newer of them, sent or queued,
        replaces.
        """
        covered = {target: dict(slots) for target, slots in self.state().get("sent", {}).items()}
        found = []
        for job in reversed([job for job, why in self._judged()[0] if why is None]):
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
            found = json.loads(read_plain(self.folder / "state.json"))
            state = {key: check(found[key], kind, key) for key, (kind, _) in _STATE.items() if key in found}
            return state if all(_STATE[key][1] <= set(value) for key, value in state.items()) else {}
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return {}

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace the state; on a full disk, keep it in memory and raise `OSError`."""
        self._unwritten = state
        write_atomic(self.folder / "state.json", json.dumps(state))
        self._unwritten = None


def _inodes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(parent, name)).st_ino


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
    """What is on the Hub and what is not, as plain data."""

    target: str  # repository and branch, "user/name@branch"
    pushed_step: int | None  # training step of the model on the Hub
    commit: str | None  # of that model
    waiting: tuple[int, ...]  # training steps of the queued jobs, oldest first
    error: str | None  # the last of the upload
    permanent: bool  # whether the error stays until a user acts
    lost: tuple[str, ...] = ()  # jobs whose files were changed before they were sent, with the reason
    refused: tuple[str, ...] = ()  # folders of the queue that were not sent, with the reason
    unqueued: tuple[str, ...] = ()  # why saves could not be queued

    @classmethod
    def read(cls, folder: Path, target: str = "") -> "QueueStatus":
        """Read the status from the folder of a queue."""
        queue = UploadQueue(folder)
        # Before the state: a job is noted there, then removed. It is sent or waits, also if that happens now.
        waiting = tuple(step for _, step in queue.waiting())
        state = queue.state()
        pushed, error = state.get("pushed"), state.get("error", {})
        if pushed is not None:
            target = f"{pushed['repo_id']}@{pushed['revision'] or 'main'}"
        elif not target and (jobs := queue.jobs()):
            target = str(jobs[-1].target)
        return cls(
            target=printable(target),
            pushed_step=pushed and pushed["step"],
            commit=pushed and pushed["commit"],
            waiting=waiting,
            error=printable(error["text"]) if error else None,
            permanent=bool(error.get("permanent")),
            lost=tuple(map(printable, state.get("lost", ()))),
            refused=tuple(map(printable, state.get("refused", ()))),
        )

    @property
    def complete(self) -> bool:
        """Whether every queued job was sent or replaced."""
        return not self.waiting and not self.refused and not self.unqueued

    def logs(self) -> dict[str, int]:
        """Numbers for the training log."""
        logs = {"hub/pending": len(self.waiting) + len(self.unqueued)}
        return logs if self.pushed_step is None else {**logs, "hub/pushed_step": self.pushed_step}

    def line(self, output_dir: str | os.PathLike[str]) -> str:
        """One line: what is on the Hub, what is missing and why, and the command that sends it."""
        step = "nothing" if self.pushed_step is None else f"step {self.pushed_step}"
        line = f"On the Hub ({self.target}): {step}."
        if self.waiting:
            steps = ", ".join(str(step) for step in self.waiting)
            why = f" ({self.error})" if self.error and not self.refused else ""
            push = shlex.join(["hf-nexus", "push", str(output_dir)])
            line += f" Not yet on the Hub: step {steps}{why}. Send the rest with: {push}"
        if self.lost:
            line += f" Lost: {'; '.join(self.lost)}"
        if self.refused:
            line += f" Refused: {' '.join(self.refused)}"
        if self.unqueued:
            line += f" Not queued, only in {output_dir}: {'; '.join(self.unqueued)}."
        return line
