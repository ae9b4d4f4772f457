"""Function calls in worker processes, each bound to its devices."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

from ..files import printable

__all__ = ["Call", "CallResult", "call_in_workers", "call_on_rank", "worker_count"]

_PARENT_CHECK_SECONDS = 1.0
# The variables that choose among the devices of a type other than CUDA, as in Accelerate's launcher.
_VISIBLE = {"xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
_KILLED = "the process was killed (out of memory?)"


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
    Make calls in worker processes and yield each result when it is there. A failed call does not stop the others. One
    whose process was killed is made again alone, after the others: they may have needed the memory.

    All calls have the same number of devices. `workers` calls are made at a time, each with its own accelerators or an
    equal number of cores.
    """
    threads = max(1, (os.cpu_count() or 1) // (workers * calls[0].devices))
    every, killed = [_Worker(devices, threads) for devices in _devices(workers, calls[0].devices)], []
    for result in _results(calls, every):
        if result.error == _KILLED:
            killed.append(result.call)
        else:
            yield result
    for call in killed:
        yield from _results([call], every[:1])


def _results(calls: Sequence[Call], workers: "list[_Worker]") -> Iterator[CallResult]:
    """Make each call once. The processes of all workers have ended after it."""
    left, idle = deque(calls), [*workers]
    busy: dict[Any, tuple[_Worker, Call]] = {}
    try:
        while left or busy:
            while left and idle:
                worker, call = idle.pop(), left.popleft()
                worker.start(call)
                busy[worker.pipe] = worker, call
            for worker in idle:
                worker.end()  # the others may need its memory
            for pipe in wait(busy):
                worker, call = busy.pop(pipe)
                idle.append(worker)
                yield worker.result(call)
    finally:
        for worker in workers:
            worker.end(now=bool(left or busy))  # interrupted: a run that has not finished is made again
        for worker in workers:
            worker.join()


class _Worker:
    """A process that makes one call at a time on its devices."""

    def __init__(self, *settings: Any):
        self._settings = settings
        self._process: Any = None
        self.pipe: Any = None  # is ready when a call has ended, or the process

    def start(self, call: Call) -> None:
        if self._process is None:
            # Not "fork": a forked process cannot use CUDA, and threads of the parent may hold locks.
            context: Any = multiprocessing.get_context("spawn")
            self.pipe, others_end = context.Pipe()
            self._process = context.Process(target=_make_calls, args=(others_end, *self._settings))
            self._process.start()
            others_end.close()
        with suppress(OSError):  # it was killed, as `result` finds
            self.pipe.send(call)

    def result(self, call: Call) -> CallResult:
        """The result of the call in progress."""
        try:
            return CallResult(call, *self.pipe.recv())
        except (EOFError, OSError):
            self.end()
            self.join()
            return CallResult(call, error=_KILLED)

    def end(self, now: bool = False) -> None:
        """Let the process end after its call, or `now`, without waiting for it."""
        if self._process is not None:
            self.pipe.close()
            if now:
                self._process.terminate()

    def join(self) -> None:
        """Wait for the end of the process. The next call starts another."""
        if self._process is not None:
            self._process.join()
            self._process = None


def _devices(workers: int, each: int) -> list[dict[str, str]]:
    """The variable of each worker's environment that shows it only its accelerators; empty without accelerators."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [{}] * workers
    count, variable = torch.accelerator.device_count(), _VISIBLE.get(accelerator.type, "CUDA_VISIBLE_DEVICES")
    if torch.version.hip and os.environ.get("HIP_VISIBLE_DEVICES"):  # which ROCm prefers
        variable = "HIP_VISIBLE_DEVICES"
    visible = os.environ.get(variable)
    ids = visible.split(",") if visible else [str(i) for i in range(count)]
    chosen = [[ids[(worker * each + i) % count] for i in range(each)] for worker in range(workers)]
    return [{variable: ",".join(of_worker)} for of_worker in chosen]


def _make_calls(pipe: Any, devices: dict[str, str], threads: int) -> None:
    """
    Make the calls of a worker. Devices are chosen before anything initializes them. Ctrl-C is ignored: the parent ends
    its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        # The parent notices the end of this process by the pipe, which a forked process would keep open.
        os.register_at_fork(after_in_child=pipe.close)
    _start_processes_as_usual()
    parent: Any = multiprocessing.parent_process()  # getppid() is another process if the parent has ended already
    Thread(target=_exit_without, args=(parent.pid,), daemon=True).start()
    os.environ.update(devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that this one starts
    import torch

    torch.set_num_threads(threads)
    with suppress(EOFError):  # there are no more calls
        while True:
            call = pipe.recv()
            try:
                pipe.send((_call_on_devices(call), None))
            except BaseException as error:  # also one that exits
                pipe.send((None, f"{type(error).__name__}: {printable(error)}"))


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
