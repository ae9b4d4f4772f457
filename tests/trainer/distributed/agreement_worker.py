"""Run on 2 CPU processes: ranks that differ, and models that were evaluated before training."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_nexus import NexusTrainer
from hf_nexus.trainer import feed
from tests.support.tiny import Rows, tiny_llama
from tests.trainer.distributed.worker import make, sources, weights


def reordered() -> dict[str, Rows]:
    return dict(reversed(sources().items()))


# What the second rank is given instead: data and configuration.
OTHER: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "order": (reordered, {}),
    "names": (lambda: {"txt" if name == "text" else name: rows for name, rows in sources().items()}, {}),
    "size": (lambda: {**sources(), "code": Rows(30, 1)}, {}),
    "plain size": (lambda: Rows(30, 1), {}),
    "weights": (sources, {"mixture_weights": {"text": 1, "code": 1, "math": 2}}),
    "stages": (sources, {"mixture_weights": [{"until": 1.0, "weights": {"text": 1, "code": 1, "math": 2}}]}),
    "seed": (sources, {"seed": 43}),
    "data seed": (sources, {"data_seed": 43}),
    "schedule": (sources, {"source_schedule": "stratified"}),
    "inner_lr": (sources, {"inner_lr": 0.1}),
    "learning rate": (sources, {"learning_rate": 1e-3}),
    "steps": (sources, {"max_steps": 4}),
    "epsilon": (sources, {"adam_epsilon": 1e-3}),
    "precision": (sources, {"bf16": True}),
    "label smoothing": (sources, {"label_smoothing_factor": 0.1}),
    "rows": (lambda: {**sources(), "code": [*Rows(32, 9)]}, {}),
    "plain rows": (lambda: [*Rows(40, 9)], {}),
    "without nexus": (sources, {"nexus": False, "source_schedule": "stratified"}),
}
# The first rank has the data and configuration of `make`, except for these.
FIRST: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain size": (lambda: Rows(40, 1), {}),
    "rows": (lambda: {**sources(), "code": [*Rows(32, 1)]}, {}),
    "plain rows": (lambda: [*Rows(40, 1)], {}),
    "without nexus": (sources, {"nexus": False}),
}


class Unfreeze(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.model.layers[0].requires_grad_(True)


class Change(TrainerCallback):
    """Changes something before the second step: on this rank, a learning rate, or on all, a layer."""

    def __init__(self, what: str):
        self.what = what

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.what == "lr" and dist.get_rank():
            kwargs["optimizer"].param_groups[0]["lr"] *= 2
        elif self.what == "layer":
            model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 32, bias=False)


def changed(out: Path, what: str) -> str:
    trainer = make(out, sources(), lr_scheduler_type="constant")
    trainer.add_callback(Change(what))
    return error(trainer)


def other_optimizer(out: Path) -> str:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + dist.get_rank()))
    return error(make(out, sources(), model, optimizers=(optimizer, None)))


def error(trainer: NexusTrainer) -> str:
    """The error with which training ends, or what was trained."""
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return f"trained {trainer.state.global_step} steps"


def unfrozen(out: Path, again: bool) -> str:
    """Unfreeze a layer that the optimizer has, during training or between two calls of `train()`."""
    model = tiny_llama()
    optimizer = (make_optimizer(model), None)
    model.model.layers[0].requires_grad_(False)
    trainer = make(out, sources(), model, optimizers=optimizer, max_steps=2)
    if not again:
        trainer.add_callback(Unfreeze())
        return error(trainer)
    trainer.train()
    model.model.layers[0].requires_grad_(True)
    return error(trainer)


def evaluated(out: Path, train: bool, first: Any, second: Any) -> str:
    """Each rank has its own evaluation sets."""
    trainer = make(out, sources(), max_steps=1)
    trainer.eval_dataset = first if dist.get_rank() == 0 else second
    if train:
        return error(trainer)
    try:
        return str(trainer.evaluate())
    except ValueError as refusal:
        return str(refusal)


def make_optimizer(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def evaluated_first(out: Path, how: str, **config: Any) -> list[float]:
    trainer = make(out, sources(), **config)
    forward, calls = trainer.model.forward, []

    @wraps(forward)  # as TRL replaces it
    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(trainer.model.training)
        return forward(*args, **kwargs)

    trainer.model.forward = own
    if how == "evaluate":
        trainer.evaluate(Rows(7, 0))
    elif how == "predict":
        trainer.predict(Rows(7, 0))
    trainer.train()
    assert any(calls), "the forward of the model was taken off"
    return weights(trainer)


def other_windows(out: Path) -> str:
    """The second rank draws other sources, although it was given the same."""
    schedule = feed.SourceSchedule

    def other(borders: Any, seed: int, *settings: Any) -> Any:
        return schedule(borders, seed + dist.get_rank(), *settings)

    with patch.object(feed, "SourceSchedule", other):
        trainer = make(out, sources())
        return error(trainer)


def main(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, other in OTHER.items():
        data, config = FIRST.get(name, (sources, {})) if dist.get_rank() == 0 else other
        found[name] = error(make(out, data(), **config))
    for again in (False, True):
        found[f"unfrozen/{again}"] = unfrozen(out, again)
    found |= {f"evaluated/{train}": evaluated(out, train, sources(), reordered()) for train in (False, True)}
    found["evaluated rows"] = evaluated(out, False, *({"text": [*Rows(8, seed)]} for seed in (1, 2)))
    found["windows"] = other_windows(out)
    found["optimizer"] = other_optimizer(out)
    found |= {f"changed {what}": changed(out, what) for what in ("lr", "layer")}
    for how in ("nothing", "evaluate", "predict"):
        found[how] = evaluated_first(out, how, max_steps=2)
        found[f"{how}/bf16"] = evaluated_first(out, how, max_steps=2, bf16=True)
        found[f"{how}/off"] = evaluated_first(out, how, max_steps=2, nexus=False)
    return found
