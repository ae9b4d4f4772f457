"""Run on four CPU processes: all scenarios in one launch, because a launch is slow."""

from pathlib import Path

from tests.support.launcher import report
from tests.trainer.distributed import fsdp_worker, layouts_worker, node_worker

# Those with FSDP come last, because they pretend that there are accelerators.
WORKERS = {"node": node_worker.main, "layouts": layouts_worker.main, "hybrid": fsdp_worker.four_ranks}


def main(out: Path) -> None:
    found = {}
    for name, work in WORKERS.items():
        (out / name).mkdir(exist_ok=True)
        found[name] = work(out / name)
    report(found, out)
