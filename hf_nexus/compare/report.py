"""The report of a comparison: words, the tables that they rest on, and the numbers for whoever counts again."""

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..files import finite_json
from .analysis import Analysis, compare_arms
from .records import RunRecord
from .tables import (
    all_comparisons,
    comparison_table,
    differences_table,
    main_figures,
    markdown_table,
    means_table,
    plain,
)
from .words import gaps, reading

__all__ = ["CSV_NAME", "JSON_NAME", "REPORT_NAME", "comparison_table", "write_comparison"]

REPORT_NAME, CSV_NAME, JSON_NAME = "report.md", "results.csv", "results.json"


def write_comparison(
    records: Sequence[RunRecord],
    folder: str | os.PathLike[str],
    *,
    baseline: str,
    primary: tuple[str, str],
    title: str,
    details: Mapping[str, Any],
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    tuning: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[Path] = (),
) -> Path:
    """
    Write `report.md`, `results.csv` (each figure of each run) and `results.json` (the tables, and what is in them).

    Args:
        records (`Sequence[RunRecord]`):
            Of the runs that were completed.
        folder (`str` or `os.PathLike`):
            Where to; made if missing.
        baseline, primary, arms, seeds:
            As for [`compare_arms`].
        title (`str`):
            Of the report.
        details (`Mapping[str, Any]`):
            How it was made, such as `command`, `machine`, `versions`, `tokens per run`: plain data, listed as it is.
        tuning (`Sequence[Mapping[str, Any]]`, *optional*):
            The trials of all arms, as lines of a table.
        pictures (`Sequence[Path]`, *optional*):
            Shown in this order.

    Returns:
        `Path`: the report.

    Raises:
        ValueError: as for [`compare_arms`].

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.compare.report import write_comparison
        >>> details = {"command": "hf-nexus compare", "seeds": [1, 2, 3]}
        >>> write_comparison(
        ...     [], mkdtemp(), baseline="adamw", primary=("nexus", "ood_loss"), title="Nothing yet", details=details
        ... ).name
        'report.md'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    analysis = compare_arms(records, baseline=baseline, primary=primary, arms=arms, seeds=seeds)
    with (folder / CSV_NAME).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "figure", "where", "value"])
        writer.writerows(analysis.values)
    everything = {
        "title": title,
        "details": dict(details),
        "settings": {f"{record.arm}/{record.seed}": record.settings for record in records},
        "tuning": [dict(trial) for trial in tuning],
        "analysis": asdict(analysis),
        "reading": reading(analysis),
        "gaps": gaps(analysis),
    }
    text = finite_json(everything, indent=1, default=str)
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    report = folder / REPORT_NAME
    parts = [
        f"# {title}",
        "## Reading",
        *reading(analysis),
        *_compared(analysis, records, details),
        *_tables(analysis, records),
        *_tuning(tuning),
        *_pictures(pictures, folder),
    ]
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def _compared(analysis: Analysis, records: Sequence[RunRecord], details: Mapping[str, Any]) -> list[str]:
    rows = []
    for arm in analysis.arms:
        own = sorted((run for run in records if run.arm == arm and run.curve), key=lambda run: run.seed)
        keys = dict.fromkeys(key for run in own for key in run.settings)
        used = {key: " or ".join(dict.fromkeys(plain(run.settings.get(key)) for run in own)) for key in keys}
        roles = {analysis.baseline: "baseline", analysis.primary[0]: "primary", **analysis.controls}
        seconds = f"{sum(run.seconds for run in own) / len(own):.0f}" if own else "-"
        rows.append([arm, roles.get(arm, ""), plain(used) or "-", plain([run.seed for run in own]) or "none", seconds])
    parts = [
        "## What was compared",
        "\n".join(f"- {name}: {plain(value)}" for name, value in details.items()),
        markdown_table(["arm", "role", "settings", "seeds completed", "seconds per run"], rows),
    ]
    if missing := gaps(analysis):
        parts += ["What is missing or went wrong:", "\n".join(f"- {line}" for line in missing)]
    return [part for part in parts if part]


def _tables(analysis: Analysis, records: Sequence[RunRecord]) -> list[str]:
    if not analysis.figures:
        return []
    end, matched = main_figures(analysis), _matched_figures(analysis)
    others = (
        f"Difference to {analysis.baseline}, paired by seed (95 % interval); p-values are corrected by Holm's method, "
    )
    others += "all together, except that of the primary comparison at the end, in bold."
    parts = [
        "## At the end",
        "Mean over seeds ± half of the 95 % interval. Losses in nats per token, lower is better.",
        means_table(analysis, end, "end"),
        others,
        differences_table(analysis, end, "end"),
        "## At matched training loss",
        _matched_words(analysis, records),
    ]
    if matched:
        parts += [means_table(analysis, matched, "matched"), others, differences_table(analysis, matched, "matched")]
    for where, title in (("end", "at the end"), ("matched", "at matched training loss")):
        if rows := [row for row in analysis.rows if row.where == where]:
            table = all_comparisons(analysis, rows)
            parts += [f"<details><summary>All figures and sources, {title}</summary>", table, "</details>"]
    return parts


def _matched_figures(analysis: Analysis) -> list[str]:
    there = {row.figure for row in analysis.rows if row.where == "matched"}
    return [figure for figure in main_figures(analysis) if figure in there]


def _matched_words(analysis: Analysis, records: Sequence[RunRecord]) -> str:
    reached = {(arm, seed) for arm, seed, _, where, _ in analysis.values if where == "matched"}
    points = [len(record.curve) for record in records if record.curve]
    targets = "; ".join(f"seed {seed}: {loss:.4f} ({arm})" for seed, (arm, loss) in analysis.targets.items())
    text = (
        "For each seed, every arm where its training loss first came down to the highest at which an arm ended "
        f"({targets or 'none'}), interpolated between the points of its curve (a run has {min(points)} or more). "
        "An arm that is read before its end has not finished its learning-rate decay there. Figures without a curve "
        f"cannot be matched. {len(reached)} of {len(points)} runs reached it."
    )
    if analysis.unmatched:
        text += " Not: " + ", ".join(f"{arm} seed {seed}" for arm, seed in analysis.unmatched) + "."
    return text


def _tuning(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    if not trials:
        return []
    counts = Counter(str(trial.get("arm")) for trial in trials)
    budget = "Every arm had as many trials." if len({*counts.values()}) == 1 else f"Trials by arm: {plain(counts)}."
    columns = list(dict.fromkeys(key for trial in trials for key in trial))
    rows = [[plain(trial.get(key)) for key in columns] for trial in trials]
    return ["## Tuning", budget, markdown_table(columns, rows)]


def _pictures(pictures: Sequence[Path], folder: Path) -> list[str]:
    links = [quote(Path(os.path.relpath(path, folder)).as_posix()) for path in pictures]
    shown = [f"![{path.stem.replace('_', ' ')}]({link})" for path, link in zip(pictures, links, strict=True)]
    return ["## Pictures", *shown] if shown else []
