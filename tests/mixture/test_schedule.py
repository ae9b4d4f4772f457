"""The schedule is a pure function of the seed, the weights and the number of the micro-batch."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.mixture.schedule import DynamicSchedule, SourceSchedule, WindowCounts
from hf_nexus.mixture.stages import normalized

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
    assert schedule.largest_shares.tolist() == [0.75, 0.5, 0.5]


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


@pytest.mark.parametrize("kind", ["mixed", "blocked"])
def test_controls_draw_the_same_with_dynamic_weights(kind):
    settings = {"kind": kind, "windows": WindowCounts(4), "rows": 6, "ranks": 2}
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
        assert (np.abs(counts - part.shape[1] * schedule.largest_shares) < 1 + 1e-9).all()
    assert np.abs(counts.mean(0) - each * ranks * schedule.largest_shares).max() < 0.1


def test_a_blocked_window_has_one_source_and_windows_differ():
    windows = WindowCounts(4, epoch=10)  # windows of 4, 4 and 2 micro-batches
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


# ---- Windows ----


def test_windows_are_counted_as_the_trainer_does() -> None:
    windows = WindowCounts(4, epoch=10)  # of 4, 4 and 2 micro-batches
    assert [windows.micro_batches(step) for step in range(6)] == [0, 4, 8, 10, 14, 18]
    assert windows.count(-1, 1.5) == 5 and windows.count(7, 1.5) == 7
    assert WindowCounts(4).micro_batches(5) == 20
