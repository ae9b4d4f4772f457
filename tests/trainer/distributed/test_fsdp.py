"""FSDP2 on CPU processes with tied embeddings and uneven shards, on two and on four ranks."""

import pytest

from tests.support.tiny import distance
from tests.trainer.distributed.conftest import results_of

pytest.importorskip("peft")

STATE_DICTS = ["SHARDED_STATE_DICT", pytest.param("FULL_STATE_DICT", marks=pytest.mark.slow)]


@pytest.fixture
def two(request: pytest.FixtureRequest) -> list[dict]:
    return results_of("two_ranks", "fsdp", request)


@pytest.mark.parametrize("run", ["fsdp", "between_steps", pytest.param("cpu_copy", marks=pytest.mark.slow)])
def test_three_steps_match_ddp(two, run):
    """Also with the snapshot on the host, and with an evaluation and a generation after every step."""
    assert distance(two[0][run], two[0]["ddp"]) < 1e-6


@pytest.mark.slow
def test_smoothed_losses_match_ddp(two):
    """FSDP2 renames the class of a model, by which the Trainer knows whether labels are those of the next tokens."""
    assert distance(two[0]["smoothed"], two[0]["smoothed_ddp"]) < 1e-5
    assert distance(two[0]["smoothed"], two[0]["fsdp"]) > 1e-4


def test_adapters_match_ddp(two):
    assert distance(two[0]["lora"], two[0]["lora_ddp"]) < 1e-6


@pytest.mark.slow
def test_a_bfloat16_checkpoint_is_trained_in_float32(two):
    for rank in two:
        assert rank["bfloat16"]["narrow"] == rank["bfloat16"]["wide"]
        assert rank["bfloat16"]["saved"]


def test_muon_matches_ddp(two):
    """Its orthogonalization computes in bfloat16, where the order of the sum over shards matters."""
    assert distance(two[0]["muon"], two[0]["muon_ddp"]) < 1e-2
    assert distance(two[0]["muon"], two[0]["fsdp"]) > 5e-2


@pytest.mark.parametrize("run", ["fsdp", "lora", "muon", pytest.param("random", marks=pytest.mark.slow)])
def test_ranks_agree(two, run):
    assert two[0][run] == two[1][run]


@pytest.mark.slow
def test_the_random_control_walks_elsewhere(two):
    assert distance(two[0]["random"], two[0]["fsdp"]) > 1e-4


def test_one_scalar_reduction_per_norm(two):
    assert two[0]["scalar_reductions"] == 4 + 1  # one for each inner gradient, one for the pseudo-gradient


def test_an_interrupt_restores_shards_and_evaluation(two):
    for rank in two:
        assert rank["interrupted"]["steps"] == 1
        assert rank["interrupted"]["restored"]
        assert rank["interrupted"]["loss"] == rank["interrupted"]["loss_after"]


@pytest.mark.parametrize("state_dict", STATE_DICTS)
def test_resume_is_bit_exact(two, state_dict):
    for rank in two:
        assert rank[state_dict]["again"] == rank[state_dict]["whole"]


@pytest.mark.parametrize("state_dict", STATE_DICTS)
def test_a_checkpoint_has_what_a_run_builds_its_model_from(two, state_dict):
    for rank in two:
        assert {"config.json", "generation_config.json"} <= set(rank[state_dict]["files"])
        assert ("model.safetensors" in rank[state_dict]["files"]) == (state_dict == "FULL_STATE_DICT")


@pytest.mark.parametrize("state_dict", STATE_DICTS)
def test_the_final_model_is_saved_whole(two, state_dict):
    assert all(rank[state_dict]["saved"] for rank in two)


@pytest.mark.slow
def test_sharded_paths_per_node_match_ddp(sharded_four_ranks):
    """The first path takes no step in the second window."""
    ranks = [rank["node"] for rank in sharded_four_ranks]
    assert distance(ranks[0]["fsdp"], ranks[0]["ddp"]) < 1e-6
    assert all(rank["fsdp"] == ranks[0]["fsdp"] for rank in ranks)


@pytest.mark.slow
def test_sharded_paths_are_averaged_by_one_reduction(sharded_four_ranks):
    """Each of the two ranks of a path sends its half of the model once per outer step, as under DDP."""
    for rank in sharded_four_ranks:
        assert rank["node"]["fsdp_sent"] == rank["node"]["ddp_sent"] == [0.5] * 3


@pytest.mark.slow
@pytest.mark.parametrize("state_dict", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resume_of_sharded_paths_is_bit_exact(slow_four_ranks, state_dict):
    for rank in slow_four_ranks:
        assert rank["resumed paths"][state_dict]["again"] == rank["resumed paths"][state_dict]["whole"]


@pytest.mark.slow
def test_paths_of_other_ranks_than_the_shards_are_an_error(sharded_four_ranks):
    assert "has 1 ranks per path, but the weights are spread over 2" in sharded_four_ranks[0]["node"]["other_size"]


@pytest.mark.slow
def test_hybrid_sharding_on_four_ranks_matches_ddp(sharded_four_ranks):
    ranks = sharded_four_ranks
    assert distance(ranks[0]["hsdp"], ranks[0]["ddp"]) < 1e-5
    assert all(rank["hsdp"] == ranks[0]["hsdp"] for rank in ranks)


@pytest.mark.slow
def test_muon_trains_matrices_of_fewer_rows_than_ranks(slow_four_ranks):
    """It needs a row for each shard. It computes in bfloat16."""
    ranks = [rank["hybrid muon"] for rank in slow_four_ranks]
    assert distance(ranks[0]["hsdp"], ranks[0]["ddp"]) < 1e-2
    assert all(rank["hsdp"] == ranks[0]["hsdp"] for rank in ranks)
