"""What becomes of each source in a run, worked out before training: shares, tokens seen, epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

__all__ = ["PlanRow", "mixture_plan"]


@dataclass(frozen=True)
class PlanRow:
    """
    One training source in a run.

    Attributes:
        source (`str`), tokens (`int`, *optional*):
            Its name and size, where that is known.
        share (`float`), train_tokens (`int`):
            Of the run's tokens: the fraction that is this source's, and how many that is, repetitions included.
        stage_shares (`tuple[float, ...]`), stage_tokens (`tuple[int, ...]`):
            The same of the tokens of each stage.
        max_epochs (`float`, *optional*):
            How often the source may be repeated.
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
        """How often the source is read."""
        return self.epochs_of(self.train_tokens)

    def epochs_of(self, tokens: int) -> float | None:
        """How often so many tokens read the source, `None` where its size is not known."""
        return None if self.tokens is None else tokens / self.tokens


def mixture_plan(
    tokens: Mapping[str, int | None],
    weights: Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]],
    total_tokens: int,
    max_epochs: Mapping[str, float | None] | None = None,
) -> list[PlanRow]:
    """
    How many tokens a run sees of each source: `weight * total_tokens`, summed over the stages if there are any.

    Args:
        tokens (`Mapping[str, int | None]`):
            Size of each training source, `None` where it is not known.
        weights (`Mapping[str, float]` or `Sequence[tuple[int, Mapping[str, float]]]`):
            Shares of the training tokens, for the same sources; scaled to sum to 1. Or for each stage its first token
            and its shares.
        total_tokens (`int`):
            Tokens of the whole run.
        max_epochs (`Mapping[str, float | None]`, *optional*):
            Largest number of epochs of each source, over all stages; `None` for any number.

    Raises:
        ValueError: `tokens` and `weights` name different sources, or a source would be repeated too often.

    Example:
        >>> from hf_nexus.mixture.plan import mixture_plan
        >>> [row.epochs for row in mixture_plan({"web": 800, "code": 100}, {"web": 0.8, "code": 0.2}, 1000)]
        [1.0, 2.0]
    """
    stages = [(0, weights)] if isinstance(weights, Mapping) else list(weights)
    for _, shares in stages:
        if tokens.keys() != shares.keys():
            raise ValueError(
                f"The sizes are of {', '.join(tokens)}, but the weights of {', '.join(shares)}. Give both."
            )
    for name, size in tokens.items():
        if size is not None and size <= 0:
            raise ValueError(f"sources.{name}.tokens: {size} is not allowed; a source must have at least one token.")
    ends = [first for first, _ in stages[1:]] + [total_tokens]
    lengths = [max(0, min(end, total_tokens) - first) for (first, _), end in zip(stages, ends, strict=True)]
    parts = [_split(shares, length) for (_, shares), length in zip(stages, lengths, strict=True)]
    caps = max_epochs or {}
    rows = []
    for name, size in tokens.items():
        fractions = tuple(part[name][0] for part in parts)
        seen = tuple(part[name][1] for part in parts)
        exact = fsum(share * length for share, length in zip(fractions, lengths, strict=True))
        rows.append(PlanRow(name, size, exact / max(1, total_tokens), sum(seen), fractions, seen, caps.get(name)))
    for row in rows:
        if row.max_epochs is None or row.tokens is None:
            continue
        if row.share * total_tokens / row.tokens > row.max_epochs * (1 + 1e-9):
            raise ValueError(_cap_error(row, rows, total_tokens))
    return rows


def _split(weights: Mapping[str, float], total: int) -> dict[str, tuple[float, int]]:
    """The share of each source in `total` tokens and how many that is."""
    total_weight, seen, parts = fsum(weights.values()), 0.0, {}
    for name, weight in weights.items():
        share = weight / total_weight
        before, seen = seen, seen + share * total
        parts[name] = share, round(seen) - round(before)  # rounded together, so that the sources add up to the total
    return parts


def _cap_error(row: PlanRow, rows: list[PlanRow], total_tokens: int) -> str:
    assert row.max_epochs is not None and row.tokens is not None
    allowed = row.max_epochs * row.tokens
    message = (
        f"sources.{row.source}.max_epochs: a share of {row.share:.4g} of {total_tokens:,} tokens repeats its "
        f"{row.tokens:,} tokens {row.share * total_tokens / row.tokens:.3g} times, but {row.max_epochs:g} are allowed."
    )
    # The suggested numbers are rounded down, so that following them ends the error.
    fewer = f"train for at most {int(allowed / row.share):,} tokens"
    capped = [other.max_epochs * other.tokens for other in rows if other.max_epochs and other.tokens]
    if len(capped) == len(rows) and sum(capped) < total_tokens:
        return (
            f"{message} All sources together allow {int(sum(capped)):,} tokens, whatever their weights: {fewer}, or "
            "raise max_epochs."
        )
    weight = int(allowed / total_tokens * 10_000) / 10_000
    lower = f"Set sources.{row.source}.weight to at most {weight:g} of the sum of weights"
    if len(row.stage_shares) > 1:
        lower = f"Lower its weights in the stages, to at most {weight:g} of all tokens"
    return f"{message} {lower}, {fewer}, or raise it."
