"""Time and memory of arms in one case, measured in this process, in another, or on ranks that it starts."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from allocations import measure_memory
from arms import ARMS, CUDA, Case
from timing import Seconds, measure_time

__all__ = ["RANKS", "Measurement", "OutOfMemory", "measure", "measure_apart", "on_gpu"]

RANKS = 2


@dataclass
class Measurement:
    """Time and memory of the first rank."""

    rounds: list[dict[str, Seconds]]  # per round and arm: time of one outer step
    memory: dict[str, tuple[int, int | None]]  # per arm: bytes held after an outer step, and peak if known


class OutOfMemory(RuntimeError):
    """A process that measures has run out of memory."""


def measure(case: Case, arms: list[str], repeats: int | None, limit: float, threads: int) -> Measurement:
    """
    Measure arms that share a launch.

    Args:
        repeats (`int`, *optional*):
            Number of rounds. Defaults to as many as fit into `limit` seconds, at least 5.
        limit (`float`):
            Time limit of the rounds, in seconds.
        threads (`int`):
            CPU threads of a single process. Ranks have one thread each.

    Raises:
        RuntimeError: a rank failed. The message ends with its error output.
    """
    launches = {ARMS[arm].launch for arm in arms}
    assert len(launches) == 1, f"{arms} have {len(launches)} different launches"
    if launches != {""}:
        return measure_apart(case, arms, repeats, limit, ranks=RANKS)
    return _measure_here(case, arms, repeats, limit, threads)


def measure_apart(
    case: Case,
    arms: list[str],
    repeats: int | None,
    limit: float,
    *,
    ranks: int | None = None,
    timeout: float | None = None,
) -> Measurement:
    """
    Measure as `measure` does in another process with one thread, or on a number of ranks. All memory is free again
    when it ends.

    Raises:
        OutOfMemory: the memory of the device or of the machine was not enough.
        TimeoutExpired: it was ended after `timeout` seconds.
        RuntimeError: it failed for another reason. The message ends with its error output.
    """
    environment, launcher = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    if ranks is not None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if not on_gpu(ranks):
            environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "measured.json")
        request = json.dumps({"case": asdict(case), "arms": arms, "repeats": repeats, "limit": limit})
        command = [sys.executable, *launcher, __file__, request, str(path)]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                _, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.terminate()  # a launcher then ends its ranks, which are in other process groups
                try:
                    process.communicate(timeout=40)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        if process.returncode == 0:
            return Measurement(**json.loads(path.read_text()))
    where = f"{ranks} rank(s)" if ranks else "The process"
    message = f"{where} for {arms} failed with status {process.returncode}:\n{errors[-4000:]}"
    killed = process.returncode == -signal.SIGKILL  # by a system without memory
    if killed or any(sign in errors for sign in ("OutOfMemoryError", "out of memory", "can't allocate memory")):
        raise OutOfMemory(message)
    raise RuntimeError(message)


def on_gpu(ranks: int) -> bool:
    """Whether there is a GPU for each rank. If not, the ranks run on the CPU."""
    return torch.cuda.device_count() >= ranks


def _measure_here(case: Case, arms: list[str], repeats: int | None, limit: float, threads: int) -> Measurement:
    memory = {arm: measure_memory(case, arm) for arm in arms}
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()  # in blocks of other sizes than those of the next models
    return Measurement(measure_time(case, arms, repeats, limit, threads), memory)


def main() -> None:
    """Measure on this rank."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    measurement = _measure_here(Case(**request.pop("case")), **request, threads=1)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(asdict(measurement)))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
