"""Scenarios of four ranks: two paths of two ranks each, as on two machines with two GPUs."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.tiny import Rows
from tests.trainer.distributed.worker import WEIGHTS, Switch, Watch, make, poison, sources, weights

NODE = {"inner_sync": "node", "node_size": 2}
POISONED = {2, 5, 6, 7, 8}  # micro-batches of rank 1, counted from 1: its path takes no step in the second window


class ByGroup(Watch):
    """Counts what is sent inside a path and to other paths, in multiples of the model's size in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.between = [0.0], [0.0]
        self.calls = [(name, getattr(dist, name)) for name in ("all_reduce", "all_gather_into_tensor")]
        for name, call in self.calls:
            setattr(dist, name, self.counted(call))

    def counted(self, call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or dist.group.WORLD
            near = dist.get_process_group_ranks(group) in ([0, 1], [2, 3])
            sizes = [arg.nbytes / 4 for arg in args if isinstance(arg, torch.Tensor)]
            (self.inside if near else self.between)[-1] += min(sizes)
            return call(*args, **kwargs)

        return counted

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass  # the reductions of DDP are ours

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.sources.append(list(self.trainer._window.sources))
        self.inside.append(0)
        self.between.append(0)

    def found(self) -> dict[str, list[float]]:
        """Multiples of the model's size per outer step, to the half."""
        for name, call in self.calls:
            setattr(dist, name, call)
        size = sum(p.numel() for p in self.trainer.model.parameters())
        sent = {"inside": self.inside[:-1], "between": self.between[:-1]}
        return {where: [round(2 * count / size) / 2 for count in counts] for where, counts in sent.items()}


def run(out: Path, data: Any, model: Any = None, poisoned: set[int] | None = None, **config: Any) -> dict[str, Any]:
    watch = ByGroup()
    trainer = watch.trainer = make(out, data, model, **NODE, **config)
    trainer.add_callback(watch)
    if poisoned:
        poison(trainer, 1, poisoned)
    try:
        trainer.train()
    finally:
        sent = watch.found()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {
        "weights": weights(trainer),
        "agree": watch.agree,
        "sent": sent,
        "sources": watch.sources,
        "logs": {key: value for key, value in logs.items() if not key.startswith("tokens_per")},
        "never_moved": float(dict(trainer.model.named_parameters()).get("never", torch.ones(1)).sum()),
    }


def main(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"plain": run(out / "plain", sources(True, 3), mixture_weights=WEIGHTS)}
    found["bf16"] = run(out / "bf16", sources(True, 3), mixture_weights=WEIGHTS, reduce_dtype="bfloat16")
    found["random"] = run(out / "random", sources(), inner_direction="random")
    found["ragged"] = run(out / "ragged", sources(), max_steps=-1, num_train_epochs=2)
    found["none"] = run(out / "none", Rows(64, 3), Switch(), weight_decay=0.1)
    found["nan"] = run(out / "nan", sources(True, 3), mixture_weights=WEIGHTS, poisoned=POISONED)
    save = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = make(out / "whole", sources(), **NODE, **save)
    whole.train()
    again = make(out / "again", sources(), **NODE, **save)
    again.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-6"))
    found["resumed"] = [weights(whole), weights(again)]
    try:
        make(out / "uneven", sources(), inner_sync="node", node_size=3).train()
    except ValueError as error:
        found["uneven"] = str(error)
    return found
