import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.mixture.indexed import MixtureDataset, MixtureSampler
from hf_nexus.mixture.schedule import DynamicSchedule, SourceSchedule, normalized
from hf_nexus.mixture.stages import Windows
from hf_nexus.mixture.tags import MicroBatchTag, TaggingCollator, pop_tag

WEIGHTS = {"text": 0.5, "code": 0.3, "math": 0.2}


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_any_stretch_equals_the_same_stretch_of_the_whole(kind):
    whole = SourceSchedule(WEIGHTS, 7, kind).sources(0, 10_000)
    for start, stop in [(0, 1), (4095, 4097), (5000, 9000), (9999, 10_000)]:
        assert np.array_equal(SourceSchedule(WEIGHTS, 7, kind).sources(start, stop), whole[start:stop])


def test_shares_converge_to_the_weights():
    for kind, tolerance in [("random", 0.01), ("stratified", 1e-4)]:
        drawn = SourceSchedule(WEIGHTS, 1, kind).sources(0, 50_000)
        shares = np.bincount(drawn, minlength=3) / len(drawn)
        assert np.abs(shares - list(WEIGHTS.values())).max() < tolerance


def test_stratified_stays_within_one_micro_batch_of_targets():
    drawn = SourceSchedule(WEIGHTS, 0, "stratified").sources(0, 500)
    counts = np.cumsum(np.eye(3)[drawn], axis=0)
    targets = np.outer(np.arange(1, 501), list(WEIGHTS.values()))
    assert np.abs(counts - targets).max() < 1 + 1e-9


def test_the_seed_matters_for_random_draws():
    assert not np.array_equal(SourceSchedule(WEIGHTS, 0).sources(0, 100), SourceSchedule(WEIGHTS, 1).sources(0, 100))


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_a_source_of_weight_zero_never_comes(kind):
    schedule = SourceSchedule({"a": 0.0, "b": 1.0, "c": 0.0}, 0, kind)
    assert set(schedule.sources(0, 5000).tolist()) == {1}


@pytest.mark.parametrize("weights", [{}, {"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("nan")}])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        SourceSchedule(weights)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="use one of 'random', 'stratified'"):
        SourceSchedule(WEIGHTS, kind="rando")


# ---- Weights that change ----

STAGES = [
    (0, {"a": 3.0, "b": 1.0, "c": 0.0}),
    (4000, {"a": 0.0, "b": 1.0, "c": 1.0}),
    (9000, {"c": 1, "b": 0, "a": 1}),
]


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_draws_stay_the_same_across_releases(kind):
    first = {"random": [1, 0, 0, 0, 2, 2, 1, 1, 1, 2], "stratified": [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]}
    assert SourceSchedule(WEIGHTS, 0, kind).sources(0, 10).tolist() == first[kind]


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_stages_of_equal_weights_are_one_stage(kind):
    staged = SourceSchedule([(0, WEIGHTS), (17, WEIGHTS), (5000, WEIGHTS)], 3, kind)
    assert np.array_equal(staged.sources(0, 9000), SourceSchedule(WEIGHTS, 3, kind).sources(0, 9000))


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_each_stage_has_its_weights_in_any_stretch(kind):
    schedule = SourceSchedule(STAGES, 1, kind)
    whole = schedule.sources(0, 12_000)
    for start, stop, shares in [
        (0, 4000, (0.75, 0.25, 0)),
        (4000, 9000, (0, 0.5, 0.5)),
        (9000, 12_000, (0.5, 0, 0.5)),
    ]:
        part = whole[start:stop]
        counts = np.bincount(part, minlength=3)
        assert np.abs(counts / len(part) - shares).max() < (0.03 if kind == "random" else 1e-3)
        assert all(count == 0 for count, share in zip(counts, shares, strict=True) if share == 0)
    for start, stop in [(0, 1), (3999, 4001), (3000, 9500), (9000, 9001), (11_999, 12_000), (5, 5)]:
        assert np.array_equal(SourceSchedule(STAGES, 1, kind).sources(start, stop), whole[start:stop])
    assert schedule.shares.tolist() == [0.75, 0.5, 0.5]


def test_distance_to_the_target_survives_the_end_of_a_stage():
    # No stage alone is long enough to give the rare source a micro-batch.
    often, rarely = {"a": 0.9, "b": 0.1}, {"a": 0.8, "b": 0.2}
    stages = [(start, rarely if start % 4 else often) for start in range(0, 4000, 2)]
    drawn = SourceSchedule(stages, kind="stratified").sources(0, 4000)
    targets = np.cumsum([0.2 if i % 4 >= 2 else 0.1 for i in range(4000)])
    assert np.abs(np.cumsum(drawn == 1) - targets).max() < 1 + 1e-9


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_weights_decided_during_training_give_the_same_draws(kind):
    names = ["a", "b", "c"]
    schedule, shares = DynamicSchedule(names, 1, kind), {start: normalized(w, names) for start, w in STAGES[:2]}
    drawn, current = [], []
    for i in range(9000):
        current = shares.get(i, current)
        drawn.append(schedule.source(i, current))
    assert drawn == SourceSchedule(STAGES, 1, kind).sources(0, 9000).tolist()


@settings(max_examples=30)
@given(stop=st.integers(0, 60), kind=st.sampled_from(["random", "stratified"]), seed=st.integers(0, 3))
def test_a_dynamic_schedule_goes_on_from_its_saved_state(stop, kind, seed):
    names = ["a", "b", "c"]
    shares = [normalized({"a": 1 + i % 7, "b": 2, "c": i // 20}, names) for i in range(80)]
    whole = DynamicSchedule(["a", "b", "c"], seed, kind)
    expected = [whole.source(i, shares[i]) for i in range(80)]
    first = DynamicSchedule(["a", "b", "c"], seed, kind)
    drawn = [first.source(i, shares[i]) for i in range(stop)]
    state = json.loads(json.dumps(first.state_dict()))
    [first.source(i, shares[i]) for i in range(stop, 70)]  # the state must not change with the schedule
    second = DynamicSchedule(["a", "b", "c"], seed, kind)
    second.load_state_dict(state)
    assert drawn + [second.source(i, shares[i]) for i in range(stop, 80)] == expected


@pytest.mark.parametrize(
    ("stages", "error"),
    [
        ([], "the first must be 0"),
        ([(1, {"a": 1.0})], "the first must be 0"),
        ([(0, {"a": 1.0}), (5, {"a": 1.0}), (5, {"a": 1.0})], "and each later"),
        ([(0, {"a": 1.0}), (5, {"b": 1.0})], "name b, but the training sources are a"),
        ([(0, {"a": 1.0}), (5, {"a": 0.0})], "more than zero"),
    ],
)
def test_bad_stages_are_refused(stages, error):
    with pytest.raises(ValueError, match=error):
        SourceSchedule(stages)


@given(st.dictionaries(st.text(), st.floats(0, 1e6), min_size=1).filter(lambda weights: sum(weights.values()) > 1e-3))
def test_shares_are_not_changed_by_normalizing_them_again(weights):
    shares = normalized(weights, list(weights))
    assert normalized(dict(zip(weights, shares, strict=True)), list(weights)).tolist() == shares.tolist()
    assert shares.sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("kind", ["mixed", "blocked"])
def test_controls_draw_the_same_with_weights_decided_in_training(kind):
    settings = {"kind": kind, "windows": Windows(4), "rows": 6, "ranks": 2}
    schedule, names = SourceSchedule(STAGES, 1, **settings), ["a", "b", "c"]
    dynamic, shares = DynamicSchedule(names, 1, **settings), {start: normalized(w, names) for start, w in STAGES}
    current, drawn = shares[0], []
    for i in range(12_000):
        current = shares.get(i, current)
        drawn.append(dynamic.source(i, current).tolist())
    whole = schedule.sources(0, 12_000)
    assert drawn == whole.tolist()
    for start, stop in [(0, 0), (0, 1), (3999, 4001), (4095, 4103), (11_999, 12_000)]:
        assert np.array_equal(schedule.sources(start, stop), whole[start:stop])


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), each=st.integers(2, 5), ranks=st.integers(1, 4))
def test_a_mixed_micro_batch_has_all_sources_by_their_shares(weights, each, ranks):
    given = {str(i): weight for i, weight in enumerate(weights)}
    schedule = SourceSchedule(given, 3, "mixed", rows=each * ranks, ranks=ranks)
    drawn = schedule.sources(0, 400)
    for part in (*np.split(drawn, ranks, axis=1), drawn):  # of each rank, and of all
        counts = np.stack([(part == source).sum(1) for source in range(len(weights))], axis=1)
        assert (np.abs(counts - part.shape[1] * schedule.shares) < 1 + 1e-9).all()
    assert np.abs(counts.mean(0) - each * ranks * schedule.shares).max() < 0.1


def test_a_blocked_window_has_one_source_and_windows_differ():
    windows = Windows(4, epoch=10)  # windows of 4, 4 and 2 micro-batches
    drawn = SourceSchedule(WEIGHTS, 1, "blocked", windows).sources(0, 30_000).reshape(-1, 10)
    assert (drawn[:, :4] == drawn[:, :1]).all() and (drawn[:, 4:8] == drawn[:, 4:5]).all()
    assert (drawn[:, 8] == drawn[:, 9]).all()
    heads = drawn[:, [0, 4, 8]].ravel()
    assert np.abs(np.bincount(heads, minlength=3) / len(heads) - list(WEIGHTS.values())).max() < 0.02
    assert (heads[1:] == heads[:-1]).mean() == pytest.approx(0.38, abs=0.02)  # of independent draws


def test_micro_batches_of_one_row_cannot_be_mixed():
    with pytest.raises(ValueError, match="Raise per_device_train_batch_size"):
        SourceSchedule(WEIGHTS, kind="mixed", rows=1)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="use one of 'random', 'stratified'"):
        DynamicSchedule(["a"], kind="rando")


# ---- The order of rows ----


def build(sizes: dict[str, int], rows: int, seed: int = 0, weights=None, kind="random") -> MixtureSampler:
    dataset = MixtureDataset({name: [{"row": (name, i)} for i in range(n)] for name, n in sizes.items()})
    return MixtureSampler(dataset, SourceSchedule(weights or dict(sizes), seed, kind, rows=rows), rows, seed)


def micro_batches(sampler: MixtureSampler, epoch: int) -> list[list[tuple[str, int]]]:
    sampler.set_epoch(epoch)
    indices = list(sampler)
    rows = [sampler.dataset[i]["row"] for i in indices]
    return [rows[i : i + sampler.rows] for i in range(0, len(rows), sampler.rows)]


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


def test_a_micro_batch_carries_its_source_and_number_of_rows():
    dataset = MixtureDataset({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}, {"x": 4}]})
    batch = TaggingCollator(lambda rows: {"x": [row["x"] for row in rows]})(dataset.__getitems__([3, 2]))
    assert pop_tag(batch) == MicroBatchTag({"b": 2}) and batch == {"x": [4, 3]}
    assert pop_tag(batch) is None and pop_tag(torch.zeros(2)) is None


def test_rows_of_several_sources_keep_their_order():
    rows = MixtureDataset({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}, {"x": 4}]}).__getitems__([3, 0, 2])
    assert [row["x"] for row in rows] == [4, 1, 3] and rows.tag == MicroBatchTag({"b": 2, "a": 1})


def test_a_collator_that_returns_no_mapping_is_refused():
    dataset = MixtureDataset({"a": [{"x": 1}]})
    with pytest.raises(ValueError, match="returned a list"):
        TaggingCollator(lambda rows: rows)(dataset.__getitems__([0]))


def test_bad_sources_are_refused():
    with pytest.raises(ValueError, match="no sources"):
        MixtureDataset({})
    with pytest.raises(ValueError, match="'a' is empty"):
        MixtureDataset({"a": []})
