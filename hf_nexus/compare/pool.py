"""Many jobs over the devices that there are, each job in a process of its own device."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

__all__ = ["Job", "Outcome", "run_jobs", "worker_count"]

_WATCH = 1.0  # seconds between two looks at whether the parent is still there


@dataclass(frozen=True)
class Job:
    """
    Something to do in another process.

    Args:
        name (`str`):
            What it is called.
        function (`Callable[[], Any]`):
            Picklable.
        log (`Path`):
            File for what it prints.
    """

    name: str
    function: Callable[[], Any]
    log: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its `result`, or the `error` in words."""

    job: Job
    result: Any = None
    error: str | None = None


def worker_count(wanted: int | None) -> int:
    """Processes to work with: as many as wanted, else one per device, else one per core."""
    import torch

    if wanted is not None:
        return wanted
    return max(1, torch.accelerator.device_count() if torch.accelerator.is_available() else (os.cpu_count() or 1))


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """
    Run jobs, several at a time, and yield each outcome as it comes. A job that fails does not stop the others.

    Args:
        jobs (`Sequence[Job]`):
            In the order in which they are begun.
        workers (`int`):
            Processes. Each keeps to one accelerator, or to its share of the cores.

    Example:
        >>> from functools import partial
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.compare.pool import Job, run_jobs
        >>> jobs = [Job("sum", partial(sum, [1, 2]), Path(mkdtemp(), "log.txt"))]
        >>> [outcome.result for outcome in run_jobs(jobs, workers=1)]  # doctest: +SKIP
        [3]
    """
    left = list(jobs)
    if not left:
        return
    try:
        for outcome in _run_once(left, min(workers, len(left))):
            left.remove(outcome.job)
            yield outcome
    except BrokenProcessPool:  # a worker died, and with it the pool: which job it was shows when each is alone
        for job in left:
            try:
                yield from _run_once([job], 1)
            except BrokenProcessPool:
                yield Outcome(job, error="its process died without a word (was it out of memory?)")


def _run_once(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    # Not by fork: a child could not use CUDA, and threads of the parent may hold locks.
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in _places(workers):
        places.put(place)
    pool = ProcessPoolExecutor(workers, context, initializer=_settle, initargs=(places,))
    try:
        futures = {pool.submit(_run_logged, job): job for job in jobs}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            words = None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield Outcome(futures[future], None if error else future.result(), words)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _places(workers: int) -> list[tuple[str | None, int]]:
    """For each worker the accelerator that it sees, if there are any, and its number of threads."""
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    threads = max(1, (os.cpu_count() or 1) // workers)
    return [(names[i % count] if count else None, threads) for i in range(workers)]


def _settle(places: Any) -> None:
    """Choose the worker's place before anything touches a device."""
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    device, threads = places.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(threads)


def _end_with(parent: int) -> None:
    """Do not outlive a parent that was killed: a second one would train into the same folders."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


def _run_logged(job: Job) -> Any:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return job.function()
        except BaseException:
            traceback.print_exc()
            raise
