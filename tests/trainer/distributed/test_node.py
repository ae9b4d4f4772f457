"""`inner_sync="node"` on four CPU processes, as two paths of two ranks."""

from collections import Counter
from collections.abc import Collection

import pytest
import torch

from hf_nexus.trainer.distributed import path_size
from tests.support.tiny import distance
from tests.trainer.distributed.conftest import results_of
from tests.trainer.distributed.node_worker import POISONED
from tests.trainer.distributed.worker import WEIGHTS, make, sources


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> list[dict]:
    return results_of("four_ranks", "node", request)


def two_paths(out, poisoned: Collection[int] = ()) -> list[float]:
    """
    Walk both paths one after the other in one process: half of each micro-batch for each. The first path skips the
    poisoned micro-batches.
    """
    trainer = make(out, sources(True, 3), mixture_weights=WEIGHTS, per_device_train_batch_size=8)
    trainer.create_optimizer_and_scheduler(5)
    model, params = trainer.model, list(trainer.model.parameters())
    batches = iter(trainer.get_train_dataloader())
    gamma, k = trainer.args.inner_lr, trainer.args.gradient_accumulation_steps
    for step in range(5):
        window = [next(batches) for _ in range(k)]
        start, total, moved = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params], 0
        for rows, skipped in ((slice(0, 4), poisoned), (slice(4, 8), ())):
            taken = [batch for m, batch in enumerate(window) if step * k + m + 1 not in skipped]
            moved += bool(taken)
            for batch in taken:
                loss = model(input_ids=batch["input_ids"][rows], labels=batch["labels"][rows]).loss
                gradients = torch.autograd.grad(loss, params)
                norm = torch.cat([g.flatten() for g in gradients]).norm()
                for p, g in zip(params, gradients, strict=True):
                    p.data -= gamma * g / norm
            for p, origin, t in zip(params, start, total, strict=True):
                t += (origin - p.data) / (gamma * max(1, len(taken)))
                p.data.copy_(origin)
        for p, t in zip(params, total, strict=True):
            p.grad = t / moved
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return torch.cat([p.detach().flatten() for p in params]).tolist()


def test_two_paths_of_two_ranks_match_two_paths_in_one_process(ranks, tmp_path):
    assert distance(ranks[0]["plain"]["weights"], two_paths(tmp_path)) < 1e-5


@pytest.mark.parametrize(
    "scenario",
    ["plain", "nan"]
    + [pytest.param(s, marks=pytest.mark.slow) for s in ("bf16", "random", "ragged", "none", "unlike", "off")],
)
def test_all_ranks_are_bit_identical_after_every_outer_step(ranks, scenario):
    for rank in ranks:
        assert rank[scenario]["agree"] and all(rank[scenario]["agree"])
        assert rank[scenario]["weights"] == ranks[0][scenario]["weights"]
        assert rank[scenario]["sources"] == ranks[0][scenario]["sources"]


def test_traffic_between_paths_is_that_of_one_reduction(ranks):
    """Each of the two ranks of a path sends half of the model. Inside are k reductions, and half is gathered."""
    for rank in ranks:
        assert rank["plain"]["sent"] == {"inside": [4.5] * 5, "between": [0.5] * 5}


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("sync", ["node", "local"])
@pytest.mark.slow
def test_paths_meet_as_often_as_plain_accumulation(ranks, sync, k):
    """They send token counts, which gradients there are, the gradients and the buffers, as plain DDP."""
    for rank in ranks:
        calls = rank[f"{sync}_{k}"]["calls"]
        assert Counter(calls["between"]) == Counter(rank["off"]["calls"]["between"])
        assert Counter(calls["between"]) == {"allreduce_": 3, "broadcast_": 1}
        assert len(calls["inside"]) == (3 * k + 1 if sync == "node" else 0)


@pytest.mark.parametrize("sync", ["node", "local"])
@pytest.mark.slow
def test_all_ranks_hold_the_buffers_of_the_first(ranks, sync):
    for rank in ranks:
        assert rank[f"{sync}_normed"]["buffers"] == ranks[0]["global_normed"]["buffers"]


@pytest.mark.parametrize("sync", ["node", "local"])
@pytest.mark.slow
def test_paths_are_averaged_in_one_bucket_of_memory(ranks, sync):
    """Of 25 MB, also for a parameter of 32 MB."""
    for rank in ranks:
        assert rank[f"{sync}_large"]["right"]
        assert rank[f"{sync}_large"]["peak"] < 25 * 2**20 + 1000


@pytest.mark.slow
def test_without_the_update_all_ranks_reduce_again(ranks):
    assert all(rank["turned_off"] == ranks[0]["turned_off"] for rank in ranks)


@pytest.mark.slow
def test_paths_reduce_inside_when_the_update_returns(ranks):
    assert [rank["turned_on"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.slow
def test_a_communication_hook_is_refused_with_node(ranks):
    for rank in ranks:
        assert "The communication hook 'allreduce_hook' with inner_sync='node'" in rank["hooked"][0]
        assert rank["hooked"][1:] == ["", ""]


@pytest.mark.slow
def test_inner_gradients_in_bfloat16_halve_the_traffic_inside(ranks):
    assert ranks[0]["bf16"]["sent"] == {"inside": [2.5] * 5, "between": [0.5] * 5}
    assert 1e-6 < distance(ranks[0]["bf16"]["weights"], ranks[0]["plain"]["weights"]) < 1e-2


@pytest.mark.slow
def test_a_parameter_that_no_path_meets_is_left_alone(ranks):
    assert ranks[0]["none"]["never_moved"] == 3.0  # not shrunk by weight decay


def test_a_path_skips_the_steps_that_are_not_finite(ranks, tmp_path):
    """The path of rank 1 skips 1 + 4 steps, the other none. The average is over the paths that moved."""
    assert ranks[0]["nan"]["logs"]["inner_steps_skipped"] == 2.5
    assert distance(ranks[0]["nan"]["weights"], two_paths(tmp_path, POISONED)) < 1e-5


@pytest.mark.slow
def test_resume_on_four_ranks_is_bit_exact(ranks):
    for rank in ranks:
        assert rank["resumed"][0] == rank["resumed"][1]


def test_groups_of_different_sizes_are_an_error(ranks):
    assert "4 ranks were to be split into groups of 3" in ranks[0]["uneven"]


def test_machines_of_different_sizes_are_an_error(monkeypatch):
    """A rank knows only how many ranks its own machine has."""
    monkeypatch.setattr("hf_nexus.trainer.distributed._ranks", lambda: 4)
    monkeypatch.setattr("hf_nexus.trainer.distributed.gather", lambda size: [size, 4])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="4 ranks were to be split into groups of 2, 4"):
        path_size("node", None)
