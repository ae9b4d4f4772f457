"""The tables of a comparison: in Markdown for its report, and one for the console."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.statistics import Estimate, PairedDifference
from .analysis import Analysis, Row, Where, compare_arms
from .records import RunRecord

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "all_comparisons",
    "comparison_table",
    "decisive_p",
    "difference_text",
    "differences_table",
    "figure_label",
    "is_primary",
    "main_figures",
    "markdown_table",
    "means_table",
    "p_text",
    "plain",
    "rounded",
]

_LABELS = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "ood_loss": "OOD loss",
    "gradient_cosine": "gradient cosine",
    "minima_distance": "relative minima distance",
    "validation": "validation loss on",
    "ood": "OOD loss on",
}
# More columns than this do not fit beside one another.
_COLUMNS = 6


def comparison_table(
    records: Sequence[RunRecord],
    *,
    baseline: str,
    primary: tuple[str, str],
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> "Table":
    """
    The main figures at the end as a table for the console: means, and differences to the baseline below them.

    Args:
        records, baseline, primary, arms, seeds:
            As for [`compare_arms`].

    Example:
        >>> from hf_nexus.compare.report import comparison_table
        >>> comparison_table([], baseline="adamw", primary=("nexus", "ood_loss")).row_count
        2
    """
    from rich.table import Table

    analysis = compare_arms(records, baseline=baseline, primary=primary, arms=arms, seeds=seeds)
    figures = main_figures(analysis)
    table = Table(title=f"At the end: mean ± half of the 95 % interval; difference to {baseline}, p (Holm)")
    for column in ("arm", *map(figure_label, figures)):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in analysis.arms:
        rows = [analysis.row(arm, figure) for figure in figures]
        cells = [_mean_text(row, analysis) + "\n" + _difference_cell(row, analysis, interval=False) for row in rows]
        table.add_row(arm, *(cell.replace("**", "").rstrip("\n") for cell in cells), end_section=True)
    return table


def means_table(analysis: Analysis, figures: Sequence[str], where: Where) -> str:
    """Arms x figures in Markdown: mean ± half of the 95 % interval."""
    return _per_arm(analysis.arms, figures, lambda arm, f: _mean_text(analysis.row(arm, f, where), analysis))


def differences_table(analysis: Analysis, figures: Sequence[str], where: Where) -> str:
    """Arms x figures in Markdown: paired difference to the baseline, 95 % interval, and the p-value that counts."""
    others = [arm for arm in analysis.arms if arm != analysis.baseline]
    return _per_arm(others, figures, lambda arm, f: _difference_cell(analysis.row(arm, f, where), analysis))


def all_comparisons(analysis: Analysis, rows: Sequence[Row]) -> str:
    """`rows`, one a line, with everything there is to them."""
    lines = []
    for row in rows:
        found, raw = row.difference, None if row.difference is None else row.difference.p
        lines.append(
            [
                figure_label(row.figure),
                row.arm,
                _estimate_text(row.mean),
                str(row.mean.n),
                *(["", "", ""] if found is None else [row.versus, _interval_text(found), str(found.n)]),
                "" if raw is None else p_text(raw),
                "primary" if is_primary(row, analysis) else "" if row.p_holm is None else p_text(row.p_holm),
            ]
        )
    header = ["figure", "arm", "mean", "runs", "against", "difference (95 % interval)", "pairs", "p", "p (Holm)"]
    return markdown_table(header, lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A table in Markdown, whatever the cells hold.

    Example:
        >>> print(markdown_table(["arm", "loss"], [["a|b", "2.0"]]))
        | arm | loss |
        |---|---|
        | a\\|b | 2.0 |
    """
    lines = [header, *rows]
    text = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(header), *text[1:]])


def main_figures(analysis: Analysis) -> list[str]:
    """All but those of single sources."""
    return [figure for figure in analysis.figures if not figure.startswith(("validation/", "ood/"))]


def figure_label(figure: str) -> str:
    """What a reader calls a figure, such as `"OOD loss on readmes"`."""
    kind, _, name = figure.partition("/")
    if kind == "downstream":
        return name
    return _LABELS.get(kind, kind) + (f" {name}" if name else "")


def is_primary(row: Row, analysis: Analysis) -> bool:
    """Whether this is the comparison that was declared beforehand."""
    return (row.arm, row.figure, row.where, row.versus) == (*analysis.primary, "end", analysis.baseline)


def decisive_p(row: Row, analysis: Analysis) -> float | None:
    """The p-value that counts: Holm-corrected, unless the comparison is the primary one."""
    if row.difference is None:
        return None
    return row.difference.p if is_primary(row, analysis) else row.p_holm


def p_text(p: float) -> str:
    """Enough digits to see on which side of 0.05 a p-value is."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.4f}" if 0.045 < p < 0.055 else f"{p:.3f}"


def difference_text(found: PairedDifference) -> str:
    """How much lower or higher, in words."""
    if found.mean == 0:
        return "the same as"
    return f"{rounded(abs(found.mean), found.half)} {'lower' if found.mean < 0 else 'higher'} than"


def rounded(value: float, half: float | None, sign: str = "") -> str:
    """With four decimals, or more where two digits of half its interval ask for them."""
    digits = 4 if not half else min(9, max(4, 1 - math.floor(math.log10(half))))
    return f"{value:{sign}.{digits}f}"


def plain(value: Any) -> str:
    """Plain data in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _per_arm(arms: Sequence[str], figures: Sequence[str], cell: Any) -> str:
    columns = math.ceil(len(figures) / math.ceil(len(figures) / _COLUMNS))  # tables of about the same width
    parts = [figures[i : i + columns] for i in range(0, len(figures), columns)]
    return "\n\n".join(
        markdown_table(
            ["arm", *map(figure_label, part)], [[arm, *(cell(arm, figure) for figure in part)] for arm in arms]
        )
        for part in parts
    )


def _estimate_text(found: Estimate) -> str:
    half = "" if found.half is None else f" ± {rounded(found.half, found.half)}"
    return rounded(found.mean, found.half) + half


def _mean_text(row: Row | None, analysis: Analysis) -> str:
    if row is None:
        return "-"
    return _estimate_text(row.mean) + (f" (n = {row.mean.n})" if row.mean.n < len(analysis.seeds) else "")


def _interval_text(found: PairedDifference) -> str:
    text = rounded(found.mean, found.half, "+")
    if found.low is None or found.high is None:
        return text if found.n == 1 else f"{text} at every seed"
    return f"{text} ({rounded(found.low, found.half, '+')} to {rounded(found.high, found.half, '+')})"


def _difference_cell(row: Row | None, analysis: Analysis, *, interval: bool = True) -> str:
    if row is None or row.difference is None:
        return "-" if interval else ""
    text = _interval_text(row.difference) if interval else rounded(row.difference.mean, row.difference.half, "+")
    p = decisive_p(row, analysis)
    text += "" if p is None else f", p {p_text(p)}"
    return f"**{text}**" if is_primary(row, analysis) else text
