"""Held-out rows as losses of a model at its current weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import default_data_collator

from ..mixture.isolation import PackedRowCollator, attention_of, choose_isolation, isolation_problem, needs_flat_rows
from .losses import TokenMean

if TYPE_CHECKING:
    from ..mixture.loading import Mixture

__all__ = ["HeldOutSet", "held_out_sets"]


@dataclass(frozen=True)
class HeldOutSet:
    """
    Batches of held-out rows. Iterating yields for each batch a function that computes the mean loss of the model, and
    the number of target tokens. Batches are created one by one. `collate` makes batches with `labels`, which the model
    shifts.
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

    def first(self, batches: int) -> "HeldOutSet":
        """The first `batches` batches."""
        return replace(self, rows=self.rows.select(range(min(len(self.rows), batches * self.batch_size))))

    @torch.no_grad()
    def mean_loss(self) -> tuple[float, int]:
        """Loss per token over all rows, and the number of target tokens."""
        mean = TokenMean()
        for loss, tokens in self:
            mean.add(loss(), torch.tensor(tokens))
        total, count = mean.sums.tolist()
        return total / count if count else math.nan, int(count)

    def loss(self) -> float:
        """Loss per token over all rows."""
        return self.mean_loss()[0]


def held_out_sets(model: Any, mixture: "Mixture", batch_size: int) -> dict[str, HeldOutSet]:
    """Held-out rows of each source that has any, OOD sources last. Documents are isolated as in training."""
    wanted = mixture.config.isolate_documents
    isolate = choose_isolation(wanted, None if wanted is False else isolation_problem(model, use_cache=False))
    flatten = needs_flat_rows(attention_of(model))
    collate = PackedRowCollator(default_data_collator, mixture.eos_token_id, isolate, flatten)
    return {name: HeldOutSet(model, rows, collate, batch_size) for name, rows in mixture.eval.items()}
