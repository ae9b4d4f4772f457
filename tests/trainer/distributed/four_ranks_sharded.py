"""Run on four CPU processes: paths and hybrid shards of FSDP2, in a launch without other layouts."""

from pathlib import Path

from tests.support.launcher import report
from tests.trainer.distributed import fsdp_worker


def main(out: Path) -> None:
    report(fsdp_worker.four_ranks(out), out)
