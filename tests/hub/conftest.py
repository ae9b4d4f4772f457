"""A local Hub, and publishers of a run that send to it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_nexus.hub.publisher import Publisher
from tests.support.hub.runs import QUICK, REPO
from tests.support.hub.server import ALICE, HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server, which upload processes can reach."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with HubServer(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def publish(hub: HubServer, tmp_path: Path) -> Iterator[Callable[..., Publisher]]:
    """`publish(**options)` makes a publisher of `tmp_path / "out"`, closed at the end of the test."""
    made = []

    def make(repo_id: str = REPO, output_dir: Path = tmp_path / "out", **options: Any) -> Publisher:
        publisher = Publisher(
            repo_id, output_dir, **{"token": ALICE, "endpoint": hub.endpoint, "retry": QUICK, **options}
        )
        made.append(publisher)
        return publisher

    yield make
    for publisher in made:
        publisher.close()
