"""Parameters that are sharded in different ways, on four CPU processes."""

import pytest
import torch

from tests.support.tiny import Rows, distance
from tests.trainer.distributed.layouts_worker import SLOW, adapters, experts, llama, make, trained


@pytest.fixture(scope="module")
def ranks(four_ranks: list[dict]) -> list[dict]:
    return [rank["layouts"] for rank in four_ranks]


def test_one_norm_over_parameters_in_any_layout(ranks):
    """Shards of a replicated parameter count once, and a gradient may be a part of a sum."""
    for rank in ranks:
        norm, whole, of_one_step = rank["gradient"]["norms"]
        assert norm == pytest.approx(whole, rel=1e-6)
        assert of_one_step == pytest.approx(1, rel=1e-6)
        assert rank["gradient"]["error"] < 1e-6


def test_random_directions_are_equal_on_replicas_only(ranks):
    moved = torch.tensor(ranks[0]["random"]["moved"])
    assert all(rank["random"]["moved"] == ranks[0]["random"]["moved"] for rank in ranks)
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-6)
    assert len(moved.unique()) == len(moved)


@pytest.mark.slow
def test_fsdp_with_tensor_parallelism_matches_one_process(slow_four_ranks, tmp_path):
    """The weights, the checkpoint, the logs and an evaluation."""
    trainer = make(tmp_path, llama(), 8)
    trainer.train()
    found = [rank["tensor"] for rank in slow_four_ranks]
    assert distance(found[0]["weights"], trained(trainer.model)) < 1e-5
    loss, logs = trainer.evaluate(Rows(9, 0, pad=True))["eval_loss"], trainer.state.log_history[-2]
    for rank in found:
        assert rank["weights"] == rank["saved"] == found[0]["weights"]
        assert rank["tokens"] == trainer.meter.trained_tokens
        assert rank["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert rank["logs"]["train_loss"] == pytest.approx(logs["train_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW)
def test_models_sharded_at_load_match_one_process(slow_four_ranks, tmp_path, layout):
    pytest.importorskip("peft")
    model = experts() if layout == "experts" else llama()
    options = {"matrix_optimizer": "muon"} if layout == "muon" else {}
    trainer = make(tmp_path, adapters(model) if layout == "adapters" else model, 8, **options)
    trainer.train()
    # Muon's orthogonalization computes in bfloat16.
    assert distance(slow_four_ranks[0][layout], trained(trainer.model)) < (1e-2 if layout == "muon" else 1e-5)
    assert all(rank[layout] == slow_four_ranks[0][layout] for rank in slow_four_ranks)
