"""Gradient cosines between the sources of a run, measured while it goes on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..evaluation.closeness import gradient_cosines

__all__ = ["check_measurable", "source_cosines"]


def check_measurable(trainer: Any) -> None:
    """
    Refuse `gradient_cosine_steps` where the gradients of the sources cannot be had.

    Raises:
        ValueError: there are no sources, they are sharded, or one is a stream without an evaluation set.
    """
    steps = trainer.args.gradient_cosine_steps
    if steps and (trainer.is_fsdp_enabled or trainer.mixture_weights is None):
        raise ValueError(
            f"gradient_cosine_steps={steps} needs a train_dataset of several sources, and is not possible under FSDP. "
            "Set it to 0."
        )
    if steps and (unread := trainer.data.streams_without(trainer.eval_dataset)):
        raise ValueError(
            f"gradient_cosine_steps={steps} needs rows that can be read at any time, and source {unread[0]!r} is a "
            "stream. Give it an evaluation set (eval_split or eval_rows), or set it to 0."
        )


def source_cosines(trainer: Any) -> dict[tuple[str, str], float]:
    """
    Gradient cosine of each pair of sources at the present weights, dropout off. The run does not notice: neither its
    random state nor its gradients change.

    Each source's gradient is taken on the first `per_device_train_batch_size` rows of its evaluation set, or of its
    training rows where it has none; the same on every rank.

    Args:
        trainer ([`NexusTrainerMixin`]):
            With several sources.

    Returns:
        `dict[tuple[str, str], float]`: as [`gradient_cosines`].
    """
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {}

    def loss_of(name: str) -> Any:
        dataset = held_out.get(name, trainer.train_dataset.sources[name])
        rows = range(min(len(dataset), trainer.args.per_device_train_batch_size))
        batch = trainer._prepare_inputs(collate([dataset[i] for i in rows]))

        def loss() -> Tensor:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(trainer.model, dict(batch))

        return loss

    device = trainer.args.device
    devices = [] if device.type == "cpu" else [device]
    trainer.model.eval()
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        params = [p for p in trainer.model.parameters() if p.requires_grad]
        cosines = gradient_cosines({name: loss_of(name) for name in trainer.train_dataset.names}, params)
    trainer.model.train()
    return cosines
