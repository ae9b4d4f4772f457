"""Evaluation losses that weigh tokens, whatever the batch size and the number of ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch import Tensor

from ..evaluation.losses import TokenMean, mask_rows
from ..mixture.isolation import IsolateDocuments
from .checkpoints import Base

__all__ = ["TokenWeightedMixin", "has_token_labels"]

# What token losses are counted by; the second where a collator has shifted the first.
_LABELS = ("labels", "shift_labels")


def has_token_labels(inputs: Any) -> bool:
    """Whether a batch has labels that are one per token, (B, T) of integers."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point()


class TokenWeightedMixin(Base):
    """
    Makes the loss of an evaluation set the sum of its token losses over the number of its loss tokens.

    The base class averages the mean losses of batches, each weighted by its rows, which depends on how the rows are
    batched where they hold different numbers of loss tokens. Its value stays where there are no token labels, (B, T)
    of integers, or where it does not count loss items itself: with a model that takes no `num_items_in_batch`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._token_mean: TokenMean | None = None  # of the evaluation that is going on
        self._evaluated: Any = None  # its data loader
        self._labels_are_tokens = False  # in the last batch that was evaluated
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The base class's loop; its loss is replaced by the mean over tokens."""
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not self.args.nexus and not self.data.stages:  # this is to be the base class, and nothing else
            return super().evaluation_loop(*arguments)
        mean, outer = TokenMean(), (self._token_mean, self._evaluated)
        self._token_mean, self._evaluated = mean, dataloader
        try:
            output = super().evaluation_loop(*arguments)
        finally:
            self._token_mean, self._evaluated = outer
        sums = mean.sums
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        total, tokens = sums.tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """The base class's step; the loss is the mean over this rank's own rows, whose tokens are counted."""
        tokens = None
        self._labels_are_tokens = has_token_labels(inputs)
        if self._token_mean is None:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        # Over all ranks, upstream would multiply by their number even a loss that does not divide by the count.
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            if self._labels_are_tokens:
                inputs = self._without_repeats(inputs)
                tokens = self._get_num_items_in_batch([inputs], self.args.device)
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = average
        if loss is not None and tokens is not None:
            self._token_mean.add(loss, tokens.sum())
        return loss, logits, labels

    def _without_repeats(self, inputs: Any) -> Any:
        """
        Mask the rows with which accelerate has completed the last batch. They stay in it, since the ranks gather
        outputs of one shape, which upstream cuts itself.
        """
        loader, ranks = self._evaluated, self.args.world_size
        if ranks == 1 or not isinstance(loader, DataLoaderStateMixin):
            return inputs
        # Of the rows of all ranks, one rank's after the other's, `remainder` are real; -1 if nobody knows.
        if not loader.end_of_dataloader or loader.remainder < 1:
            return inputs
        flat = isinstance(self.data_collator, IsolateDocuments) and self.data_collator.flatten
        rows = loader.total_batch_size // ranks if flat else len(inputs["labels"])
        real = min(max(loader.remainder - rows * self.args.process_index, 0), rows)
        return {**inputs, **{name: mask_rows(inputs[name], rows, real) for name in _LABELS if name in inputs}}
