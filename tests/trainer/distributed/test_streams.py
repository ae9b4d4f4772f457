"""Streams on two CPU processes, with one launch for all tests."""

from typing import Any

import pytest

from hf_nexus.mixture.schedule import DynamicSchedule
from tests.support.faults import K
from tests.support.streams import STEPS, Replayed, run
from tests.trainer.distributed.conftest import results_of, shared
from tests.trainer.distributed.stream_worker import FIRST


def slow(*scenarios: str) -> list[Any]:
    return [pytest.param(scenario, marks=pytest.mark.slow) for scenario in scenarios]


SCENARIOS = ["uneven", "small", "ending", "ahead", *slow("small at any step", "dynamic")]
CONTROLS = ["mixed", *slow("blocked")]


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> list[dict]:
    return results_of("two_ranks", "streams", request)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_agree_on_sources_and_weights(ranks: list[dict], scenario: str) -> None:
    first, second = (rank[scenario] for rank in ranks)
    assert first["sources"] == second["sources"] and len(set(first["sources"])) >= 3
    assert first["weights"] == second["weights"]
    assert len(first["agree"]) >= STEPS and all(first["agree"])


@pytest.mark.parametrize("scenario", CONTROLS)
def test_ranks_agree_on_the_weights_of_the_controls(ranks: list[dict], scenario: str) -> None:
    first, second = (rank[scenario] for rank in ranks)
    assert first["sources"] == second["sources"] and first["weights"] == second["weights"] and all(first["agree"])
    if scenario == "blocked":
        assert all(len(set(first["sources"][i : i + K])) == 1 for i in range(0, STEPS * K, K))


@pytest.mark.parametrize("source", FIRST)
def test_ranks_read_other_rows_whatever_the_shards(ranks: list[dict], source: str) -> None:
    first, second = ([tuple(row) for row in rank["uneven"]["rows"][source]] for rank in ranks)
    assert len(first) == len(second) > 10
    assert len(set(first + second)) == len(first + second)  # no row twice: the run is shorter than a pass


@pytest.mark.parametrize("scenario", [*SCENARIOS, *CONTROLS])
def test_a_run_is_resumed_to_the_bit_on_each_rank(ranks: list[dict], scenario: str) -> None:
    assert [rank[scenario]["differences"] for rank in ranks] == [[], []]


@pytest.mark.slow
def test_a_plain_stream_is_resumed_on_any_number_of_ranks(ranks, tmp_path_factory, tmp_path) -> None:
    """A pass has 9 micro-batches on two ranks and on one: two windows, and one micro-batch that fills none."""
    assert [rank["plain"]["differences"] for rank in ranks] == [[], []]
    first, second = (rank["plain"]["rows"][""] for rank in ranks)
    together = [first[i : i + 2] + second[i : i + 2] for i in range(0, len(first), 2)]
    for step in (1, 3, 5):
        checkpoint = shared(tmp_path_factory) / f"two_ranks_slow/streams/plain/whole/checkpoint-{step}"
        alone = run(tmp_path, Replayed(36, 0), str(checkpoint), per_device_train_batch_size=4)
        read = [rows for of_step in alone.micro_batches.values() for _, rows in of_step]
        assert len(read) >= (STEPS - step) * K and read == together[-len(read) :]


def test_a_source_that_ends_on_one_rank_ends_on_both(ranks: list[dict]) -> None:
    first, second = (rank["ending"] for rank in ranks)
    assert first["left_out"] == second["left_out"] and set(first["left_out"]) == {"a"}
    step = first["left_out"]["a"]
    assert 1 < step < 7
    assert "a" in first["sources"][: step * K] and "a" not in first["sources"][step * K :]
    rows = [[16 * row[0] + row[1] for row in rank["ending"]["rows"]["a"]] for rank in ranks]
    short, long = sorted(rows, key=lambda numbers: max(numbers[:4]))
    assert max(short[:4]) < 7 and len(set(short[:4])) == 4 and len(short) > 4  # its shards, then the next pass
    assert max(long) >= 7 and len(set(long)) == len(long)  # the other rank was in its first pass


@pytest.mark.parametrize("scenario", ["ahead", *slow("dynamic")])
def test_the_first_rank_decides_the_weights(ranks: list[dict], scenario: str) -> None:
    schedule, expected = DynamicSchedule(["a", "b", "c"], seed=42), []
    for i in range(STEPS * K):
        total = 4.0 + i // K
        expected.append("abc"[schedule.source(i, [(1.0 + i // K) / total, 1 / total, 2 / total])])
    assert ranks[0][scenario]["sources"] == expected


def test_a_source_that_splits_itself_over_ranks_is_refused(ranks: list[dict]) -> None:
    assert all("Source 'split' gives other rows on each rank" in rank["splitting"] for rank in ranks)


@pytest.mark.parametrize("scenario", ["failing", *slow("failing_dynamic")])
def test_a_source_failing_on_one_rank_stops_and_saves_both(ranks: list[dict], scenario: str) -> None:
    first, second = (rank[scenario] for rank in ranks)
    assert "Another rank could not read" in first["error"]
    assert "Source 'a' (rank 1, pass 1, shard" in second["error"] and "bad bytes" in second["error"]
    assert first["step"] == second["step"] >= 1
    assert first["checkpoint"] and second["checkpoint"]
    assert f"stopped after step {first['step']}, and a checkpoint was saved" in first["error"]
    assert first["differences"] == second["differences"] == []


def test_documents_are_isolated_on_both_ranks_or_none(ranks: list[dict]) -> None:
    assert [rank["isolation"] for rank in ranks] == [[True, False], [True, False]]
