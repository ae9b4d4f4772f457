"""From the records of arms x seeds to plain tables: means, paired differences, matched training loss, correlation."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

from ..evaluation.statistics import Correlation, Estimate, PairedDifference, correlate, holm, mean, paired_difference
from .records import RunRecord
from .run_figures import at_losses, control_kind, end_figures, in_order, losses_to_match, non_finite

__all__ = ["MIN_PAIRS", "Analysis", "Row", "compare_arms", "incomplete_arms"]

# Below this many paired seeds nothing is tested, and the report draws no conclusion.
MIN_PAIRS = 3

Where = Literal["end", "matched"]
# arm, figure, where -> seed -> value, where it is finite
_Finite = dict[tuple[str, str, Where], dict[int, float]]


@dataclass(frozen=True)
class Row:
    """
    One figure of one arm, and how it differs from that of another.

    Args:
        arm (`str`), versus (`str`), figure (`str`), where (`"end"` or `"matched"`):
            What is compared with what: at the end, or where the training loss was the same.
        mean ([`Estimate`]):
            Over all seeds at which it is finite.
        difference ([`PairedDifference`], *optional*):
            `arm` minus `versus`, over the seeds of which both have the figure; its `p` is left out below 3. `None`
            for the baseline itself, and where no seed is shared.
        p_holm (`float`, *optional*):
            The p-value corrected for all comparisons but the primary one; `None` for the primary one, whose p-value
            stands, and where there is none.
    """

    arm: str
    versus: str
    figure: str
    where: Where
    mean: Estimate
    difference: PairedDifference | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Analysis:
    """
    What `compare_arms` makes of the records: plain data, and what a reader of it must be told.

    Args:
        baseline (`str`), primary (`tuple[str, str]`):
            The arm compared against; arm and figure of the declared comparison, at the end.
        arms (`list[str]`), seeds (`list[int]`), figures (`list[str]`):
            All that were asked for or found, the baseline first, sources last.
        values (`list[tuple[str, int, str, Where, float]]`):
            Arm, seed, figure, `"end"` or `"matched"`, and the value itself, finite or not.
        rows (`list[Row]`):
            Against the baseline, and of the primary arm against each control.
        controls (`dict[str, str]`):
            Arms that do part of what Nexus does, and which: `"gamma 0"` or `"random direction"`.
        missing (`dict[str, list[int]]`):
            For each arm that is incomplete, the seeds without a run.
        non_finite (`list[tuple[str, int, list[str]]]`):
            Arm, seed and figures in no mean, as they are not finite; with `train_loss`, nothing of the run is in one.
        targets (`dict[int, tuple[str, float]]`):
            For each seed the training loss at which arms are matched, and the arm that ended there.
        unmatched (`list[tuple[str, int]]`):
            Runs that never came down to it.
        unconverged (`tuple[int, int]`):
            Searches for a minimizer that ended at their bound, and all there were.
        across_arms ([`Correlation`], *optional*), across_runs ([`Correlation`], *optional*):
            Of relative minima distance and OOD gain over the baseline: over the arms' means, the baseline's at gain 0
            among them; and over the runs of the other arms.
    """

    baseline: str
    primary: tuple[str, str]
    arms: list[str]
    seeds: list[int]
    figures: list[str]
    values: list[tuple[str, int, str, Where, float]]
    rows: list[Row]
    controls: dict[str, str]
    missing: dict[str, list[int]]
    non_finite: list[tuple[str, int, list[str]]]
    targets: dict[int, tuple[str, float]]
    unmatched: list[tuple[str, int]]
    unconverged: tuple[int, int]
    across_arms: Correlation | None
    across_runs: Correlation | None

    def row(self, arm: str, figure: str, where: Where = "end", versus: str | None = None) -> Row | None:
        """One of the rows, if there is such; against the baseline by default."""
        key = (arm, versus or self.baseline, figure, where)
        return next((row for row in self.rows if (row.arm, row.versus, row.figure, row.where) == key), None)


def compare_arms(
    records: Sequence[RunRecord],
    *,
    baseline: str,
    primary: tuple[str, str],
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Analysis:
    """
    Compare arms over seeds, at the end and at matched training loss.

    At matched training loss means: for each seed, the highest of the arms' last training losses, to which all came
    down. What an arm's other losses were when it passed there is read off its curve; figures without a curve are
    compared at the end only. A training loss is `LossPoint.train_loss`, at restored weights.

    Args:
        records (`Sequence[RunRecord]`):
            Of the runs that were completed, in any order.
        baseline (`str`):
            The arm compared against.
        primary (`tuple[str, str]`):
            Arm and figure of the one comparison declared beforehand.
        arms (`Sequence[str]`, *optional*), seeds (`Sequence[int]`, *optional*):
            What was to be run, so that what is missing can be told.

    Raises:
        ValueError: two records are of the same arm and seed, or the primary arm is the baseline.

    Example:
        >>> from hf_nexus.compare.analysis import compare_arms
        >>> from hf_nexus.compare.records import LossPoint, RunRecord
        >>> def run(arm, seed, loss):
        ...     point = LossPoint(9, 900, {"a": loss}, {"a": loss}, {}, loss, loss, None)
        ...     return RunRecord(arm, seed, curve=[point])
        >>> records = [run(a, s, x + s / 10) for a, x in (("adamw", 3.0), ("nexus", 2.9)) for s in range(3)]
        >>> found = compare_arms(records, baseline="adamw", primary=("nexus", "validation_loss"))
        >>> round(found.row("nexus", "validation_loss").difference.mean, 3)
        -0.1
    """
    if primary[0] == baseline:
        raise ValueError(f"The primary arm is compared with the baseline, and both are {baseline!r}: name another.")
    if twice := [key for key, count in Counter((record.arm, record.seed) for record in records).items() if count > 1]:
        raise ValueError(f"Each arm has one record for a seed, got more for {sorted(twice)}: leave the others out.")
    names = list(dict.fromkeys([baseline, *arms, primary[0], *(record.arm for record in records)]))
    runs = {(record.arm, record.seed): record for record in records if record.curve}
    targets = losses_to_match(runs)
    values: list[tuple[str, int, str, Where, float]] = []
    unmatched = []
    for (arm, seed), run in sorted(runs.items(), key=lambda item: (names.index(item[0][0]), item[0][1])):
        values += [(arm, seed, figure, "end", value) for figure, value in end_figures(run).items()]
        matched = at_losses(run, targets[seed][1]) if seed in targets else {}
        values += [(arm, seed, figure, "matched", value) for figure, value in matched.items()]
        if not matched and math.isfinite(run.end.train_loss):
            unmatched.append((arm, seed))
    finite: _Finite = {}
    for arm, seed, figure, where, value in values:
        # Of a run that diverged even what is finite says nothing, such as a share of right answers, which is 0.
        if math.isfinite(value) and math.isfinite(runs[arm, seed].end.train_loss):
            finite.setdefault((arm, figure, where), {})[seed] = value
    kinds = {arm: control_kind(run) for (arm, _), run in runs.items() if arm not in (baseline, primary[0])}
    controls = {arm: kind for arm, kind in kinds.items() if kind is not None}
    searches = [done for run in runs.values() if run.minima for done in run.minima.converged.values()]
    across_arms, across_runs = _correlations(finite, names, baseline)
    return Analysis(
        baseline=baseline,
        primary=primary,
        arms=names,
        seeds=sorted({*seeds, *(seed for _, seed in runs)}),
        figures=in_order(figure for _, _, figure, _, _ in values),
        values=values,
        rows=_rows(finite, names, baseline, primary, controls),
        controls=controls,
        missing=_missing(runs.keys(), names, seeds),
        non_finite=[(*key, wrong) for key, run in sorted(runs.items()) if (wrong := non_finite(run))],
        targets=targets,
        unmatched=unmatched,
        unconverged=(searches.count(False), len(searches)),
        across_arms=across_arms,
        across_runs=across_runs,
    )


def incomplete_arms(records: Sequence[RunRecord], arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """
    The arms that lack a run, each with the seeds it lacks, in words.

    Example:
        >>> from hf_nexus.compare.analysis import incomplete_arms
        >>> incomplete_arms([], ["adamw"], [1, 2])
        ['adamw (seeds 1, 2)']
    """
    missing = _missing({(record.arm, record.seed) for record in records if record.curve}, arms, seeds)
    return [f"{arm} (seed{'s' * (len(gaps) > 1)} {', '.join(map(str, gaps))})" for arm, gaps in missing.items()]


def _missing(there: Set[tuple[str, int]], arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[int]]:
    wanted = sorted({*seeds, *(seed for _, seed in there)})
    return {arm: gaps for arm in arms if (gaps := [seed for seed in wanted if (arm, seed) not in there])}


def _rows(
    finite: _Finite, arms: Sequence[str], baseline: str, primary: tuple[str, str], controls: Mapping[str, str]
) -> list[Row]:
    figures = in_order(figure for _, figure, _ in finite)
    wheres: tuple[Where, ...] = ("end", "matched")
    wanted = [(arm, baseline, figure, where) for where in wheres for figure in figures for arm in arms]
    wanted += [(primary[0], control, primary[1], where) for where in wheres for control in controls]
    rows = [
        Row(arm, versus, figure, where, mean(list(found.values())), None)
        for arm, versus, figure, where in wanted
        if (found := finite.get((arm, figure, where)))
    ]
    for i, row in enumerate(rows):
        own, other = (finite.get((arm, row.figure, row.where), {}) for arm in (row.arm, row.versus))
        if row.arm != row.versus and (shared := sorted(own.keys() & other.keys())):
            difference = paired_difference([own[seed] for seed in shared], [other[seed] for seed in shared])
            tested = difference if difference.n >= MIN_PAIRS else replace(difference, p=None)
            rows[i] = replace(row, difference=tested)
    declared = (primary[0], baseline, primary[1], "end")
    corrected = holm(
        {
            i: row.difference.p
            for i, row in enumerate(rows)
            if row.difference and (row.arm, row.versus, row.figure, row.where) != declared
        }
    )
    return [replace(row, p_holm=corrected.get(i)) for i, row in enumerate(rows)]


def _correlations(
    finite: _Finite, arms: Sequence[str], baseline: str
) -> tuple[Correlation | None, Correlation | None]:
    """Of minima distance and OOD gain: across arms, and across runs."""
    reference = finite.get((baseline, "ood_loss", "end"), {})
    points: dict[str, list[tuple[float, float]]] = {
        baseline: [(d, 0.0) for d in finite.get((baseline, "minima_distance", "end"), {}).values()]
    }
    for arm in arms:
        distances, losses = (finite.get((arm, figure, "end"), {}) for figure in ("minima_distance", "ood_loss"))
        if arm != baseline:
            shared = sorted(distances.keys() & losses.keys() & reference.keys())
            points[arm] = [(distances[seed], reference[seed] - losses[seed]) for seed in shared]
    means = [[mean(side).mean for side in zip(*found, strict=True)] for found in points.values() if found]
    runs = [pair for arm, found in points.items() if arm != baseline for pair in found]
    return _correlation(means), _correlation(runs)


def _correlation(points: Sequence[Sequence[float]]) -> Correlation | None:
    return correlate([x for x, _ in points], [y for _, y in points]) if points else None
