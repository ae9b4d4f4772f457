"""Scenarios of four ranks: two paths of two ranks each, as on two machines with two GPUs."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_nexus.trainer.distributed import PathGroups
from tests.support.tiny import Rows, tiny_llama
from tests.trainer.distributed.worker import WEIGHTS, Switch, Watch, make, poison, sources, weights

NODE = {"inner_sync": "node", "node_size": 2}
POISONED = {2, 5, 6, 7, 8}  # micro-batches of rank 1, counted from 1: its path takes no step in the second window


class ByGroup(Watch):
    """Counts what is sent inside a path and to other paths in each outer step, also by DDP itself."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [Step()]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass  # the reductions of DDP are seen

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.sources.append(list(self.trainer._window.sources))
        self.steps.append(Step())

    def found(self) -> dict[str, list[float]]:
        """Multiples of the model's size in float32 per outer step, to the half."""
        size = sum(p.numel() for p in self.trainer.model.parameters())
        sent = {where: [step.floats[where] for step in self.steps[:-1]] for where in ("inside", "between")}
        return {where: [round(2 * count / size) / 2 for count in counts] for where, counts in sent.items()}


class Step:
    """What an outer step sends inside a path and between paths: numbers of float32, and calls by name."""

    def __init__(self) -> None:
        self.floats = {"inside": 0.0, "between": 0.0}
        self.calls: dict[str, list[str]] = {"inside": [], "between": []}

    def note(self, name: str, args: Any) -> None:
        groups = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
        if name == "allgather_" or not groups:  # `Watch` compares the weights
            return
        near = dist.get_process_group_ranks(dist.ProcessGroup.unbox(groups[0])) in ([0, 1], [2, 3])
        where = "inside" if near else "between"
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        if name in ("allreduce_", "_allgather_base_"):
            self.floats[where] += min(t.nbytes for t in tensors) / 4
        self.calls[where].append(name)


class Collectives(TorchDispatchMode):
    """Passes the calls of process groups on to a watch, those from C++ included."""

    def __init__(self, watch: ByGroup):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.watch.steps[-1].note(op._schema.name.removeprefix("c10d::"), args)
        return op(*args, **(kwargs or {}))


class Allocated(TorchDispatchMode):
    """The largest number of bytes that the tensors made inside the context hold at a time, without `known` ones."""

    def __init__(self, known: Iterable[Any]):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.made: list[ref[torch.Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.made += [ref(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage() for made in self.made if (t := made()) is not None]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(size for where, size in held.items() if where not in self.known))
        return result


def average_large(sync: str) -> dict[str, Any]:
    """Average a parameter of more than one bucket, and a small one of another layout, over the paths."""
    groups = PathGroups(sync, 2)
    params = [torch.nn.Parameter(torch.zeros(8_000_001)), torch.nn.Parameter(torch.zeros(3, 5).t())]
    values = [(torch.arange(p.numel(), dtype=torch.float32) % 1000).view_as(p) for p in params]
    for p, value in zip(params, values, strict=True):
        p.grad = torch.empty_like(p).copy_(value + groups.path)
    with Allocated(p.grad for p in params) as allocated:
        groups.average(params, moved=True)
    mean = (groups.paths - 1) / 2
    right = [torch.equal(p.grad, value + mean) for p, value in zip(params, values, strict=True)]
    return {"right": all(right), "peak": allocated.peak}


class Normed(torch.nn.Module):
    """A Llama after which a BatchNorm counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.llama, self.norm = tiny_llama(), torch.nn.BatchNorm1d(1)
        self.config = self.llama.config

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        self.norm(input_ids.float().reshape(-1, 1))
        self.norm.running_mean = self.norm.running_mean.clone()
        return self.llama(input_ids=input_ids, labels=labels)


def run(
    out: Path, data: Any, model: Any = None, *, poisoned: set[int] | None = None, seen: bool = False, **config: Any
) -> dict[str, Any]:
    """A run. What it sends is `seen` only if asked for: a dispatch mode doubles the time."""
    watch = ByGroup()
    trainer = watch.trainer = make(out, data, model, **{**NODE, **config})
    trainer.add_callback(watch)
    if poisoned:
        poison(trainer, 1, poisoned)
    with Collectives(watch) if seen else nullcontext():
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {
        "weights": weights(trainer),
        "buffers": {name: buffer.tolist() for name, buffer in trainer.model.named_buffers()},
        "agree": watch.agree,
        "sent": watch.found(),
        "calls": watch.steps[-2].calls,
        "sources": watch.sources,
        "logs": {key: value for key, value in logs.items() if not key.startswith("tokens_per")},
        "never_moved": float(dict(trainer.model.named_parameters()).get("never", torch.ones(1)).sum()),
    }


def hooked(out: Path, sync: str) -> str:
    """The error of a run with a communication hook, which a callback adds."""
    trainer, watch = make(out / "hooked", sources(), max_steps=1, **{**NODE, "inner_sync": sync}), Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return ""


WEIGHTED: dict[str, Any] = {"mixture_weights": WEIGHTS}


def main(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"plain": run(out / "plain", sources(True, 3), seen=True, **WEIGHTED)}
    found["nan"] = run(out / "nan", sources(True, 3), poisoned=POISONED, **WEIGHTED)
    try:
        make(out / "uneven", sources(), inner_sync="node", node_size=3).train()
    except ValueError as error:
        found["uneven"] = str(error)
    return found


def further(out: Path) -> dict[str, Any]:
    """The scenarios of slow tests."""
    short: dict[str, Any] = {"max_steps": 2, "logging_steps": 2}
    found: dict[str, Any] = {"plain": run(out / "plain", sources(True, 3), **WEIGHTED)}
    found["bf16"] = run(out / "bf16", sources(True, 3), seen=True, reduce_dtype="bfloat16", **WEIGHTED)
    found["random"] = run(out / "random", sources(), inner_direction="random")
    found["ragged"] = run(out / "ragged", sources(), max_steps=-1, num_train_epochs=2)
    found["none"] = run(out / "none", Rows(64, 3), Switch(), weight_decay=0.1)
    found["unlike"] = run(out / "unlike", sources(), tiny_llama(seed=dist.get_rank()))
    for sync in ("global", "node", "local"):
        found[f"{sync}_normed"] = run(out / "normed", sources(), Normed(), inner_sync=sync, **short)
    for sync in ("node", "local"):
        found[f"{sync}_large"] = average_large(sync)
        for k in (2, 6):
            paths = {"inner_sync": sync, "gradient_accumulation_steps": k}
            found[f"{sync}_{k}"] = run(out / "k", sources(), seen=True, **paths, **short)
    found["off"] = run(out / "off", sources(), seen=True, nexus=False, **short)
    turned_off = make(out / "turned_off", sources(), **NODE, **short)
    turned_off.train()
    turned_off.args.nexus = False
    turned_off.train()
    found["turned_off"] = weights(turned_off)
    turned_off.args.nexus = True
    turned_off.train()
    found["turned_on"] = dist.get_process_group_ranks(turned_off.model_wrapped.process_group)
    found["hooked"] = [hooked(out, sync) for sync in ("node", "global", "local")]
    whole = make(out / "whole", sources(), **NODE, max_steps=8, save_strategy="steps", save_steps=6)
    whole.train()
    again = make(out / "again", sources(), **NODE, max_steps=8)
    again.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-6"))
    found["resumed"] = [weights(whole), weights(again)]
    return found
