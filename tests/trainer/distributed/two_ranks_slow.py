"""Run on two CPU processes: the scenarios of slow tests in one launch."""

from pathlib import Path

from tests.support.launcher import report
from tests.trainer.distributed import async_worker, fsdp_worker, stream_worker


def main(out: Path) -> None:
    # Those with FSDP come last, because they pretend that there are accelerators.
    works = {"streams": stream_worker.further, "fsdp": fsdp_worker.further, "async": async_worker.main}
    report({name: work(out / name) for name, work in works.items()}, out)
