"""Losses on two CPU processes equal those on one: every row counts once, also if the split is uneven."""

import pytest

from tests.support.tiny import Rows, tiny_llama
from tests.trainer.distributed.fsdp_worker import llama
from tests.trainer.distributed.losses_worker import MEASURED, RAGGED, measure, rows_of
from tests.trainer.test_evaluation import token_loss


@pytest.fixture(scope="module")
def two(two_ranks: list[dict]) -> list[dict]:
    return [rank["losses"] for rank in two_ranks]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return measure(tmp_path_factory.mktemp("one"))


def figures(metrics: dict) -> dict:
    kinds = ("_loss", "_perplexity", "_rows", "_right", "_tokens")
    return {key: value for key, value in metrics.items() if key.endswith(kinds)}


OTHERS = ["predict", "no_labels", "average_kept", "pixels", "classes"]


@pytest.mark.parametrize("measured", [*("/".join(map(str, case)) for case in MEASURED), *OTHERS])
def test_two_ranks_measure_what_one_does(two: list[dict], one: dict, measured: str) -> None:
    expected = figures(one[measured])
    assert bool(expected) == (measured != "no_labels")
    for rank in two:
        assert figures(rank[measured]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "n", "batch"), [case for case in MEASURED if case[0] not in ("flat", "smoothed")])
def test_two_ranks_measure_the_mean_over_tokens(two: list[dict], name: str, n: int, batch: int) -> None:
    rows = Rows(n, 0, pad=True) if name in RAGGED else rows_of(n)
    expected = token_loss(tiny_llama(), rows) / (2 if name.startswith("own") else 1)
    for rank in two:
        assert rank[f"{name}/{n}/{batch}"]["eval_text_loss"] == pytest.approx(expected, rel=1e-6)


def test_shards_measure_the_mean_over_tokens(two: list[dict]) -> None:
    for rank in two:
        assert rank["fsdp"]["eval_text_loss"] == pytest.approx(token_loss(llama(), rows_of(7)), rel=1e-6)
