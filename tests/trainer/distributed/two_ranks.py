"""Run on two CPU processes: all scenarios in one launch, because a launch is slow."""

from pathlib import Path

from tests.support.launcher import report
from tests.trainer.distributed import (
    agreement_worker,
    fsdp_worker,
    losses_worker,
    memory_worker,
    stream_worker,
    training_losses_worker,
    worker,
)

# Workers with FSDP come last, because they pretend that there are accelerators.
WORKERS = {
    "ddp": worker,
    "agreement": agreement_worker,
    "streams": stream_worker,
    "losses": losses_worker,
    "training_losses": training_losses_worker,
    "memory": memory_worker,
    "fsdp": fsdp_worker,
}


def main(out: Path) -> None:
    found = {}
    for name, module in WORKERS.items():
        (out / name).mkdir(exist_ok=True)
        found[name] = module.main(out / name)
    report(found, out)
