"""A run over streams that is killed on 4 ranks goes on with 2 or 1, on the same rows."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from tests.support.launcher import launch
from tests.trainer.distributed.elastic_worker import ROWS, SAVED, STEPS, noting, trainer


def hashes(of_ranks: list[dict[str, Any]]) -> dict[int, list[tuple[str, str]]]:
    """For each outer step, the sources and hashes of its global micro-batches."""
    found: dict[int, list[tuple[str, str]]] = {}
    for step, first in of_ranks[0].items():
        found[int(step)] = []
        for i, (source, _) in enumerate(first):
            rows = [row for rank in of_ranks for row in rank[step][i][1]]
            assert len(rows) == ROWS and all(rank[step][i][0] == source for rank in of_ranks)
            found[int(step)].append((source, blake2b(json.dumps(rows).encode()).hexdigest()))
    return found


@pytest.mark.slow
def test_killed_on_four_ranks_and_resumed_on_two_and_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        launch("tests.trainer.distributed.elastic_worker", 4, tmp_path)
    noted = [json.loads(noting(tmp_path / "4", rank).read_text()) for rank in range(4)]
    on_two = launch("tests.trainer.distributed.elastic_worker", 2, tmp_path)
    whole = trainer(tmp_path / "whole", 1, workers=0)
    whole.train()
    expected = hashes([whole.micro_batches])
    one = trainer(tmp_path / "1", 1, workers=3)
    one.train(resume_from_checkpoint=str(tmp_path / "4" / f"checkpoint-{SAVED}"))
    rest = {step: expected[step] for step in range(SAVED, STEPS)}
    assert hashes([one.micro_batches]) == hashes(on_two) == rest
    steps = min(len(rank) for rank in noted)
    assert steps > SAVED
    assert hashes([dict(list(rank.items())[:steps]) for rank in noted]) == {s: expected[s] for s in range(steps)}
