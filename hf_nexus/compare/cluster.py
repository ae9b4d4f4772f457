"""Function calls as jobs of a cluster, such as one with Slurm, through submitit."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import Checkpointable, TorchDistributedEnvironment, as_completed

from ..files import read_json, write_atomic
from ..trainer.loader_workers import keep_from_forkserver
from .workers import Call, CallResult, call_on_rank

__all__ = ["call_in_jobs", "make_executor"]

_JOBS_NAME = "submitted.json"
_CONSTRUCTED = ("slurm_max_num_timeout", "slurm_python")  # parameters of the executor itself
_QUEUE_SECONDS = 15.0  # between two looks at the queue, and for a shared file to appear


class _Job(Checkpointable):
    """
    A call by all tasks of a job. A job that is preempted, or reaches its time limit, is queued again: a run then goes
    on from its last checkpoint.
    """

    def __init__(self, call: Call):
        self.call = call

    def __call__(self) -> Any:
        _keep_signal_to_this_process(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
        preempted: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: preempted.append(number))
        if self.call.devices > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            return call_on_rank(self.call)
        except Exception:
            time.sleep(1)  # processes that read data may get the signal first
            if preempted:  # the job is queued again, and an error would be its result
                raise SystemExit(128 + signal.SIGTERM) from None
            raise

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Queue the job again. It is about to end: that a process which reads data ends first is no error."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return super().checkpoint(*args, **kwargs)


def _keep_signal_to_this_process(number: int) -> None:
    """
    Let processes that read data ignore the signal before a time limit, which Slurm sends to all processes of a job.
    They would inherit submitit's handler and queue the job again, too: the second request fails, and with it the run.
    """
    if multiprocessing.get_all_start_methods()[0] == "forkserver":  # from Python 3.14
        keep_from_forkserver(number)
    os.register_at_fork(after_in_child=lambda: signal.signal(number, signal.SIG_IGN))


def make_executor(
    folder: Path, parameters: Mapping[str, Any], devices: int = 1, accelerators: bool = True
) -> submitit.AutoExecutor:
    """
    An executor of submitit whose jobs have a task for each device: an accelerator, or a process on the CPU. All
    machines share `folder`, which has the files of submitit.

    Raises:
        ValueError: parameters that submitit does not know, or nodes that cannot share the devices equally.
    """
    given = dict(parameters)
    cluster, nodes = given.pop("cluster", None), given.pop("nodes", 1) if devices > 1 else 1
    given.pop("nodes", None)
    if "timeout_min" not in given:
        raise ValueError("submitit.timeout_min: missing. Set the time limit of a job, in minutes.")
    for key in {"tasks_per_node", "gpus_per_node"} & set(given):
        raise ValueError(f"submitit.{key}: devices_per_run sets it. Remove it.")
    if devices % nodes:
        raise ValueError(f"submitit.nodes: {nodes} cannot share {devices} devices (devices_per_run) equally.")
    constructed = {key: given.pop(key) for key in _CONSTRUCTED if key in given}
    own = {"nodes": nodes, "tasks_per_node": devices // nodes, "name": "hf-nexus"}
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, **constructed)
        executor.update_parameters(**own, gpus_per_node=devices // nodes if accelerators else None, **given)
    except (AssertionError, NameError, RuntimeError, TypeError) as error:
        raise ValueError(f"submitit: {error}") from error
    return executor


def call_in_jobs(calls: Sequence[Call], executor: submitit.AutoExecutor) -> Iterator[CallResult]:
    """
    Submit each call as a job, unless Slurm still has a job of an earlier command that makes it. Yield each result when
    it is there. The jobs go on if this process ends.
    """
    jobs: dict[str, Any] = dict(_still_queued(executor.folder))
    new = [call for call in calls if call.name not in jobs]
    if new:
        with executor.batch():
            submitted = [executor.submit(_Job(call)) for call in new]
        jobs |= {call.name: job for call, job in zip(new, submitted, strict=True)}
    mine = {jobs[call.name]: call for call in calls}
    ended: Iterator[Any]
    if not all(isinstance(job, submitit.SlurmJob) for job in mine):
        ended = as_completed([*mine], poll_frequency=1)
    else:
        names = {call.name: [job.job_id, job.num_tasks] for job, call in mine.items()}
        write_atomic(executor.folder / _JOBS_NAME, json.dumps(names))
        ended = _ended([*mine])
    for job in ended:
        first = job.task(0)  # another rank may have left an error when the job was queued again
        if isinstance(job, submitit.SlurmJob) and not _has_result(job):
            error = f"job {job.job_id} left no result (cancelled, or out of memory or time); see {first.paths.stderr}"
            yield CallResult(mine[job], error=error)
        elif (failure := first.exception()) is not None:
            yield CallResult(mine[job], error=_failure(failure))
        else:
            yield CallResult(mine[job], first.result())


def _still_queued(folder: Path) -> dict[str, submitit.SlurmJob]:
    """The jobs of the last command that have neither ended nor failed, by the name of their call."""
    path = folder / _JOBS_NAME
    remedy = "Delete it when the jobs of the earlier command have ended."
    submitted = read_json(path, remedy) if path.exists() else {}
    queued = _queue([number for number, _ in submitted.values()]) if submitted else set()
    jobs: dict[str, submitit.SlurmJob] = {
        name: submitit.SlurmJob(folder, number, [*range(tasks)])
        for name, (number, tasks) in submitted.items()
        if number in queued
    }
    # Other tasks of a failed one may wait for it for long.
    return {name: job for name, job in jobs.items() if not (_has_result(job) and job.task(0).exception())}


def _ended(jobs: list[submitit.SlurmJob]) -> Iterator[submitit.SlurmJob]:
    """Each job when it has a result, or has left the queue. submitit asks for accounting, which may be off."""
    looked, gone = time.monotonic(), set[str]()
    while jobs:
        done = [job for job in jobs if _has_result(job)]
        if not done and time.monotonic() - looked > _QUEUE_SECONDS:
            missing = {job.job_id for job in jobs} - _queue([job.job_id for job in jobs])
            done = [job for job in jobs if job.job_id in gone & missing]  # in two looks: its files may be late
            looked, gone = time.monotonic(), missing
        for job in done:
            jobs.remove(job)
            yield job
        if not done:
            time.sleep(1)


def _has_result(job: submitit.Job) -> bool:
    return job.task(0).paths.result_pickle.exists()


def _queue(ids: Sequence[str]) -> set[str]:
    """Those of the jobs that wait or run, or all of them if Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    try:
        return {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()} & {*ids}
    except (OSError, subprocess.CalledProcessError):
        return {*ids}


def _failure(error: Exception) -> str:
    """The last line of the traceback in the job, or what submitit knows of a job that left none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    ends = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    return lines[ends[1] - 1] if len(ends) > 1 else " ".join(lines[:2])
