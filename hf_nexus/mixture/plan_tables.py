"""The plan of a mixture as tables that fit a terminal of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..files import printable
from ..terminal import new_table
from .plan import PlanRow

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plan_table", "stage_table"]

_SEEN = ("share", "seen", "epochs")


def plan_table(
    rows: Sequence[PlanRow],
    *,
    licenses: Mapping[str, str | None] | None = None,
    ood_tokens: Mapping[str, int | None] | None = None,
) -> "Table":
    """The plan as a table with a total row. The OOD sources and their sizes are listed below the training sources."""
    from rich.text import Text

    def licence(name: str) -> Text:
        return Text("" if licenses is None else printable(licenses.get(name) or "unknown"))

    table = new_table("Mixture", "source", "role", "licence", "tokens", *_SEEN, texts=3)
    for row in rows:
        limit = "" if row.max_epochs is None else f" (max {row.max_epochs:g})"
        seen = _compact(row.train_tokens), _epochs(row.epochs) + limit
        table.add_row(row.source, "train", licence(row.source), _size(row.tokens), f"{row.share:.1%}", *seen)
    for name, size in (ood_tokens or {}).items():
        table.add_row(name, "ood", licence(name), _size(size))
    table.add_section()
    sizes = [row.tokens for row in rows if row.tokens is not None]
    size, total = sum(sizes) if len(sizes) == len(rows) else None, sum(row.train_tokens for row in rows)
    numbers = f"{sum(row.share for row in rows):.1%}", _compact(total), _epochs(None if size is None else total / size)
    table.add_row("total", "train", "", _size(size), *numbers)
    return table


def stage_table(rows: Sequence[PlanRow], titles: Sequence[str]) -> "Table":
    """The plan of each stage as a table, with a title for each."""
    table = new_table("Stages", "stage", "source", *_SEEN, texts=2)
    for stage, title in enumerate(titles):
        table.add_section()
        for row, first_cell in zip(rows, [title] + [""] * len(rows), strict=False):
            tokens = row.stage_tokens[stage]
            numbers = f"{row.stage_shares[stage]:.1%}", _compact(tokens), _epochs(row.epochs_of(tokens))
            table.add_row(first_cell, row.source, *numbers)
    return table


def _size(count: int | None) -> str:
    return "unknown" if count is None else _compact(count)


def _epochs(count: float | None) -> str:
    return "unknown" if count is None else f"{count:.2f}"


def _compact(count: int) -> str:
    """Three digits and a unit. Numbers below 10,000 are written in full."""
    rounded = float(f"{count:.3g}")
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 10_000 and rounded >= size:
            return f"{rounded / size:#.3g}".rstrip(".") + unit
    return f"{count:,}"
