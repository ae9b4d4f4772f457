"""Run by torchrun on four CPU processes: all scenarios in one launch, because a launch is slow."""

import sys
from pathlib import Path

from tests.support.launcher import report
from tests.trainer.distributed import fsdp_worker, node_worker


def main(out: Path) -> None:
    for name in ("node", "hybrid"):
        (out / name).mkdir(exist_ok=True)
    # FSDP comes last, because it pretends that there are accelerators.
    report({"node": node_worker.main(out / "node"), "hybrid": fsdp_worker.four_ranks(out / "hybrid")}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
