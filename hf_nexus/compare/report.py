"""The report of a comparison: `report.md` and `report.html`, the numbers behind it, and a table for the console."""

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..evaluation.statistics import Estimate
from ..files import finite_json
from ..terminal import new_table
from .analysis import Analysis, Row, Where
from .conclusions import conclusions, limitations, p_text, plain_words, rounded
from .page import write_page
from .records import RunRecord, metric_label

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CSV_NAME", "JSON_NAME", "REPORT_NAME", "console_table", "value_rows", "write_report"]

REPORT_NAME, CSV_NAME, JSON_NAME = "report.md", "results.csv", "results.json"
# Columns of metrics in one table.
_COLUMNS = 6
# Facts about a trial of the tuning that are no settings, and the number of seeds from which on a choice is trusted.
_OF_TRIALS = ("arm", "seeds", "validation_loss", "chosen")
_FEW_SEEDS = 3


def write_report(
    analysis: Analysis,
    records: Sequence[RunRecord],
    folder: str | os.PathLike[str],
    *,
    title: str,
    details: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]] = (),
    plots: Sequence[Path] = (),
) -> Path:
    """
    Write `report.md`, the same as `report.html`, `results.csv` (every metric of every run) and `results.json` (all
    statistics). Returns the path of `report.md`.

    `details` says how the results were made, such as `command` and `versions`. It is listed as it is. The `trials` of
    the tuning have one line each.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.compare.analysis import Test, compare_arms
        >>> from hf_nexus.compare.report import write_report
        >>> analysis = compare_arms([], Test("nexus", "adamw", "ood_loss", "end"))
        >>> write_report(analysis, [], mkdtemp(), title="Nothing yet", details={"seeds": [1, 2, 3]}).name
        'report.md'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / CSV_NAME).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "metric", "where", "value"])
        writer.writerows(value_rows(analysis))
    results: dict[str, Any] = {
        "title": title,
        "details": dict(details),
        "settings": {f"{record.arm}/{record.seed}": record.settings for record in records},
        "tuning": [dict(trial) for trial in trials],
        "analysis": asdict(analysis),
        "conclusions": conclusions(analysis),
        "limitations": [*limitations(analysis), *_limits_of_tuning(trials)],
    }
    (folder / JSON_NAME).write_text(finite_json(results, indent=1, default=str) + "\n", encoding="utf-8")
    paragraphs = [
        f"# {title}",
        "## In plain words",
        plain_words(analysis),
        "## Conclusions",
        *results["conclusions"],
        *_setup(analysis, records, results),
        *_metrics(analysis, records),
        *_tuning(trials),
        *_plots(plots, folder),
    ]
    text = "\n\n".join(paragraphs) + "\n"
    (folder / REPORT_NAME).write_text(text, encoding="utf-8")
    write_page(text, folder, title)
    return folder / REPORT_NAME


def value_rows(analysis: Analysis) -> list[tuple[str, int, str, str, float]]:
    """The lines of `results.csv`: arm, seed, metric, where, and value."""
    return [
        (arm, seed, metric, "end" if versus is None else f"matched with {versus}", value)
        for arm, seed, metric, versus, value in analysis.values
    ]


def console_table(analysis: Analysis, width: int) -> "Table":
    """
    Table of main metrics for a console of `width` columns: the mean of each arm, and its difference to the baseline.
    If not all fit, the primary metric is kept, and the last ones are left to the report.

    Example:
        >>> from hf_nexus.compare.analysis import Test, compare_arms
        >>> from hf_nexus.compare.report import console_table
        >>> console_table(compare_arms([], Test("nexus", "adamw", "ood_loss", "end")), 80).row_count
        2
    """
    metrics = _main_metrics(analysis)
    columns = {metric: [_console_cell(analysis, arm, metric) for arm in analysis.arms] for metric in metrics}
    left = width - 4 - max(map(len, ("arm", *analysis.arms)))
    kept = set[str]()
    for metric in sorted(metrics, key=lambda metric: metric != analysis.primary.metric):
        left -= 3 + max(len(line) for cell in (metric_label(metric), *columns[metric]) for line in cell.split("\n"))
        if left >= 0 or not kept:
            kept.add(metric)
    shown = [metric for metric in metrics if metric in kept]
    title = f"End of training: mean ± half of the 95 % interval; difference to {analysis.baseline}"
    table = new_table(title, "arm", *map(metric_label, shown))
    for row, arm in enumerate(analysis.arms):
        table.add_row(arm, *(columns[metric][row] for metric in shown), end_section=True)
    if left_out := [metric_label(metric) for metric in metrics if metric not in kept]:
        table.caption = f"More metrics are in the report: {', '.join(left_out)}"
    return table


def _console_cell(analysis: Analysis, arm: str, metric: str) -> str:
    row = analysis.row(arm, metric)
    text = f"{_mean(row, analysis)}\n{_difference(row, analysis, interval=False)}".rstrip("\n").replace("**", "")
    return text.replace(", ", "\n").replace(" ± ", "\n± ")


def _setup(analysis: Analysis, records: Sequence[RunRecord], results: Mapping[str, Any]) -> list[str]:
    baseline = "baseline" if analysis.baseline_kind is None else f"baseline, {analysis.baseline_kind}"
    roles = {analysis.baseline: baseline, analysis.primary.arm: "primary", **analysis.controls}
    lines = []
    for arm in analysis.arms:
        runs = sorted((run for run in records if run.arm == arm and run.curve), key=lambda run: run.seed)
        keys = dict.fromkeys(key for run in runs for key in run.settings)
        settings = {key: " or ".join(dict.fromkeys(_plain(run.settings.get(key)) for run in runs)) for key in keys}
        seconds = f"{sum(run.seconds for run in runs) / len(runs):.0f}" if runs else "-"
        seeds = _plain([run.seed for run in runs]) or "none"
        lines.append([arm, roles.get(arm, ""), _plain(settings) or "-", seeds, seconds])
    paragraphs = [
        "## Setup",
        "\n".join(f"- {name}: {_plain(value)}" for name, value in results["details"].items()),
        _markdown(["arm", "role", "settings", "completed seeds", "seconds per run"], lines),
    ]
    if results["limitations"]:
        paragraphs += ["Limitations:", "\n".join(f"- {line}" for line in results["limitations"])]
    return [paragraph for paragraph in paragraphs if paragraph]


def _metrics(analysis: Analysis, records: Sequence[RunRecord]) -> list[str]:
    if not analysis.metrics:
        return []
    end = _main_metrics(analysis)
    matched = [metric for metric in end if any((r.metric, r.where) == (metric, "matched") for r in analysis.rows)]
    paragraphs = [
        "## End of training",
        "Mean over seeds ± half of the 95 % interval; losses in nats per token, lower is better. Then the difference "
        f"to {analysis.baseline}, paired by seed, with its 95 % interval. The primary comparison is bold, and its "
        "p-value is not corrected. A Holm p is corrected for the declared family; the interval next to it is not. "
        "Comparisons without a p-value here are exploratory.",
        *_differences(analysis, end, "end"),
        "## Matched training loss",
        _matching(analysis, records),
        *(_differences(analysis, matched, "matched") if matched else []),
    ]
    for where, title in (("end", "end of training"), ("matched", "matched training loss")):
        if rows := [row for row in analysis.rows if row.where == where]:
            table = _all_comparisons(analysis, rows)
            paragraphs += [f"<details><summary>All metrics and sources, {title}</summary>", table, "</details>"]
    return paragraphs


def _main_metrics(analysis: Analysis) -> list[str]:
    """All metrics except those of single sources."""
    return [metric for metric in analysis.metrics if not metric.startswith(("validation/", "ood/"))]


def _matching(analysis: Analysis, records: Sequence[RunRecord]) -> str:
    points = [len(record.curve) for record in records if record.curve]
    bound = max((row.interpolation for row in analysis.rows), default=0.0)
    lost = "; ".join(f"{arm} and {versus}, seed {seed}" for arm, versus, seed in analysis.unmatched)
    return (
        "Differences of two arms at one training loss: for each seed, the higher one of their final training losses. "
        "The losses are interpolated where each run first reaches it, on a curve of "
        f"{min(points)} or more points. This moves no difference by more than {rounded(bound, bound)}. The run that "
        "gets there before its end has not completed its learning-rate decay. Metrics without a curve are not listed. "
        f"{analysis.pairs - len(analysis.unmatched)} of {analysis.pairs} pairs reach it."
    ) + f" Not: {lost}." * bool(lost)


def _differences(analysis: Analysis, metrics: Sequence[str], where: Where) -> list[str]:
    """Tables of arms by metrics, of about the same width: means at the end, then differences to the baseline."""
    others = [arm for arm in analysis.arms if arm != analysis.baseline]
    columns = math.ceil(len(metrics) / math.ceil(len(metrics) / _COLUMNS))
    tables = []
    kinds = [("mean", analysis.arms, _mean), (f"minus {analysis.baseline}", others, _difference)]
    for title, arms, cell in kinds if where == "end" else kinds[1:]:
        for start in range(0, len(metrics), columns):
            shown = metrics[start : start + columns]
            lines = [[arm, *(cell(analysis.row(arm, metric, where), analysis) for metric in shown)] for arm in arms]
            tables.append(_markdown([title, *map(metric_label, shown)], lines))
    return tables


def _all_comparisons(analysis: Analysis, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        cells = [metric_label(row.metric), row.arm, _estimate(row.mean), str(row.mean.n)]
        if (found := row.difference) is not None:
            role = f"Holm p {_p_cell(row.p_holm)}" if row.p_holm is not None else row.role
            cells += [row.versus, _interval(found), str(found.n), _p_cell(found.p), role]
        lines.append(cells + [""] * (9 - len(cells)))
    header = ["metric", "arm", "mean", "runs", "against", "difference (95 % interval)", "pairs"]
    return _markdown([*header, "p, not corrected", "role"], lines)


def _tuning(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    if not trials:
        return []
    columns = list(dict.fromkeys(key for trial in trials for key in trial))
    lines = [[_plain(trial.get(key)) for key in columns] for trial in trials]
    return ["## Tuning", "All arms have the same number of trials.", _markdown(columns, lines)]


def _limits_of_tuning(trials: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where few seeds have chosen, a difference of arms may be one of their settings."""
    chosen = [trial for trial in trials if trial.get("chosen")]
    names = dict.fromkeys(name for trial in chosen for name in trial if name not in _OF_TRIALS)
    other = [name for name in names if len({str(trial[name]) for trial in chosen if name in trial}) > 1]
    seeds = min((trial.get("seeds", 1) for trial in chosen), default=0)
    if other and seeds < _FEW_SEEDS:
        yield (
            f"The tuning chose other values of {', '.join(other)} for some arms, by {seeds} seed{'s' * (seeds > 1)}: "
            f"a difference may be theirs. Tune on {_FEW_SEEDS} seeds or more (tuning.seeds), or give arms one value."
        )


def _plots(plots: Sequence[Path], folder: Path) -> list[str]:
    links = [quote(Path(os.path.relpath(path, folder)).as_posix()) for path in plots]
    shown = [f"![{path.stem.replace('_', ' ')}]({link})" for path, link in zip(plots, links, strict=True)]
    return ["## Plots", *shown] if shown else []


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """
    A table in Markdown.

    Example:
        >>> print(_markdown(["arm", "loss"], [["a|b", "2.0"]]))
        | arm | loss |
        |---|---|
        | a\\|b | 2.0 |
    """
    first, *rest = (
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in (header, *lines)
    )
    return "\n".join([first, "|" + "---|" * len(header), *rest])


def _mean(row: Row | None, analysis: Analysis) -> str:
    if row is None:
        return "-"
    return _estimate(row.mean) + (f" (n = {row.mean.n})" if row.mean.n < len(analysis.seeds) else "")


def _estimate(found: Estimate) -> str:
    half = "" if found.half is None else f" ± {rounded(found.half, found.half)}"
    return rounded(found.mean, found.half) + half


def _difference(row: Row | None, analysis: Analysis, *, interval: bool = True) -> str:
    if row is None or row.difference is None:
        return "-" if interval else ""
    found, p = row.difference, row.p
    text = _interval(found) if interval else rounded(found.mean, found.half, "+")
    if p is not None and row.role != "exploratory":
        text += f", {'p' if row.role == 'primary' else 'Holm p'} {_p_cell(p)}"
    return f"**{text}**" if row.role == "primary" else text


def _interval(found: Estimate) -> str:
    text = rounded(found.mean, found.half, "+")
    if found.low is None or found.high is None:
        return text if found.n == 1 else f"{text} at every seed"
    return f"{text} ({rounded(found.low, found.half, '+')} to {rounded(found.high, found.half, '+')})"


def _p_cell(p: float | None) -> str:
    return "" if p is None else p_text(p).removeprefix("p = ").removeprefix("p ")


def _plain(value: Any) -> str:
    """Plain data in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split()).replace("<", "&lt;")
