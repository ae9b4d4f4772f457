"""Time and memory of some arms in one case: in this process, or on two ranks that it starts."""

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

__all__ = ["RANKS", "Measured", "measure", "ranks_on_gpu"]

RANKS = 2


@dataclass
class Measured:
    """
    Args:
        rounds (`list[dict[str, Seconds]]`):
            In each round the time of one outer step of each arm.
        memory (`dict[str, tuple[int, int | None]]`):
            Of each arm the bytes held after an outer step, and the most that were held at once (not known of several
            CPU processes). On several ranks those of the first.
    """

    rounds: list[dict[str, Seconds]]
    memory: dict[str, tuple[int, int | None]]


def measure(case: Case, arms: list[str], repeats: int | None, limit: float, threads: int) -> Measured:
    """
    Run the arms, all of them of the same launch.

    Args:
        repeats (`int`, *optional*):
            Rounds, instead of a time limit.
        limit (`float`):
            Seconds for the timed rounds; at least 5 rounds are run.
        threads (`int`):
            Of the CPU, where there is one process; each of several ranks has one.

    Raises:
        RuntimeError: the ranks failed; with what they said.
    """
    launches = {ARMS[arm].launch for arm in arms}
    assert len(launches) == 1, f"{arms} are launched in {len(launches)} ways"
    if launches != {""} and not dist.is_torchelastic_launched():
        return _measure_on_ranks(case, arms, repeats, limit)
    memory = {arm: measure_memory(case, arm) for arm in arms}
    gc.collect()
    return Measured(measure_time(case, arms, repeats, limit, threads), memory)


def ranks_on_gpu() -> bool:
    """Whether there is a GPU for each rank; if not, the ranks are processes of the CPU."""
    return torch.cuda.device_count() >= RANKS


def _measure_on_ranks(case: Case, arms: list[str], repeats: int | None, limit: float) -> Measured:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not ranks_on_gpu():
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "measured.json")
        task = json.dumps({"case": asdict(case), "arms": arms, "repeats": repeats, "limit": limit})
        command = [sys.executable, *launcher, __file__, task, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"The {RANKS} ranks for {arms} failed:\n{done.stderr[-4000:]}")
        return Measured(**json.loads(path.read_text()))


def main() -> None:
    """One rank."""
    task = json.loads(sys.argv[1])
    measured = measure(Case(**task["case"]), task["arms"], task["repeats"], task["limit"], threads=1)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(asdict(measured)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
