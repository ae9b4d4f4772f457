"""The plan of a mixture: the tokens that a run takes from each source, computed before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..terminal import format_number
from .stages import normalized

__all__ = ["PlanRow", "mixture_plan"]


@dataclass(frozen=True)
class PlanRow:
    """
    One training source in a run: its size if it is known, the share and number of the run's tokens that come from it
    (repetitions included), the same for each stage, and its largest number of epochs.
    """

    source: str
    tokens: int | None
    share: float
    train_tokens: int
    stage_shares: tuple[float, ...]
    stage_tokens: tuple[int, ...]
    max_epochs: float | None = None

    @property
    def epochs(self) -> float | None:
        """Number of passes over the source, `None` where its size is not known."""
        return self.epochs_of(self.train_tokens)

    def epochs_of(self, tokens: int) -> float | None:
        """Number of passes that make up some tokens, `None` where the size is not known."""
        return None if self.tokens is None else tokens / self.tokens


def mixture_plan(
    tokens: Mapping[str, int | None],
    weights: Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]],
    total_tokens: int,
    max_epochs: Mapping[str, float | None] | None = None,
) -> list[PlanRow]:
    """
    The tokens that a run takes from each source: `share * total_tokens`, summed over the stages if there are any.

    `tokens` is the size of each training source, `None` where it is not known. `weights` are the mixture weights, or
    the first token and the weights of each stage.

    Raises:
        ValueError: `tokens` and `weights` name different sources, or a source would exceed its `max_epochs`.
    """
    stages = [(0, weights)] if isinstance(weights, Mapping) else weights
    shares = np.stack([normalized(w, list(tokens)) for _, w in stages])  # (stages, S)
    lengths = np.diff(np.minimum([*(first for first, _ in stages), total_tokens], total_tokens))
    exact = shares * lengths[:, None]
    # Cumulative sums are rounded, which makes the sources add up to the length of the stage.
    whole = np.diff(exact.cumsum(axis=1).round(), axis=1, prepend=0).astype(int)
    rows = [
        PlanRow(
            name,
            size,
            share=float(exact[:, i].sum()) / max(1, total_tokens),
            train_tokens=int(whole[:, i].sum()),
            stage_shares=tuple(shares[:, i].tolist()),
            stage_tokens=tuple(whole[:, i].tolist()),
            max_epochs=(max_epochs or {}).get(name),
        )
        for i, (name, size) in enumerate(tokens.items())
    ]
    for row in rows:
        _check_epochs(row, rows, total_tokens)
    return rows


def _check_epochs(row: PlanRow, rows: list[PlanRow], total_tokens: int) -> None:
    """Raise `ValueError` if a run repeats a source too often."""
    if row.tokens is None or row.max_epochs is None:
        return
    epochs, allowed = row.share * total_tokens / row.tokens, row.max_epochs * row.tokens
    if epochs <= row.max_epochs * (1 + 1e-9):
        return
    # The suggested numbers are rounded down, to be small enough.
    fewer = f"train for at most {int(allowed / row.share):,} tokens"
    weight = f"{int(allowed / total_tokens * 10_000) / 10_000:g}"
    limits = [other.max_epochs * other.tokens for other in rows if other.max_epochs and other.tokens]
    if len(limits) == len(rows) and sum(limits) < total_tokens:
        fix = f"All sources together allow {int(sum(limits)):,} tokens with any weights: {fewer}, or raise max_epochs."
    elif len(row.stage_shares) > 1:
        fix = f"Lower its weights in the stages, to at most {weight} of all tokens, {fewer}, or raise it."
    else:
        fix = f"Set sources.{row.source}.weight to at most {weight} of the sum of weights, {fewer}, or raise it."
    raise ValueError(
        f"sources.{row.source}.max_epochs: a share of {row.share:.4g} of {total_tokens:,} tokens repeats its "
        f"{row.tokens:,} tokens {format_number(epochs, 4)} times, but at most {row.max_epochs:g} is allowed. {fix}"
    )
