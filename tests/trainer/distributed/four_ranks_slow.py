"""Run on four CPU processes: the scenarios of slow tests in one launch."""

from pathlib import Path

import torch.distributed as dist

from tests.support.launcher import report
from tests.trainer.distributed import fsdp_worker, layouts_worker, node_worker


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    # Those with FSDP come last, because they pretend that there are accelerators.
    works = {"node": node_worker.further, **layouts_worker.SLOW, "tensor": layouts_worker.tensor}
    found = {name: work(out / name) for name, work in works.items()}
    found["resumed paths"] = fsdp_worker.resumed_paths(out / "resumed")
    found["hybrid muon"] = fsdp_worker.muon(out / "muon")
    report(found, out)
