"""The order of map-style rows: each pass has each row of a source once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.mixture.indexed import MixtureDataset, MixtureSampler
from hf_nexus.mixture.schedule import SourceSchedule


def build(sizes: dict[str, int], rows: int, seed: int = 0, weights=None, kind="random") -> MixtureSampler:
    dataset = MixtureDataset({name: [{"row": (name, i)} for i in range(n)] for name, n in sizes.items()})
    return MixtureSampler(dataset, SourceSchedule(weights or dict(sizes), seed, kind, rows=rows))


def micro_batches(sampler: MixtureSampler, epoch: int) -> list[list[tuple[str, int]]]:
    sampler.set_epoch(epoch)
    indices, n = list(sampler), sampler.schedule.rows
    rows = [sampler.dataset[i]["row"] for i in indices]
    return [rows[i : i + n] for i in range(0, len(rows), n)]


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(4, 40), min_size=1, max_size=4),
    rows=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_micro_batches_hold_one_source_and_passes_each_row_once(sizes, rows, seed):
    sampler = build({f"s{i}": n for i, n in enumerate(sizes)}, rows, seed)
    read: dict[str, list[int]] = {}
    for epoch in range(3):
        batches = micro_batches(sampler, epoch)
        assert len(batches) == sum(sizes) // rows == len(sampler) // rows
        for batch in batches:
            assert len({name for name, _ in batch}) == 1
            read.setdefault(batch[0][0], []).extend(i for _, i in batch)
    for name, order in read.items():
        size = sizes[int(name[1:])]
        for start in range(0, len(order) - size + 1, size):
            assert sorted(order[start : start + size]) == list(range(size))


def test_mixed_micro_batches_hold_each_row_of_a_pass_once():
    sampler = build({"a": 12, "b": 6}, 6, kind="mixed")
    batches = [batch for epoch in range(4) for batch in micro_batches(sampler, epoch)]
    assert [sorted(name for name, _ in batch) for batch in batches] == [list("aaaabb")] * 12
    assert batches[9:] == micro_batches(build({"a": 12, "b": 6}, 6, kind="mixed"), 3)
    read = [i for batch in batches for name, i in batch if name == "a"]
    assert all(sorted(read[start : start + 12]) == list(range(12)) for start in range(0, 48, 12))


@pytest.mark.parametrize("kind", ["random", "stratified", "mixed"])
@pytest.mark.parametrize("skipped", [1, 3, 9])
def test_an_epoch_may_begin_at_any_micro_batch(kind, skipped):
    whole, resumed = (build({"a": 25, "b": 15}, 4, kind=kind) for _ in range(2))
    resumed.skip_to(1, skipped)
    for epoch in range(3):
        whole.set_epoch(epoch)
        resumed.set_epoch(epoch)
        expected = list(whole)
        if epoch == 1:
            expected[: 4 * skipped] = [0] * 4 * skipped
        assert list(resumed) == expected and len(resumed) == len(expected)


def test_each_pass_over_a_source_has_its_own_order():
    sampler = build({"only": 50}, 1)
    assert micro_batches(sampler, 0) != micro_batches(sampler, 1)
    assert micro_batches(sampler, 1) == micro_batches(build({"only": 50}, 1), 1)


def test_order_of_one_source_does_not_depend_on_the_others():
    def of(sizes):
        return [b for b in micro_batches(build(sizes, 2, weights=dict.fromkeys(sizes, 1.0)), 0) if b[0][0] == "a"]

    shared = min(len(of({"a": 30})), len(of({"z": 30, "a": 30})))
    assert of({"a": 30})[:shared] == of({"z": 30, "a": 30})[:shared]


def test_a_source_smaller_than_one_micro_batch_is_refused():
    with pytest.raises(ValueError, match=r"'small' has 3 rows, fewer than one micro-batch of 4"):
        build({"big": 40, "small": 3}, 4)


def test_bad_sources_are_refused():
    with pytest.raises(ValueError, match="no sources"):
        MixtureDataset({})
    with pytest.raises(ValueError, match="'a' is empty"):
        MixtureDataset({"a": []})
