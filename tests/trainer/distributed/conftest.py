"""Launches of two and of four ranks, each once, also if pytest-xdist runs the tests in several processes."""

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.launcher import launch, reports
from tests.trainer.distributed.worker import make, sources


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank, by the name of the worker."""
    return launched("two_ranks", 2, tmp_path_factory)


@pytest.fixture(scope="session")
def slow_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank, by the name of the worker."""
    return launched("two_ranks_slow", 2, tmp_path_factory)


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank, by the name of the worker."""
    return launched("four_ranks", 4, tmp_path_factory)


@pytest.fixture(scope="session")
def slow_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank, by the name of the worker."""
    return launched("four_ranks_slow", 4, tmp_path_factory)


@pytest.fixture(scope="session")
def sharded_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each rank, by the name of the scenario."""
    return launched("four_ranks_sharded", 4, tmp_path_factory)


def results_of(launch: str, worker: str, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The results of a worker on each rank of a launch, or of its slow scenarios if the test is slow."""
    slow = request.node.get_closest_marker("slow") is not None
    return [rank[worker] for rank in request.getfixturevalue(f"slow_{launch}" if slow else launch)]


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of pytest-xdist."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


def launched(name: str, ranks: int, factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = shared(factory) / name
    with FileLock(f"{out}.lock"):
        if all((out / f"rank{r}.json").exists() for r in range(ranks)):
            return reports(out, ranks)
        out.mkdir(exist_ok=True)
        save = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "per_device_train_batch_size": 2 * ranks}
        make(out / "ddp" / "one", sources(), **save).train()
        return launch(f"tests.trainer.distributed.{name}", ranks, out)
