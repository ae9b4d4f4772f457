"""Function calls as jobs of a cluster, such as one with Slurm, through submitit."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import Checkpointable, TorchDistributedEnvironment, as_completed

from .workers import Call, CallResult, call_on_rank

__all__ = ["call_in_jobs", "make_executor"]


class _Job(Checkpointable):
    """
    A call by all tasks of a job. A job that is preempted, or reaches its time limit, is queued again: a run then goes
    on from its last checkpoint.
    """

    def __init__(self, call: Call):
        self.call = call

    def __call__(self) -> Any:
        if self.call.devices > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return call_on_rank(self.call)


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
    own = {"nodes": nodes, "tasks_per_node": devices // nodes, "name": "hf-nexus"}
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**own, gpus_per_node=devices // nodes if accelerators else None, **given)
    except (AssertionError, NameError, RuntimeError, TypeError) as error:
        raise ValueError(f"submitit: {error}") from error
    return executor


def call_in_jobs(calls: Sequence[Call], executor: submitit.AutoExecutor) -> Iterator[CallResult]:
    """Submit each call as a job, and yield each result when it is there. The jobs go on if this process ends."""
    with executor.batch():
        jobs = [executor.submit(_Job(call)) for call in calls]
    for job in as_completed(jobs, poll_frequency=1):
        call = calls[jobs.index(job)]
        error = job.exception()
        yield CallResult(call, job.results()[0]) if error is None else CallResult(call, error=_failure(error))


def _failure(error: Exception) -> str:
    """The last line of the traceback in the job, or what submitit knows of a job that left none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    ends = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    return lines[ends[1] - 1] if len(ends) > 1 else " ".join(lines[:2])
