"""DDP on two CPU processes, with one launch for all tests."""

import pytest
import torch
from torch.nn import functional as F

from tests.support.tiny import Rows, distance, two_layers
from tests.trainer.distributed.worker import WEIGHTS, make, sources, weights


@pytest.fixture(scope="module")
def ranks(two_ranks: list[dict]) -> list[dict]:
    return [rank["ddp"] for rank in two_ranks]


SCENARIOS = [f"{sync}{kind}" for sync in ("global", "local") for kind in ("", "_random", "_ragged", "_none", "_nan")]


@pytest.mark.parametrize("scenario", [*SCENARIOS, "global_padded", "global_own_means"])
def test_ranks_are_bit_identical_after_every_outer_step(ranks, scenario):
    for rank in ranks:
        assert rank[scenario]["agree"] and all(rank[scenario]["agree"])
    assert ranks[0][scenario]["weights"] == ranks[1][scenario]["weights"]


@pytest.mark.parametrize(("scenario", "pad"), [("global", False), ("global_padded", True)])
def test_two_ranks_match_one_process_with_twice_the_batch(ranks, tmp_path, scenario, pad):
    one = make(tmp_path, sources(pad), mixture_weights=WEIGHTS, per_device_train_batch_size=4)
    one.train()
    assert distance(ranks[0][scenario]["weights"], weights(one)) < 1e-5
    logs = [entry for entry in one.state.log_history if "loss" in entry][-1]
    for key, value in ranks[0][scenario]["logs"].items():
        if key == "loss" or key.startswith(("loss/", "tokens/", "path_cosine", "pseudo")):
            assert value == pytest.approx(logs[key], rel=1e-4), key


def test_without_token_average_ranks_weigh_the_same(ranks, tmp_path):
    """The result is that of one process whose loss is the mean of the means of both ranks."""

    def mean_of_means(outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        sums, counts = losses.view(2, -1).sum(1), (labels[:, 1:] != -100).view(2, -1).sum(1)
        return (sums / counts).mean()

    settings = {"mixture_weights": WEIGHTS, "per_device_train_batch_size": 4}
    one = make(tmp_path, sources(pad=True), compute_loss_func=mean_of_means, **settings)
    one.train()
    found = ranks[0]["global_own_means"]["weights"]
    assert distance(found, weights(one)) < 1e-5
    assert distance(found, ranks[0]["global_padded"]["weights"]) > 1e-3


@pytest.mark.parametrize("scenario", ["global", "local", "global_ragged", "local_ragged"])
def test_all_ranks_hold_the_same_source_at_each_inner_step(ranks, scenario):
    assert ranks[0][scenario]["sources"] == ranks[1][scenario]["sources"]
    assert len({name for window in ranks[0][scenario]["sources"] for name in window}) == 3


def test_global_reduces_each_inner_step_and_local_each_window(ranks):
    assert ranks[0]["global"]["reductions"] == [4] * 5
    assert ranks[0]["local"]["reductions"] == [1] * 5


def test_local_is_another_algorithm_but_a_close_one(ranks):
    d = distance(ranks[0]["local"]["weights"], ranks[0]["global"]["weights"])
    assert 1e-6 < d < 0.1


def test_a_short_last_window_trains_its_real_length(ranks):
    lengths = [len(window) for window in ranks[0]["global_ragged"]["sources"]]
    micro_batches = (40 + 32 + 24) // 4
    assert lengths == ([4] * (micro_batches // 4) + ([micro_batches % 4] if micro_batches % 4 else [])) * 2


@pytest.mark.parametrize("sync", ["global", "local"])
def test_a_parameter_that_no_rank_meets_is_left_alone(ranks, sync):
    assert ranks[0][f"{sync}_none"]["never_moved"] == 3.0  # not shrunk by weight decay


def test_not_finite_steps_are_left_out(ranks):
    # global: the reduced gradient decides, so all ranks skip 1 + 4 steps. local: only rank 1 skips, half on average
    assert ranks[0]["global_nan"]["logs"]["inner_steps_skipped"] == 5
    assert ranks[0]["local_nan"]["logs"]["inner_steps_skipped"] == 2.5
    for sync in ("global", "local"):
        assert torch.tensor(ranks[0][f"{sync}_nan"]["weights"]).isfinite().all()


def test_resume_on_two_ranks_is_bit_exact(ranks):
    for rank in ranks:
        assert rank["resumed"]["weights"] == rank["whole"]["weights"]
        assert rank["rebalanced_resumed"]["weights"] == rank["rebalanced"]["weights"]


def test_a_communication_hook_is_refused_with_a_reduction_dtype(ranks):
    for rank in ranks:
        assert "'fp16_compress_hook' with reduce_dtype='bfloat16' is not allowed: DDP takes one" in rank["hooked"]


def test_a_run_goes_on_with_more_or_fewer_ranks(ranks, tmp_path_factory, tmp_path):
    """The rows are the same, and the weights up to the order of the reductions."""
    root = tmp_path_factory.getbasetemp()
    saved = next(folder for folder in (root, root.parent) if (folder / "two_ranks").exists()) / "two_ranks" / "ddp"
    one = make(tmp_path, sources(), two_layers(seed=3), max_steps=8, per_device_train_batch_size=4)
    one.train(resume_from_checkpoint=str(saved / "whole" / "checkpoint-6"))
    assert distance(weights(one), ranks[0]["whole"]["weights"]) < 1e-5
    assert distance(ranks[0]["grown"]["weights"], ranks[0]["whole"]["weights"]) < 1e-5
    with pytest.raises(ValueError, match=r"ranks was 4 and is 2.* \(per_device_train_batch_size times the ranks\)"):
        make(tmp_path, sources(), max_steps=8).train(resume_from_checkpoint=str(saved / "whole" / "checkpoint-6"))


def test_the_scenarios_differ():
    """Otherwise the comparisons above would pass for runs without training."""
    assert not torch.equal(Rows(4, 0).ids, Rows(4, 1).ids)
    assert sum(p.numel() for p in two_layers().parameters()) > 5000


def test_ranks_start_from_one_step_in_a_free_folder(ranks):
    assert "held is used by another process" in ranks[0]["held"]
    assert "Another rank cannot start" in ranks[1]["held"]
    for rank in ranks:
        assert "different steps, 3 and 6" in rank["apart"]
