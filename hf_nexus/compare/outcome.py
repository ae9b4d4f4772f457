"""What a comparison leaves: the report with its pictures, and on each arm's card the losses of the baseline."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.card import save_card
from ..hub.environment import describe_hardware, installed_versions
from ..hub.run_summary import SUMMARY_NAME, RunSummary
from .config import ComparisonConfig
from .plots import plot_comparison
from .records import RunRecord
from .report import comparison_table, write_comparison
from .runs import Run

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["write_outcome"]


def write_outcome(
    config: ComparisonConfig,
    runs: Sequence[Run],
    trials: Sequence[Mapping[str, Any]],
    workers: int,
    seconds: float,
    console: "Console",
) -> Path:
    """
    Write what there is to say about the finished runs, and print the main table.

    Args:
        config ([`ComparisonConfig`]), runs (`Sequence[Run]`):
            The comparison, and all of its runs, finished or not.
        trials (`Sequence[Mapping[str, Any]]`):
            Of the tuning, for its table.
        workers (`int`), seconds (`float`):
            Runs at a time, and how long this call has taken.
        console (`rich.console.Console`):
            For the table.

    Returns:
        `Path`: `report.md` in the comparison's folder.
    """
    folder, baseline = Path(config.output_dir), config.baseline
    primary = (config.primary.arm, config.primary.figure)
    arms, seeds = list(config.arms), config.seeds
    records = [record for run in runs if (record := run.record()) is not None]
    path = write_comparison(
        records,
        folder,
        arms=arms,
        seeds=seeds,
        baseline=baseline,
        primary=primary,
        title=f"Comparison: {', '.join(arms)}",
        details=_details(records, workers, seconds),
        tuning=trials,
        pictures=_draw(records, folder, baseline, console),
    )
    console.print(comparison_table(records, arms=arms, seeds=seeds, baseline=baseline, primary=primary))
    console.print(f"Report: {path}")
    _compare_cards(runs, baseline)
    return path


def _draw(records: Sequence[RunRecord], folder: Path, baseline: str, console: "Console") -> list[Path]:
    """The pictures; a picture that cannot be drawn must not cost the report."""
    try:
        return plot_comparison(records, folder, baseline=baseline) if records else []
    except Exception as error:
        console.print(f"The pictures could not be drawn: {error!r}", markup=False)
        return []


def _details(records: Sequence[RunRecord], workers: int, seconds: float) -> dict[str, Any]:
    details: dict[str, Any] = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{describe_hardware()}, {workers} runs at a time",
        "versions": ", ".join(f"{name} {version}" for name, version in installed_versions().items()),
        "minutes of this call": f"{seconds / 60:.1f}",
    }
    if records:
        details["tokens per run"] = f"{records[0].end.tokens:,}"
        details["minutes of training in all runs"] = f"{sum(record.seconds for record in records) / 60:.1f}"
    return details


def _compare_cards(runs: Sequence[Run], baseline: str) -> None:
    """Put the losses of the baseline under the same seed beside those of each arm, on its card."""
    folders = {(run.arm, run.seed): run.folder for run in runs if (run.folder / SUMMARY_NAME).exists()}
    for (arm, seed), folder in folders.items():
        other = folders.get((baseline, seed))
        if arm == baseline or other is None:
            continue
        summary = RunSummary.load(folder).against(RunSummary.load(other), baseline)
        summary = replace(summary, model_name=f"{arm}, seed {seed}")
        save_card(summary, folder)
        summary.save(folder)
