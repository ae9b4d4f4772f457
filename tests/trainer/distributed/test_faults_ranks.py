"""The faults of tests/trainer/test_faults.py on two ranks, with one launch for all tests."""

import pytest

from tests.support.faults import IN_WINDOWS, STEPS, K
from tests.support.launcher import launch
from tests.trainer.distributed.fault_worker import INTERRUPTED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PET_MAX_RESTARTS", "1")  # an option of torchrun
        # Otherwise the second attempt may find the address of the killed rank in the store.
        patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        return out, launch("tests.trainer.distributed.fault_worker", 2, out, torchrun=True)


@pytest.fixture
def ranks(launched) -> list[dict]:
    return launched[1]


@pytest.mark.parametrize("name", ["_".join(map(str, scenario)) for scenario in INTERRUPTED])
def test_a_window_interrupted_in_an_inner_step_is_restored(ranks, name):
    assert [rank[name] for rank in ranks] == [[], []]


@pytest.mark.parametrize("name", [*IN_WINDOWS, "on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_a_window_interrupted_at_its_ends_is_restored(ranks, name):
    assert [rank[name] for rank in ranks] == [[], []]


def test_a_run_with_a_killed_rank_restarts_to_the_same_end(launched):
    out, ranks = launched
    assert (out / "killed").exists()
    assert [rank["killed"] for rank in ranks] == [[], []]


@pytest.mark.parametrize("window", [1, 2])
def test_a_window_cut_by_sigterm_is_repeated_on_resume(ranks, window):
    """Window 1 is short, and window 2 starts an epoch."""
    assert [rank[f"terminated_{window}"] for rank in ranks] == [[], []]


def test_a_checkpoint_that_fails_is_none(ranks):
    assert [rank["failed_checkpoint"] for rank in ranks] == [[], []]


def test_a_checkpoint_that_can_be_seen_is_complete(ranks):
    assert [rank["watched"]["seen"] for rank in ranks] == [[], []]
    assert ranks[0]["watched"]["looks"] > 10 * STEPS


@pytest.mark.parametrize(
    ("scenario", "skipped", "first_moves"),
    # global: the reduced gradient is NaN on both ranks. local: only rank 1 skips steps, and logs show the mean
    [("global_nan", 1, True), ("local_nan", 0.5, True), ("global_all_nan", K, False), ("local_all_nan", K / 2, True)],
)
def test_nan_on_one_rank_displaces_neither(ranks, scenario, skipped, first_moves):
    for rank in ranks:
        assert rank[scenario]["found"] == []
        assert rank[scenario]["finite"]
        assert rank[scenario]["moved"] == [first_moves, True, True, True]
        assert rank[scenario]["skipped"] == skipped
