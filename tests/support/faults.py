"""Faults to inject into training, and a check for displaced weights after each."""

import functools
import gc
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus import nexus as nexus_module
from hf_nexus.nexus import Nexus
from hf_nexus.tensors import Snapshot
from tests.support.tiny import Rows, two_layers

K = 4  # inner steps per window
STEPS = 4  # an epoch has 3 windows on one process, and a complete and a short one on two
KINDS = {"SIGINT": KeyboardInterrupt, "SIGTERM": SystemExit, "error": RuntimeError}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def model(seed: int = 0) -> torch.nn.Module:
    """A model with dropout: a resumed run differs unless its random states are right."""
    return two_layers(seed, attention_dropout=0.2)


def make(out: Path, model_: torch.nn.Module | None = None, **config: Any) -> NexusTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": K,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "steps",  # it draws from the random state
        "eval_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = NexusConfig(**{**defaults, **config})
    sources = {"text": Rows(16, 0), "code": Rows(8, 1)}
    return NexusTrainer(model_ or model(), args, train_dataset=sources, eval_dataset=Rows(4, 1))


# ---- The question ----


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def weights(trainer: NexusTrainer) -> Tensor:
    return flat(trainer.model.parameters())


def is_one_of(values: Tensor, steps: list[Tensor]) -> bool:
    return any(torch.equal(values, step) for step in steps)


class AtEvents(TrainerCallback):
    """Calls `call(event)` at the given events, by default at all events."""

    EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_init_end")

    def __init__(self, call: Callable[[str], None], *events: str):
        for event in events or self.EVENTS:
            setattr(self, event, functools.partial(self._at, call, event))

    @staticmethod
    def _at(call: Callable[[str], None], event: str, *args: Any, **kwargs: Any) -> None:
        call(event)


def trajectory(out: Path, **config: Any) -> tuple[list[Tensor], dict[str, float]]:
    """The weights of an uninterrupted run at its start and after each step, and its last log line."""
    trainer = make(out, **config)
    steps = [weights(trainer)]
    trainer.add_callback(AtEvents(lambda event: steps.append(weights(trainer)), "on_step_end"))
    trainer.train()
    assert len(steps) == 1 + STEPS
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(steps))
    gc.freeze()  # the Trainer collects garbage when it starts, which takes more than half of the time of these tests
    return steps, last_log(trainer)


def last_log(trainer: NexusTrainer) -> dict[str, float]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {key: value for key, value in logs.items() if not key.startswith("tokens_per")}


def displaced(trainer: NexusTrainer, steps: list[Tensor], at: int | None = None) -> list[str]:
    """
    List the failures after a fault.

    The model must be at `steps[at]` (by default that of the Trainer's `global_step`) bit for bit, and so must a model
    that is saved now. A saved checkpoint must hold its own step, and any other saved file one of `steps`.
    """
    at = trainer.state.global_step if at is None else at
    found = [] if torch.equal(weights(trainer), steps[at]) else [f"the model is not at step {at}"]
    out = Path(trainer.args.output_dir)
    trainer.save_model(str(out / "after"))
    trainer.accelerator.wait_for_everyone()
    names = [name for name, _ in trainer.model.named_parameters()]
    for file in sorted(out.rglob("*.safetensors")):
        saved = load_file(file)
        step = re.search(r"checkpoint-(\d+)", str(file.relative_to(out)))
        allowed = [steps[int(step[1])]] if step else [steps[at]] if file.parent.name == "after" else steps
        if not is_one_of(flat(saved[name] for name in names), allowed):
            found.append(f"{file.relative_to(out)} holds other weights")
    if not (out / "after" / "model.safetensors").exists():
        found.append("nothing was saved")
    return found


# ---- What can happen ----


class Call:
    """Calls `function` when it is called for the `at`-th time."""

    def __init__(self, at: int, function: Callable[[], None]):
        self.at, self.function, self.calls = at, function, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.function()


class Bomb:
    """Sends a signal or raises an error when it is called for the `at`-th time."""

    def __init__(self, at: int, kind: str = "error"):
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.explode()

    def explode(self) -> None:
        if self.kind == "error":
            raise RuntimeError("injected")
        os.kill(os.getpid(), getattr(signal, self.kind))
        for _ in range(200):  # Python handles it between any two instructions
            time.sleep(0.01)
        raise AssertionError(f"{self.kind} was not handled.")


@contextmanager
def handling_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt and SystemExit inside the context."""

    def leave(signum: int, frame: Any) -> None:
        raise KINDS[signal.Signals(signum).name]

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def before(function: Callable, bomb: Callable[[], None]) -> Callable:
    @functools.wraps(function)  # the Trainer reads the signature of some functions
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bomb()
        return function(*args, **kwargs)

    return wrapped


def after(function: Callable, bomb: Callable[[], None]) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        bomb()
        return result

    return wrapped


def before_restoring(restore: Callable, bomb: Callable[[], None]) -> Callable:
    def wrapped(snapshot: Snapshot) -> None:
        if snapshot._displaced:  # later calls do nothing
            bomb()
        restore(snapshot)

    return wrapped


@contextmanager
def in_backward(trainer: NexusTrainer, bomb: Bomb) -> Iterator[None]:
    handle = trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: bomb())
    try:
        yield
    finally:
        handle.remove()


def in_move(trainer: NexusTrainer, bomb: Bomb) -> AbstractContextManager:
    """Interrupt when half of the tensors are moved."""
    move = nexus_module.add_scaled_

    def broken(targets: list, tensors: list, *args: Any) -> None:
        half = len(targets) // 2
        move(targets[:half], tensors[:half], *args)
        bomb()
        move(targets[half:], tensors[half:], *args)

    return patch.object(nexus_module, "add_scaled_", broken)


def patched(owner: Callable[[NexusTrainer], Any], name: str, when: Callable) -> Callable:
    return lambda trainer, bomb: patch.object(owner(trainer), name, when(getattr(owner(trainer), name), bomb))


# Once per inner step.
IN_INNER_STEPS: dict[str, Callable[[NexusTrainer, Bomb], AbstractContextManager]] = {
    "forward": patched(lambda trainer: trainer.model, "forward", before),
    "after_forward": patched(lambda trainer: trainer, "compute_loss", after),
    "backward": in_backward,
    "after_backward": patched(lambda trainer: trainer.accelerator, "backward", after),
    "move": in_move,
    "collator": patched(lambda trainer: trainer, "data_collator", before),
}
# Once per window.
IN_WINDOWS = {
    "snapshot": patched(lambda trainer: Snapshot, "save", before),
    "pseudo_gradient": patched(lambda trainer: Nexus, "_load_pseudo_gradient", before),
    "restore": patched(lambda trainer: Snapshot, "restore", before_restoring),
    "optimizer": patched(lambda trainer: torch.optim.AdamW, "step", before),
}


def broken_off(trainer: NexusTrainer, place: Callable, bomb: Bomb) -> bool:
    """Train with a bomb, and return whether it exploded."""
    with place(trainer, bomb), handling_signals():
        try:
            trainer.train()
        except KINDS[bomb.kind]:
            return True
    return False


def poison(trainer: NexusTrainer, calls: set[int], rank: int = 0) -> AbstractContextManager:
    """Make the loss NaN at the given calls, on one rank."""
    compute_loss, count = trainer.compute_loss, [0]

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        count[0] += 1
        return loss * float("nan") if trainer.args.process_index == rank and count[0] in calls else loss

    return patch.object(trainer, "compute_loss", poisoned)


def whole_windows(trainer: NexusTrainer) -> list[Tensor]:
    """Records the weights at the start of each window, before each optimizer step, and after it."""
    seen: list[Tensor] = []
    events = ("on_step_begin", "on_pre_optimizer_step", "on_step_end")
    trainer.add_callback(AtEvents(lambda event: seen.append(weights(trainer)), *events))
    return seen
