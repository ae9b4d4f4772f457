"""Function calls in worker processes, each bound to its devices."""

import multiprocessing
import os
import signal
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
from uuid import uuid4

from ..files import printable

__all__ = ["Call", "CallResult", "call_in_workers", "call_on_rank", "worker_count"]

_PARENT_CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class Call:
    """A function call for a worker process."""

    name: str
    function: Callable[[], Any]  # can be pickled
    log: Path  # its output is appended here
    devices: int = 1  # processes that make it together, one on each device


@dataclass(frozen=True)
class CallResult:
    """The value that a call returned, or its error in one line."""

    call: Call
    value: Any = None
    error: str | None = None


def worker_count(wanted: int | None, devices: int = 1) -> int:
    """Number of workers of so many devices: `wanted` if given, else as many as there are devices, or cores."""
    import torch

    if wanted is not None:
        return wanted
    return max(1, (torch.accelerator.device_count() or os.cpu_count() or 1) // devices)


def call_in_workers(calls: Sequence[Call], workers: int) -> Iterator[CallResult]:
    """
    Make calls in worker processes and yield each result when it is there. A failed call does not stop the others.

    All calls have the same number of devices. `workers` calls are made at a time, each with its own accelerators or an
    equal number of cores.
    """
    left = list(calls)
    try:
        for result in _call_in_pool(calls, workers):
            left.remove(result.call)
            yield result
    except BrokenProcessPool:  # a dead worker breaks the whole pool; only a call alone in its pool shows which it was
        for call in left:
            try:
                yield from _call_in_pool([call], 1)
            except BrokenProcessPool:
                yield CallResult(call, error="the process was killed (out of memory?)")


def _call_in_pool(calls: Sequence[Call], workers: int) -> Iterator[CallResult]:
    # Not "fork": a forked process cannot use CUDA, and threads of the parent may hold locks.
    context = multiprocessing.get_context("spawn")
    devices, processes = context.Queue(), calls[0].devices
    for device in _devices(workers, processes):
        devices.put(device)
    threads = max(1, (os.cpu_count() or 1) // (workers * processes))
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(devices, threads))
    try:
        futures = {pool.submit(_call_on_devices, call): call for call in calls}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            if error is None:
                yield CallResult(futures[future], future.result())
            else:
                message = f"{type(error).__name__}: {printable(error)}"
                yield CallResult(futures[future], error=message)
    except (KeyboardInterrupt, GeneratorExit):  # a run that has not finished is made again
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _devices(workers: int, each: int) -> list[str | None]:
    """The accelerators of each worker, by their ids in `CUDA_VISIBLE_DEVICES`; `None` without accelerators."""
    import torch

    count = torch.accelerator.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(i) for i in range(count)]
    return [
        ",".join(ids[(worker * each + i) % count] for i in range(each)) if count else None for worker in range(workers)
    ]


def _start_worker(devices: Any, threads: int) -> None:
    """Choose the devices before anything initializes them, and ignore Ctrl-C: the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _start_processes_as_usual()
    Thread(target=_exit_without, args=(os.getppid(),), daemon=True).start()
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that this one starts
    import torch

    torch.set_num_threads(threads)


def _start_processes_as_usual() -> None:
    """A spawned process spawns, too: the workers of each data loader would import torch for seconds."""
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the platform's default


def _exit_without(parent: int) -> None:
    """Exit when the parent was killed: the same command, started again, would train into the same folders."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def _call_on_devices(call: Call) -> Any:
    """Make a call here, or as `torchrun --standalone` does in a new process on each device."""
    if call.devices == 1:
        return _call_logged(call)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launched: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    config = LaunchConfig(1, 1, call.devices, run_id=uuid4().hex, max_restarts=0, **launched)
    try:
        return elastic_launch(config, call_on_rank)(call)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message
        reason = message["message"] if isinstance(message, dict) else message
        raise RuntimeError(f"rank {rank}: {reason}") from None


def call_on_rank(call: Call) -> Any:
    """Make a call in one of the processes that make it together, and leave their group."""
    from ..pretrain.run import leaving_process_group

    _start_processes_as_usual()
    with leaving_process_group():
        return _call_logged(call)


def _call_logged(call: Call) -> Any:
    call.log.parent.mkdir(parents=True, exist_ok=True)
    with call.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return call.function()
        except BaseException:
            traceback.print_exc()
            raise
