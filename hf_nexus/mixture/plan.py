"""What becomes of each source in a run, worked out before training: shares, tokens seen, epochs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import MixtureConfig

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PlanRow", "check_map_style", "format_plan", "mixture_plan"]

# Map-style sources are tokenized and packed in full before the first step: two billion tokens are about 8 GB of text
# and 16 GB of cache.
MAP_STYLE_LIMIT = 2_000_000_000


@dataclass(frozen=True)
class PlanRow:
    """
    One training source in a run.

    Attributes:
        source (`str`), tokens (`int`):
            Its name and size.
        share (`float`), train_tokens (`int`):
            Of the run's tokens: the fraction that is this source's, and how many that is, repetitions included.
        epochs (`float`), max_epochs (`float`, *optional*):
            How often the source is repeated, and how often it may be.
    """

    source: str
    tokens: int
    share: float
    train_tokens: int
    epochs: float
    max_epochs: float | None = None


def check_map_style(config: MixtureConfig) -> None:
    """
    Refuse sources that are too large to be loaded whole, from the sizes that the configuration states.

    Raises:
        ValueError: a source of more than two billion known tokens after `max_tokens`.

    Example:
        >>> from hf_nexus.mixture import MixtureConfig
        >>> from hf_nexus.mixture.plan import check_map_style
        >>> web = {"path": "org/web", "tokens": 10_000_000_000, "max_tokens": 1_000_000_000}
        >>> check_map_style(MixtureConfig.from_dict({"sources": {"web": web}, "sequence_length": 1024}))
    """
    for name, source in config.sources.items():
        if source.known_tokens is not None and source.known_tokens > MAP_STYLE_LIMIT:
            raise ValueError(
                f"sources.{name}.tokens: {source.known_tokens:,} tokens are too many to be tokenized before training "
                f"(at most {MAP_STYLE_LIMIT:,} for each source), and streaming is not available yet. Set "
                f"sources.{name}.max_tokens to {MAP_STYLE_LIMIT:,} or less."
            )


def mixture_plan(
    tokens: Mapping[str, int],
    weights: Mapping[str, float],
    total_tokens: int,
    max_epochs: Mapping[str, float | None] | None = None,
) -> list[PlanRow]:
    """
    How many tokens a run sees of each source: `weight * total_tokens`, so `weight * total_tokens / tokens` epochs.

    Args:
        tokens (`Mapping[str, int]`):
            Size of each training source.
        weights (`Mapping[str, float]`):
            Shares of the training tokens, for the same sources; scaled to sum to 1.
        total_tokens (`int`):
            Tokens of the whole run.
        max_epochs (`Mapping[str, float | None]`, *optional*):
            Largest number of epochs of each source, `None` for any number.

    Raises:
        ValueError: `tokens` and `weights` name different sources, or a source would be repeated too often.

    Example:
        >>> from hf_nexus.mixture.plan import mixture_plan
        >>> [row.epochs for row in mixture_plan({"web": 800, "code": 100}, {"web": 0.8, "code": 0.2}, 1000)]
        [1.0, 2.0]
    """
    if tokens.keys() != weights.keys():
        raise ValueError(f"The sizes are of {', '.join(tokens)}, but the weights of {', '.join(weights)}. Give both.")
    caps = max_epochs or {}
    total_weight = sum(weights.values())
    rows: list[PlanRow] = []
    seen = 0.0
    for name, size in tokens.items():
        if size <= 0:
            raise ValueError(f"sources.{name}.tokens: {size} is not allowed; a source must have at least one token.")
        share = weights[name] / total_weight
        before, seen = seen, seen + share * total_tokens
        # Rounded together, so that the sources add up to the run.
        whole = round(seen) - round(before)
        rows.append(PlanRow(name, size, share, whole, share * total_tokens / size, caps.get(name)))
    for row in rows:
        if row.max_epochs is not None and row.epochs > row.max_epochs * (1 + 1e-9):
            raise ValueError(_cap_error(row, rows, total_tokens))
    return rows


def _cap_error(row: PlanRow, rows: list[PlanRow], total_tokens: int) -> str:
    assert row.max_epochs is not None
    allowed = row.max_epochs * row.tokens
    message = (
        f"sources.{row.source}.max_epochs: a share of {row.share:.4g} of {total_tokens:,} tokens repeats its "
        f"{row.tokens:,} tokens {row.epochs:.3g} times, but {row.max_epochs:g} are allowed."
    )
    # The suggested numbers are rounded down, so that following them ends the error.
    fewer = f"train for at most {int(allowed / row.share):,} tokens"
    ceiling = sum(other.max_epochs * other.tokens for other in rows if other.max_epochs is not None)
    if all(other.max_epochs is not None for other in rows) and ceiling < total_tokens:
        return (
            f"{message} All sources together allow {int(ceiling):,} tokens, whatever their weights: {fewer}, or raise "
            "max_epochs."
        )
    weight = int(allowed / total_tokens * 10_000) / 10_000
    return (
        f"{message} Set sources.{row.source}.weight to at most {weight:g} of the sum of weights, {fewer}, or raise it."
    )


def format_plan(
    rows: list[PlanRow],
    *,
    licenses: Mapping[str, str | None] | None = None,
    ood_tokens: Mapping[str, int | None] | None = None,
    steps: int | None = None,
) -> "Table":
    """
    The plan as a table, with a total row.

    Args:
        rows (`list[PlanRow]`):
            From [`mixture_plan`].
        licenses (`Mapping[str, str | None]`, *optional*):
            Licence of each source, OOD sources included.
        ood_tokens (`Mapping[str, int | None]`, *optional*):
            Sizes of the OOD sources, listed below the training sources.
        steps (`int`, *optional*):
            Number of outer steps, for the title.

    Example:
        >>> from rich import print
        >>> from hf_nexus.mixture.plan import format_plan, mixture_plan
        >>> print(format_plan(mixture_plan({"web": 800}, {"web": 1.0}, 1000)))  # doctest: +SKIP
    """
    from rich.table import Table

    def licence(name: str) -> str:
        return "" if licenses is None else licenses.get(name) or "unknown"

    table = Table(title="Mixture" if steps is None else f"Mixture over {steps:,} steps")
    # Numbers keep their width in a narrow terminal; names and licences go on in the next line.
    table.add_column("source", overflow="fold")
    table.add_column("role", no_wrap=True)
    table.add_column("licence", overflow="fold")
    for column in ("tokens", "share", "seen", "epochs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cap = "" if row.max_epochs is None else f" (max {row.max_epochs:g})"
        numbers = (_compact(row.tokens), f"{row.share:.1%}", _compact(row.train_tokens), f"{row.epochs:.2f}{cap}")
        table.add_row(row.source, "train", licence(row.source), *numbers)
    for name, size in (ood_tokens or {}).items():
        table.add_row(name, "ood", licence(name), "unknown" if size is None else _compact(size))
    tokens, seen = sum(row.tokens for row in rows), sum(row.train_tokens for row in rows)
    table.add_section()
    share = f"{sum(r.share for r in rows):.1%}"
    table.add_row("total", "train", "", _compact(tokens), share, _compact(seen), f"{seen / tokens:.2f}")
    return table


def _compact(count: int) -> str:
    """Three digits and a unit; numbers below 10,000 in full."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= max(10_000, 0.9995 * size):  # what rounds to 1000 of a unit is 1.00 of the next
            value = count / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{count:,}"
