"""The plan of a mixture as tables that fit a terminal of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .plan import PlanRow

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["format_plan", "format_stages"]


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
        >>> from hf_nexus.mixture.plan import mixture_plan
        >>> from hf_nexus.mixture.plan_tables import format_plan
        >>> table = format_plan(mixture_plan({"web": 800}, {"web": 1.0}, 1000), steps=10)
        >>> table.title, list(table.columns[0].cells)
        ('Mixture over 10 steps', ['web', 'total'])
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
        numbers = (_size(row.tokens), f"{row.share:.1%}", _compact(row.train_tokens), f"{_epochs(row.epochs)}{cap}")
        table.add_row(row.source, "train", licence(row.source), *numbers)
    for name, size in (ood_tokens or {}).items():
        table.add_row(name, "ood", licence(name), _size(size))
    seen = sum(row.train_tokens for row in rows)
    tokens = None if any(row.tokens is None for row in rows) else sum(row.tokens or 0 for row in rows)
    table.add_section()
    share = f"{sum(r.share for r in rows):.1%}"
    table.add_row(
        "total", "train", "", _size(tokens), share, _compact(seen), _epochs(None if tokens is None else seen / tokens)
    )
    return table


def format_stages(rows: list[PlanRow], titles: Sequence[str]) -> "Table":
    """
    What each stage takes of each source, as a table.

    Args:
        rows (`list[PlanRow]`):
            From [`mixture_plan`].
        titles (`Sequence[str]`):
            Of the stages.

    Example:
        >>> from hf_nexus.mixture.plan import mixture_plan
        >>> from hf_nexus.mixture.plan_tables import format_stages
        >>> stages = [(0, {"web": 0.9, "code": 0.1}), (800, {"web": 0.5, "code": 0.5})]
        >>> rows = mixture_plan({"web": 800, "code": None}, stages, 1000)
        >>> list(format_stages(rows, ["steps 0 to 80", "steps 80 to 100"]).columns[2].cells)
        ['90.0%', '10.0%', '50.0%', '50.0%']
    """
    from rich.table import Table

    table = Table(title="Stages")
    table.add_column("stage", overflow="fold")
    table.add_column("source", overflow="fold")
    for column in ("share", "seen", "epochs"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, title in enumerate(titles):
        for i, row in enumerate(rows):
            seen = row.stage_tokens[stage]
            numbers = f"{row.stage_shares[stage]:.1%}", _compact(seen), _epochs(row.epochs_of(seen))
            table.add_row("" if i else title, row.source, *numbers, end_section=i == len(rows) - 1)
    return table


def _size(count: int | None) -> str:
    return "unknown" if count is None else _compact(count)


def _epochs(count: float | None) -> str:
    return "unknown" if count is None else f"{count:.2f}"


def _compact(count: int) -> str:
    """Three digits and a unit; numbers below 10,000 in full."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= max(10_000, 0.9995 * size):  # what rounds to 1000 of a unit is 1.00 of the next
            value = count / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{count:,}"
