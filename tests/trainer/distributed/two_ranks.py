"""Run by torchrun on two CPU processes: all scenarios in one launch, since it is starting that takes long."""

import sys
from pathlib import Path

from tests.support.launcher import report
from tests.trainer.distributed import fsdp_worker, losses_worker, memory_worker, stream_worker, worker

# Those with FSDP come last: their processes are told that they have accelerators.
WORKERS = {
    "ddp": worker,
    "streams": stream_worker,
    "losses": losses_worker,
    "memory": memory_worker,
    "fsdp": fsdp_worker,
}


def main(out: Path) -> None:
    found = {}
    for name, module in WORKERS.items():
        (out / name).mkdir(exist_ok=True)
        found[name] = module.main(out / name)
    report(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
