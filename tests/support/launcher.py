"""Starts worker modules under torchrun and collects the results of each rank."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def launch(module: str, ranks: int, out: Path) -> list[dict]:
    """Run `python -m module out` on `ranks` CPU processes; returns the contents of each rank's `rank<r>.json`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command += ["-m", module, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return reports(out, ranks)


def report(found: Any, out: Path) -> None:
    """
    Write what this rank found, and leave the process group: the last that a worker does. Its trainers must be gone: as
    the last owner of the group, DDP would wait forever for the threads of the group.
    """
    gc.collect()
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def reports(out: Path, ranks: int) -> list[Any]:
    """Read the results of the ranks."""
    return [json.loads((out / f"rank{r}.json").read_text()) for r in range(ranks)]
