"""
What users switch on beside Nexus. Switches of speed and memory change nothing; those that change the training do what
they do in a loop written by hand around `Nexus`, on the same micro-batches.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_nexus import Nexus, NexusTrainer
from tests.conftest import VOCAB, Rows, tiny_llama

Batch = dict[str, torch.Tensor]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def distance(model: torch.nn.Module, other: torch.nn.Module) -> float:
    return float((weights(model) - weights(other)).norm() / weights(other).norm())


class Recorded(NexusTrainer):
    """Keeps the micro-batches of each window, and the random state in which it began."""

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args)
        self.windows = [*getattr(self, "windows", []), ([dict(b) for b in batches], torch.get_rng_state())]
        return batches, items


def by_hand(
    model: torch.nn.Module,
    windows: list[tuple[list[Batch], torch.Tensor]],
    compute_loss: Callable[[torch.nn.Module, Batch], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    max_grad_norm: float | None = 1.0,
) -> torch.nn.Module:
    """Train the model as a user without a Trainer would."""
    model.train()
    nexus = Nexus(model.parameters())
    for batches, state in windows:
        torch.set_rng_state(state)
        with nexus.window():
            for batch in batches:
                compute_loss(model, batch).backward()
                nexus.inner_step()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return model


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def smoothed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.2)


def noisy_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    embedded = model.get_input_embeddings()(batch["input_ids"])
    bound = 5 / math.sqrt(embedded[0].numel())  # alpha / sqrt(T * d)
    return model(
        inputs_embeds=embedded + torch.empty_like(embedded).uniform_(-bound, bound), labels=batch["labels"]
    ).loss


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


# ---- Switches that change the training ----


@pytest.mark.parametrize(
    ("config", "shape", "compute_loss", "max_grad_norm"),
    [
        ({}, {}, plain_loss, 1.0),
        ({"neftune_noise_alpha": 5.0}, {}, noisy_loss, 1.0),
        ({"label_smoothing_factor": 0.2}, {}, smoothed_loss, 1.0),
        ({}, {"tie_word_embeddings": True}, plain_loss, 1.0),
        ({"max_grad_norm": 0.0}, {}, plain_loss, None),
        ({"max_grad_norm": 0.01, "optim": "sgd", "learning_rate": 10.0}, {}, plain_loss, 0.01),
    ],
    ids=["nothing", "neftune", "label_smoothing", "tied_embeddings", "no_clipping", "clipping"],
)
def test_the_trainer_does_what_a_loop_by_hand_does(make_trainer, sources, config, shape, compute_loss, max_grad_norm):
    """To 1e-5 after 3 outer steps: the loss is divided elsewhere, which AdamW magnifies."""
    trainer = make_trainer(sources, tiny_llama(**shape), trainer_class=Recorded, max_steps=3, **config)
    trainer.train()
    model = tiny_llama(**shape)
    assert distance(model, trainer.model) > 1e-2  # it moves
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0) if "optim" in config else adamw(model)
    by_hand(model, trainer.windows, compute_loss, optimizer, max_grad_norm=max_grad_norm)
    assert distance(model, trainer.model) < 1e-5
    # Without the switch it is something else. (Not so clipping at 1, which a pseudo-gradient never exceeds.)
    if config and max_grad_norm is not None:
        without = tiny_llama(**shape)
        optimizer = torch.optim.SGD(without.parameters(), lr=10.0) if "optim" in config else adamw(without)
        assert distance(by_hand(without, trainer.windows, plain_loss, optimizer), trainer.model) > 1e-4


def test_neftune_repeats_itself_with_the_same_seed(make_trainer, sources):
    def train(**config: Any) -> torch.Tensor:
        trainer = make_trainer(sources, tiny_llama(), neftune_noise_alpha=5.0, **config)
        trainer.train()
        return weights(trainer.model)

    assert torch.equal(train(), train())
    assert not torch.equal(train(), train(seed=1, data_seed=42))


def test_an_optimizer_and_a_scheduler_of_ones_own(make_trainer, sources):
    def own(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    model = tiny_llama()
    trainer = make_trainer(sources, model, {"optimizers": own(model)}, Recorded, max_steps=3)
    trainer.train()
    model = tiny_llama()
    assert distance(by_hand(model, trainer.windows, plain_loss, *own(model)), trainer.model) < 1e-5
    model = tiny_llama()
    assert distance(by_hand(model, trainer.windows, plain_loss, own(model)[0]), trainer.model) > 1e-3


def test_a_mixture_of_experts_trains(make_trainer, sources):
    """With its router's auxiliary loss. Experts that a micro-batch does not reach have no say in its step."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    routers = [name for name, _ in model.named_parameters() if "gate.weight" in name]
    assert len(routers) == 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(sources, model, {"eval_dataset": Rows(8, 0)}, max_steps=8)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.meter.inner_steps_skipped == 0
    assert trainer.evaluate()["eval_loss"] < first - 0.1


# ---- Switches of speed and memory ----


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(make_trainer, sources, reentrant):
    """Dropout included, whose masks the second forward pass has to draw again."""

    def train(**config: Any) -> tuple[torch.Tensor, int]:
        model, calls = tiny_llama(attention_dropout=0.2), [0]
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        trainer = make_trainer(sources, model, max_steps=3, **config)
        trainer.train()
        return weights(trainer.model), calls[0]

    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, calls = train()
    checkpointed, more_calls = train(**settings)
    assert torch.equal(plain, checkpointed)
    assert (calls, more_calls) == (12, 24)  # each layer once more in the backward pass


def test_compiling_matches_to_rounding_with_one_graph(make_trainer, sources):
    """To 1e-5 after 4 outer steps; the moved and restored weights make nothing compile anew."""

    def train(**config: Any) -> torch.nn.Module:
        trainer = make_trainer(sources, tiny_llama(), max_steps=4, **config)
        trainer.train()
        return trainer.model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(torch_compile=True, torch_compile_backend="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    assert distance(compiled, train()) < 1e-5
