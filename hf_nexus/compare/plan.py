"""The plan of a comparison before it runs: runs, tokens, device hours, and the seeds that a difference needs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.statistics import ALPHA, POWER, detectable, highest_deviation, pairs_needed
from ..pretrain.command_line import from_sections
from ..pretrain.parsing import resolve
from ..pretrain.plan import RunPlan, plan_run
from ..terminal import new_table
from .analysis import Where, compare_arms
from .config import ComparisonConfig
from .records import RunRecord, finished_runs, metric_label

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["pilot_of", "print_plan"]

_PILOT = "pilot"  # subfolder of the comparison
_PILOT_SEEDS = 5
_LABELS: dict[Where, str] = {"end": "at the end", "matched": "at matched training loss"}
_DIFFERENCES = (0.005, 0.01, 0.02, 0.05, 0.1)


def pilot_of(config: ComparisonConfig) -> ComparisonConfig:
    """
    A small comparison of the primary arm and the baseline, on other seeds, that shows the spread of their differences.

    Example:
        >>> from hf_nexus.compare.config import ComparisonConfig
        >>> from hf_nexus.compare.plan import pilot_of
        >>> pilot = pilot_of(ComparisonConfig.load("compare"))
        >>> list(pilot.arms), pilot.seeds, pilot.output_dir
        (['adamw', 'nexus-0.05'], [4, 5, 6, 7, 8], 'runs/compare/pilot')
    """
    first = 1 + max([*config.seeds, *(config.tuning.seeds if config.tuning else [])])
    minima = replace(config.minima, arms=None, seeds=None) if config.minima else None
    return replace(
        config,
        arms={arm: config.arms[arm] for arm in (config.baseline, config.primary.arm)},
        seeds=[*range(first, first + _PILOT_SEEDS)],
        family=[],
        minima=minima if config.primary.metric == "minima_distance" else None,
        benchmarks=config.benchmarks if config.primary.metric.startswith("downstream/") else [],
        push_to=None,
        output_dir=str(Path(config.output_dir, _PILOT)),
    )


def print_plan(config: ComparisonConfig, command: str, differences: Sequence[float], console: "Console") -> None:
    """
    Print the plan of a comparison, from the runs that are in its folder or in that of its pilot. Nothing is trained,
    downloaded or written. `command` runs the comparison. The numbers of seeds are those for each of `differences`, or
    for some common ones.
    """
    pilot, own = (_records(Path(config.output_dir, folder)) for folder in (_PILOT, ""))
    records, left = pilot | own, [(a, s) for a in config.arms for s in config.seeds if (a, s) not in own]
    size = new_table(f"Plan of {config.output_dir}", "", "", texts=2)
    for row in _size(config, len(left), list(records.values())).items():
        size.add_row(*row)
    console.print(size)
    spreads = _spreads(config, list(records.values()))
    if not spreads:
        console.print(
            "Seeds that a difference needs: not known, because no two seeds of both arms have finished. A pilot of "
            f"{_PILOT_SEEDS} other seeds shows the spread: {command} --pilot"
        )
        return
    seeds, higher = len(config.seeds), {key: highest_deviation(*spread) for key, spread in spreads.items()}
    table = new_table("", metric_label(config.primary.metric), *spreads)
    spread_cells = [f"{spread:.2g} to {higher[key]:.2g}, {n} seeds" for key, (spread, n) in spreads.items()]
    table.add_row("spread of the paired differences", *spread_cells)
    unseen = [f"{detectable(spread, seeds):.2g}" if seeds > 1 else "any" for spread, _ in spreads.values()]
    table.add_row(f"cannot be seen with {seeds} seeds: differences below", *unseen, end_section=True)
    for gap in sorted({*(differences or _DIFFERENCES), *filter(None, [config.equivalence_margin])}):
        low_high = [(pairs_needed(gap, s), pairs_needed(gap, higher[key])) for key, (s, _) in spreads.items()]
        needed = [f"{low:,} to {high:,}" for low, high in low_high]
        table.add_row(f"seeds for a difference of {gap:g}", *needed)
    console.print(table)
    console.print(
        f"Paired t-test of {config.primary.arm} against {config.baseline}, two-sided, alpha {ALPHA}, power "
        f"{100 * POWER:.0f} %. Second numbers are for the upper end of the spread's one-sided 80 % interval.",
        highlight=False,
    )


def _records(folder: Path) -> dict[tuple[str, int], RunRecord]:
    """The finished runs of a comparison, of which the plan needs no settings."""
    records = map(RunRecord.load, finished_runs(folder))
    return {(record.arm, record.seed): record for record in records}


def _size(config: ComparisonConfig, left: int, records: Sequence[RunRecord]) -> dict[str, str]:
    """Runs, tokens and device hours."""
    runs, tuning, tokens = len(config.arms) * len(config.seeds), config.tuning, 0
    rows = {"runs": f"{len(config.arms)} arms x {len(config.seeds)} seeds, {left} not finished"}
    plan = _plan(config, {})
    if tuning is not None:
        trials = len(tuning.seeds) * sum(len(list(config.trials(arm))) for arm in config.arms)
        shorter = {} if tuning.max_steps is None else {"max_steps": tuning.max_steps}
        tokens = trials * (_plan(config, shorter).tokens or 0)
        rows["tuning"] = f"{trials} runs, {tokens:,} tokens"
    if plan.tokens is None:
        return rows | {"tokens, device hours": "not known before the data is loaded; set max_steps to know them"}
    rows["tokens"] = f"{plan.tokens:,} per run, {plan.tokens * runs:,} in all runs"
    todo = plan.tokens * left + tokens * (left == runs)
    timed = [record for record in records if record.curve and record.seconds > 0]
    if timed:
        speed = sum(record.end.tokens for record in timed) / sum(record.seconds for record in timed)
        hours = todo / speed * plan.devices / 3600
        text = f"{_hours(hours)} for what is left, at {speed:,.0f} tokens/s in {len(timed)} runs"
    else:
        hours = todo / plan.tokens_per_step * plan.cost.worst * plan.devices / 3600
        text = f"not known: no run has finished here. The arithmetic of what is left takes {_hours(hours)} on the "
        text += "accelerator that `hf-nexus plan` assumes (computed, not measured)"
    rows["device hours"] = f"{text}; without minima searches and question sets"
    return rows


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours >= 0.01 else "under 0.01"


def _plan(config: ComparisonConfig, settings: Mapping[str, Any]) -> RunPlan:
    """The plan of a run of the baseline with other training fields; all arms train on as many tokens."""
    own = {**config.settings(config.baseline), **settings, "output_dir": config.output_dir}
    command_line = from_sections(f"arms.{config.baseline}", config.run_config(own), dry_run=True)
    return plan_run(resolve(command_line), devices=config.devices_per_run)


def _spreads(config: ComparisonConfig, records: Sequence[RunRecord]) -> dict[str, tuple[float, int]]:
    """Standard deviation of the paired differences of the primary metric and their number, by where."""
    if not records:
        return {}
    analysis = compare_arms(records, config.test(config.primary))
    found = {}
    for where, label in _LABELS.items():
        row = analysis.row(config.primary.arm, config.primary.metric, where)
        if row is not None and row.difference is not None and row.difference.deviation is not None:
            found[label] = (row.difference.deviation, row.difference.n)
    return found
