"""One launch of two ranks for all tests of this folder, also if pytest-xdist runs them in several processes."""

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.launcher import launch, reports


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank, by the name of the worker."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    out = Path(root, "two_ranks")
    with FileLock(f"{out}.lock"):
        if (out / "rank1.json").exists():
            return reports(out, 2)
        out.mkdir(exist_ok=True)
        return launch("tests.trainer.distributed.two_ranks", 2, out)
