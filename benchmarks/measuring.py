"""Time and memory of arms in one case, measured in this process or on two ranks that it starts."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from allocations import measure_memory
from arms import ARMS, Case
from timing import Seconds, measure_time

__all__ = ["RANKS", "Measurement", "measure", "ranks_on_gpu"]

RANKS = 2


@dataclass
class Measurement:
    """Time and memory of the first rank."""

    rounds: list[dict[str, Seconds]]  # per round and arm: time of one outer step
    memory: dict[str, tuple[int, int | None]]  # per arm: bytes held after an outer step, and peak if known


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
    if launches != {""} and not dist.is_torchelastic_launched():
        return _measure_on_ranks(case, arms, repeats, limit)
    memory = {arm: measure_memory(case, arm) for arm in arms}
    gc.collect()
    return Measurement(measure_time(case, arms, repeats, limit, threads), memory)


def ranks_on_gpu() -> bool:
    """Whether there is a GPU for each rank. If not, the ranks run on the CPU."""
    return torch.cuda.device_count() >= RANKS


def _measure_on_ranks(case: Case, arms: list[str], repeats: int | None, limit: float) -> Measurement:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not ranks_on_gpu():
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "measured.json")
        request = json.dumps({"case": asdict(case), "arms": arms, "repeats": repeats, "limit": limit})
        command = [sys.executable, *launcher, __file__, request, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"The {RANKS} ranks for {arms} failed:\n{done.stderr[-4000:]}")
        return Measurement(**json.loads(path.read_text()))


def main() -> None:
    """Measure on this rank."""
    request = json.loads(sys.argv[1])
    measurement = measure(Case(**request.pop("case")), **request, threads=1)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(asdict(measurement)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
