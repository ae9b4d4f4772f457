"""Run on 2 CPU processes: all scenarios once. Each rank writes its results to `<out>/rank<r>.json`."""

import contextlib
import errno
import fcntl
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from hf_nexus import NexusConfig, NexusTrainer
from tests.support.tiny import Rows, tiny_llama, two_layers

WEIGHTS = {"text": 0.5, "code": 0.3, "math": 0.2}


def sources(pad: bool = False, times: int = 1) -> dict[str, Rows]:
    rows = {"text": 40, "code": 32, "math": 24}
    return {name: Rows(times * n, i, pad=pad) for i, (name, n) in enumerate(rows.items())}


def make(
    out: Path,
    data: Any,
    model: torch.nn.Module | None = None,
    compute_loss_func: Any = None,
    optimizers: Any = (None, None),
    **config: Any,
) -> NexusTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 5,
        "logging_steps": 5,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = NexusConfig(**{**defaults, **config})
    given = {"compute_loss_func": compute_loss_func, "optimizers": optimizers}
    return NexusTrainer(model or two_layers(), args, train_dataset=data, **given)


def weights(trainer: NexusTrainer) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]).tolist()


class Watch(TrainerCallback):
    """Compares the ranks after each outer step, and counts the traffic of the step."""

    def __init__(self):
        self.trainer: Any = None
        self.agree: list[bool] = []
        self.reductions: list[int] = []
        self.sources: list[list[str]] = []
        self.sent = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.model_wrapped.register_comm_hook(None, allreduce_hook)  # the reductions of DDP also call dist

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        size = sum(p.numel() for p in model.parameters())
        self.reductions.append(round(self.sent / size))
        self.sources.append(list(self.trainer._window.sources))
        self.sent = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, flat)
        self.agree.append(all(torch.equal(g, gathered[0]) for g in gathered))


@contextlib.contextmanager
def counting_all_reduce(watch: Watch):
    """Count what is reduced. Rounding to multiples of the model's size leaves scalars out."""
    real = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        watch.sent += tensor.numel()
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield
    finally:
        dist.all_reduce = real


class Switch(torch.nn.Module):
    """Uses a parameter only for some first tokens. None-gradients therefore differ by rank."""

    def __init__(self):
        super().__init__()
        self.llama = tiny_llama()
        self.extra = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(16)) for _ in range(8)])
        self.config = self.llama.config
        self.never = torch.nn.Parameter(torch.ones(3))

    def forward(self, input_ids=None, labels=None):
        hidden = self.llama.model(input_ids=input_ids).last_hidden_state
        logits = self.llama.lm_head(hidden * self.extra[int(input_ids[0, 0]) % 8])
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss}


def poison(trainer: NexusTrainer, rank: int, calls: set[int]) -> None:
    """Make the loss NaN at the given calls on one rank."""
    compute, count = trainer.compute_loss, [0]

    def poisoned(*args, **kwargs):
        loss = compute(*args, **kwargs)
        count[0] += 1
        return loss * float("nan") if trainer.args.process_index == rank and count[0] in calls else loss

    trainer.compute_loss = poisoned


def run(out: Path, data: Any, model: Any = None, poisoned: set[int] | None = None, **config: Any) -> dict[str, Any]:
    watch = Watch()
    trainer = make(out, data, model, **config)
    watch.trainer = trainer
    trainer.add_callback(watch)
    if poisoned:
        poison(trainer, 1, poisoned)
    with counting_all_reduce(watch):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {
        "weights": weights(trainer),
        "agree": watch.agree,
        "reductions": watch.reductions,
        "sources": watch.sources,
        "logs": {k: v for k, v in logs.items() if not k.startswith("tokens_per")},
        "never_moved": float(dict(trainer.model.named_parameters()).get("never", torch.ones(1)).sum()),
    }


def refused(trainer: NexusTrainer, **kwargs: Any) -> str:
    try:
        trainer.train(**kwargs)
    except ValueError as error:
        return str(error)
    return ""


def main(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sync in ("global", "local"):
        found[sync] = run(out / sync, sources(), inner_sync=sync, mixture_weights=WEIGHTS)
        found[f"{sync}_random"] = run(out / sync, sources(), inner_sync=sync, inner_direction="random")
        found[f"{sync}_ragged"] = run(out / sync, sources(), inner_sync=sync, max_steps=-1, num_train_epochs=2)
        found[f"{sync}_none"] = run(out / sync, Rows(64, 3), Switch(), inner_sync=sync, weight_decay=0.1)
        found[f"{sync}_nan"] = run(out / sync, sources(), inner_sync=sync, poisoned={2, 5, 6, 7, 8})
    padded = {"data": sources(pad=True), "mixture_weights": WEIGHTS}
    found["global_padded"] = run(out / "padded", **padded)
    found["global_own_means"] = run(out / "own", **padded, average_tokens_across_devices=False)
    save = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}  # into the second epoch
    found["whole"] = run(out / "whole", sources(), **save)
    dist.barrier()
    held = patch.object(fcntl, "flock", side_effect=BlockingIOError(errno.EAGAIN, "held"))
    with held if dist.get_rank() == 0 else contextlib.nullcontext():  # by another run
        found["held"] = refused(make(out / "held", sources()))
    own = str(out / "whole" / f"checkpoint-{(3, 6)[dist.get_rank()]}")  # as on two machines that do not share a disk
    found["apart"] = refused(make(out / "apart", sources()), resume_from_checkpoint=own)
    fewer = make(out / "grown", sources(), two_layers(seed=3), **save)  # saved by one process
    fewer.train(resume_from_checkpoint=str(out / "one" / "checkpoint-3"))
    found["grown"] = {"weights": weights(fewer)}
    resumed = make(out / "again", sources(), two_layers(seed=3), **save)
    resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-6"))
    found["resumed"] = {"weights": weights(resumed)}
    hooked = make(out / "hooked", sources(), reduce_dtype="bfloat16")
    hooked.accelerator.ddp_handler = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    found["hooked"] = refused(hooked)
    save["train_sampling_strategy"] = "batch_rebalance"  # the Trainer's sampler of one dataset
    found["rebalanced"] = run(out / "rebalanced", Rows(64, 3), **save)
    resumed = make(out / "rebalanced" / "again", Rows(64, 3), two_layers(seed=3), **save)
    resumed.train(resume_from_checkpoint=str(out / "rebalanced" / "checkpoint-6"))
    found["rebalanced_resumed"] = {"weights": weights(resumed)}
    return found
