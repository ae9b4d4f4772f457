"""The plan of a comparison before it runs: runs, tokens, device hours, and the seeds that a difference needs."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..evaluation.statistics import ALPHA, POWER, detectable, highest_deviation, pairs_needed
from ..pretrain.parsing import parse_arguments
from ..pretrain.plan import RunPlan, plan_run
from .analysis import Where, compare_arms
from .config import ComparisonConfig
from .records import RECORD_NAME, RunRecord, metric_label

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
    minima = replace(config.minima, seeds=None) if config.minima else None
    return replace(
        config,
        arms={arm: config.arms[arm] for arm in (config.baseline, config.primary.arm)},
        seeds=[*range(first, first + _PILOT_SEEDS)],
        family=[],
        minima=minima if config.primary.metric == "minima_distance" else None,
        output_dir=str(Path(config.output_dir, _PILOT)),
    )


def print_plan(config: ComparisonConfig, command: str, differences: Sequence[float], console: "Console") -> None:
    """
    Print the plan of a comparison, from the runs that are in its folder or in that of its pilot.

    Args:
        config ([`ComparisonConfig`]): The comparison. Nothing is trained, downloaded or written.
        command (`str`): The command that runs it, to which `--pilot` may be added.
        differences (`Sequence[float]`): Differences to find the number of seeds for; some common ones if empty.
        console (`rich.console.Console`): Where to print.
    """
    from rich.table import Table

    finished = {(record.arm, record.seed): record for record in _records(Path(config.output_dir, _PILOT))}
    own = {(record.arm, record.seed): record for record in _records(Path(config.output_dir))}
    done = sum((arm, seed) in own for arm in config.arms for seed in config.seeds)
    rows = Table(title=f"Plan of {config.output_dir}", show_header=False)
    for row in _size(config, done, [*finished.values(), *own.values()]).items():
        rows.add_row(*row)
    console.print(rows)
    console.print(
        f"Test: paired t-test of {config.primary.arm} against {config.baseline}, two-sided, alpha {ALPHA}, power "
        f"{100 * POWER:.0f} %, on the {metric_label(config.primary.metric)}."
    )
    spreads = _spreads(config, list((finished | own).values()))
    if not spreads:
        console.print(
            "Seeds that a difference needs: not known, because no two seeds of both arms have finished. A pilot of "
            f"{_PILOT_SEEDS} other seeds shows the spread: {command} --pilot",
            markup=False,
        )
        return
    for where, (deviation, pairs) in spreads.items():
        seeds = len(config.seeds)
        unseen = f"{detectable(deviation, seeds):.2g}" if seeds > 1 else "any size"
        console.print(
            f"{where}: spread of the paired differences {deviation:.2g} ({pairs} seeds, up to "
            f"{highest_deviation(deviation, pairs):.2g} with 80 % confidence). With the {seeds} seeds of the file, "
            f"differences below {unseen} could not be seen.",
            highlight=False,
        )
    table = Table("difference", *spreads, title="Seeds that a difference needs, and up to how many at that spread")
    for size in sorted({*(differences or _DIFFERENCES), *filter(None, [config.equivalence_margin])}):
        cells = [
            f"{pairs_needed(size, spread):,} to {pairs_needed(size, highest_deviation(spread, pairs)):,}"
            for spread, pairs in spreads.values()
        ]
        table.add_row(f"{size:g}", *cells)
    console.print(table)


def _records(folder: Path) -> list[RunRecord]:
    """The finished runs of a comparison, of which the plan needs no settings."""
    return [RunRecord.load(path.parent) for path in sorted(folder.glob(f"arms/*/seed-*/{RECORD_NAME}"))]


def _size(config: ComparisonConfig, done: int, records: Sequence[RunRecord]) -> dict[str, str]:
    """Runs, tokens and device hours."""
    arms, seeds = len(config.arms), len(config.seeds)
    trials = [trial for arm in config.arms for trial in config.trials(arm)]
    plan, tokens, left = _plan(config, {}), 0, None
    rows = {"runs": f"{arms * seeds} ({arms} arms x {seeds} seeds), of which {done} are finished"}
    if config.tuning is not None:
        steps = {} if config.tuning.max_steps is None else {"max_steps": config.tuning.max_steps}
        tokens = (_plan(config, steps).tokens or 0) * len(trials) * len(config.tuning.seeds)
        rows["tuning"] = f"{len(trials) * len(config.tuning.seeds)} runs, {tokens:,} tokens"
    if plan.tokens is None:
        rows["tokens"] = "not known before the data is loaded; set max_steps to know them"
    else:
        left = plan.tokens * (arms * seeds - done) + tokens * (done == 0)
        rows["tokens"] = f"{plan.tokens:,} per run, {plan.tokens * arms * seeds:,} in all runs"
    return rows | {"device hours": _hours(plan, left, records)}


def _hours(plan: RunPlan, tokens: int | None, records: Sequence[RunRecord]) -> str:
    timed = [record for record in records if record.curve and record.seconds > 0]
    if tokens is None:
        return "not known"
    more = "; without minima searches and question sets"
    if timed:
        seconds = sum(record.seconds for record in timed) / sum(record.end.tokens for record in timed)
        speed = f"measured in {len(timed)} runs, evaluations included: {1 / seconds:,.0f} tokens/s"
        return f"{tokens * seconds * plan.devices / 3600:.2g} for what is left, {speed}{more}"
    hours = tokens / plan.tokens_per_step * plan.cost.worst * plan.devices / 3600
    return (
        f"not known: no run has finished here. The arithmetic alone takes {hours:.2g} on the accelerator that "
        f"`hf-nexus plan` assumes (computed, not measured){more}"
    )


def _plan(config: ComparisonConfig, settings: Mapping[str, Any]) -> RunPlan:
    """The plan of a run of the baseline with other training fields; all arms train on as many tokens."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        own = {**config.settings(config.baseline), **settings, "output_dir": config.output_dir}
        yaml.safe_dump(config.run_config(own), file, allow_unicode=True)
        file.flush()
        arguments = parse_arguments(["--config", file.name, "--dry_run"])
    return plan_run(arguments, devices=config.devices_per_run)


def _spreads(config: ComparisonConfig, records: Sequence[RunRecord]) -> dict[str, tuple[float, int]]:
    """Standard deviation of the paired differences of the primary metric and their number, by where."""
    if not records:
        return {}
    primary = (config.primary.arm, config.primary.metric)
    analysis = compare_arms(records, baseline=config.baseline, primary=primary)
    found = {}
    for where, label in _LABELS.items():
        row = analysis.row(*primary, where)
        if row is not None and row.difference is not None and row.difference.deviation is not None:
            found[label] = (row.difference.deviation, row.difference.n)
    return found
