"""
Starts worker modules on several ranks and collects the results of each rank.

    python -m tests.support.launcher MODULE RANKS OUT     # as torchrun does, but with one import for all ranks
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.support.garbage import freeze

ROOT = Path(__file__).parents[2]


def launch(module: str, ranks: int, out: Path, torchrun: bool = False) -> list[dict]:
    """
    Run `module.main(out)` on `ranks` CPU processes; returns the contents of each rank's `rank<r>.json`. Under
    `torchrun` they can be restarted, and end as other programs do: forked ones leave out what Python does at its exit.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = ["tests.support.launcher", module, str(ranks), str(out)]
    if torchrun:
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m", module, str(out)]
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return reports(out, ranks)


def main(module: str, ranks: int, out: Path) -> int:
    """Import a worker, and fork its ranks. The first that fails ends the others; returns its exit status."""
    worker = importlib.import_module(module)
    freeze()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_fork(worker.main, rank, ranks, port, out) for rank in range(ranks)]
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status:
            for other in processes:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def _fork(work: Any, rank: int, ranks: int, port: int, out: Path) -> int:
    """Start a process with the environment of a rank; returns its id."""
    if process := os.fork():
        return process
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in sizes.items()}}
    status = 1
    try:
        work(out)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
