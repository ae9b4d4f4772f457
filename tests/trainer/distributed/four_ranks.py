"""Run on four CPU processes: all scenarios in one launch, because a launch is slow."""

from pathlib import Path

from tests.support.launcher import report
from tests.trainer.distributed import layouts_worker, node_worker

WORKERS = {"node": node_worker.main, "layouts": layouts_worker.main}


def main(out: Path) -> None:
    found = {}
    for name, work in WORKERS.items():
        (out / name).mkdir(exist_ok=True)
        found[name] = work(out / name)
    report(found, out)
