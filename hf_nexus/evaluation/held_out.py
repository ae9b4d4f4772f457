"""Held-out rows as losses of a model's present weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import default_data_collator

from ..mixture.isolation import isolated_collator
from .losses import TokenMean

if TYPE_CHECKING:
    from ..mixture.loading import Mixture

__all__ = ["HeldOut", "held_out_rows"]


@dataclass(frozen=True)
class HeldOut:
    """
    Rows as losses: iterating gives for each batch a function that computes the model's mean loss on it, and the number
    of its target tokens. Batches are made as they are asked for.

    Args:
        model (`torch.nn.Module`):
            Whose forward takes `labels`.
        rows (`Sequence`):
            Of one length.
        collate (`Callable[[list], dict[str, Tensor]]`):
            Makes a batch with `labels`, which the model shifts.
        batch_size (`int`):
            Rows of a batch; the last may have fewer.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator
        >>> from hf_nexus.evaluation.held_out import HeldOut
        >>> shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2))
        >>> rows = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 3
        >>> [tokens for _, tokens in HeldOut(model, rows, default_data_collator, 2)]
        [8, 4]
    """

    model: Any
    rows: Any
    collate: Callable[[list], Any]
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Callable[[], Tensor], int]]:
        for start in range(0, len(self.rows), self.batch_size):
            stop = min(start + self.batch_size, len(self.rows))
            batch = self.collate([self.rows[i] for i in range(start, stop)])
            tokens = int((batch["labels"][..., 1:] != -100).sum())
            yield partial(self._loss, {key: value.to(self.model.device) for key, value in batch.items()}), tokens

    def _loss(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False).loss

    def first(self, batches: int) -> "HeldOut":
        """The first batches."""
        rows = self.rows.select(range(min(len(self.rows), batches * self.batch_size)))
        return HeldOut(self.model, rows, self.collate, self.batch_size)

    @torch.no_grad()
    def mean(self) -> tuple[float, int]:
        """Loss per token over all rows, and the number of target tokens."""
        mean = TokenMean()
        for loss, tokens in self:
            mean.add(loss(), torch.tensor(tokens))
        total, count = mean.sums.tolist()
        return total / count if count else math.nan, int(count)


def held_out_rows(model: Any, mixture: "Mixture", batch_size: int) -> dict[str, HeldOut]:
    """The held-out rows of each source that has some, OOD sources last; documents are isolated as in training."""
    wanted, attention = mixture.config.isolate_documents, model.config._attn_implementation
    collate = isolated_collator(default_data_collator, wanted, attention, mixture.eos_token_id)
    return {name: HeldOut(model, rows, collate, batch_size) for name, rows in mixture.eval.items()}
