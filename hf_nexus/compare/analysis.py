"""Statistics over the records of all runs: means, paired differences, matched training loss, correlation."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, NamedTuple

from ..evaluation.statistics import (
    Correlation,
    Estimate,
    correlate,
    equivalence_p,
    holm,
    mean,
    paired_difference,
    value_at,
)
from .controls import find_controls
from .records import RunRecord, in_order

__all__ = ["MIN_PAIRS", "Analysis", "Role", "Row", "Test", "Where", "compare_arms"]

# With fewer paired seeds nothing is tested, and the report draws no conclusion.
MIN_PAIRS = 3

Where = Literal["end", "matched"]
Role = Literal["primary", "family", "exploratory"]
# Arm, seed, metric, the arm that it is matched with, `None` at the end of training, and the value.
_Value = tuple[str, int, str, str | None, float]
# Arm, metric and the arm that it is matched with -> seed -> finite value
_Finite = dict[tuple[str, str, str | None], dict[int, float]]


class Test(NamedTuple):
    """A comparison of two arms by a metric."""

    arm: str
    versus: str
    metric: str
    where: Where  # at the end of training, or at matched training loss

    def __str__(self) -> str:
        return f"{self.arm} against {self.versus}, {self.metric} ({self.where})"


@dataclass(frozen=True)
class Row:
    """One metric of one arm, and its difference to another arm."""

    arm: str
    versus: str
    metric: str
    where: Where
    mean: Estimate  # of `arm`, over all seeds with a finite value
    # `arm` minus `versus` over their common seeds, without `p` below `MIN_PAIRS`; `None` if `arm` is `versus`.
    difference: Estimate | None
    role: Role = "exploratory"
    p_holm: float | None = None  # corrected for the declared family; `None` outside of it
    # That the difference is below the margin (TOST), corrected in the same way. `None` for other metrics.
    p_equivalent: float | None = None
    interpolation: float = 0.0  # bound of the error of `difference` by interpolation between evaluations

    @property
    def test(self) -> Test:
        """The comparison that the row holds."""
        return Test(self.arm, self.versus, self.metric, self.where)

    @property
    def p(self) -> float | None:
        """The p-value that decides: Holm-corrected in the declared family, not corrected otherwise."""
        return self.p_holm if self.role == "family" or self.difference is None else self.difference.p


@dataclass(frozen=True)
class Analysis:
    """Statistics of a comparison, as plain data."""

    primary: Test  # of an arm against the baseline
    family: list[Test]  # declared comparisons, whose p-values are corrected together
    margin: float | None  # of the equivalence test of the primary metric
    arms: list[str]  # planned or found, the baseline first
    seeds: list[int]
    metrics: list[str]  # in the order of the report
    values: list[_Value]  # finite or not
    rows: list[Row]  # all arms against the baseline, and the primary arm against each control
    controls: dict[str, str]  # arm -> kind, as of `find_controls`
    unclean: dict[str, tuple[str, list[str]]]  # arms that are no control -> its kind, other fields that differ
    missing: dict[str, list[int]]  # arm -> seeds without a run
    # Arm, seed, and metrics that are not finite. These are in no mean; with `train_loss`, no metric of the run is.
    non_finite: list[tuple[str, int, list[str]]]
    pairs: int  # compared pairs of runs of a seed, without diverged ones
    unmatched: list[tuple[str, str, int]]  # arms and seed of pairs that have no training loss in common
    unconverged: tuple[int, int]  # minima searches that did not converge, and all searches
    # Of relative minima distance and OOD gain over the baseline: over the means of arms, with the baseline at gain 0.
    across_arms: Correlation | None
    baseline_kind: str | None = None  # if the baseline lacks just one ingredient of the primary arm: that of a control
    declared: tuple[list[str], list[int]] | None = None  # arms and seeds before the first results, if known
    ignored: list[str] = field(default_factory=list)  # finished runs of arms or seeds that are not planned

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.primary.versus

    @property
    def primary_row(self) -> Row | None:
        """The primary comparison, if it has values."""
        return self.row(self.primary.arm, self.primary.metric, self.primary.where)

    def row(self, arm: str, metric: str, where: Where = "end", versus: str | None = None) -> Row | None:
        """One row if it exists; against the baseline by default."""
        test = Test(arm, versus or self.baseline, metric, where)
        return next((row for row in self.rows if row.test == test), None)


def compare_arms(
    records: Sequence[RunRecord],
    primary: Test,
    *,
    family: Sequence[Test] | None = None,
    margin: float | None = None,
    arms: Mapping[str, Mapping[str, Any]] = {},
    tuned: Mapping[str, Collection[str]] = {},
    seeds: Sequence[int] = (),
) -> Analysis:
    """
    Compare arms over seeds, at the end of training and at matched training loss.

    The matched training loss of two runs of a seed is the higher one of their final training losses, which both
    reach. The other losses are interpolated where a run first reaches it. Metrics without a curve are compared at the
    end only.

    `primary` compares an arm with the baseline. The p-values of `family` are corrected together: by default, those of
    the primary metric of the other arms against the baseline, and of the primary arm against each control. Those
    without runs count too.

    `arms` has the training fields of each planned arm, and `tuned` those that its tuning chooses. An arm that is not
    planned has the settings of its runs. Runs of `arms` and `seeds` without a record are reported as missing.

    Example:
        >>> from hf_nexus.compare.analysis import Test, compare_arms
        >>> from hf_nexus.compare.records import LossPoint, RunRecord
        >>> def run(arm, seed, loss):
        ...     point = LossPoint(9, 900, {"a": loss}, {"a": loss}, {}, loss, loss, None)
        ...     return RunRecord(arm, seed, curve=[point])
        >>> records = [run(a, s, x + s / 10) for a, x in (("adamw", 3.0), ("nexus", 2.9)) for s in range(3)]
        >>> found = compare_arms(records, Test("nexus", "adamw", "validation_loss", "end"))
        >>> round(found.row("nexus", "validation_loss").difference.mean, 3)
        -0.1
    """
    if twice := [key for key, count in Counter((record.arm, record.seed) for record in records).items() if count > 1]:
        raise ValueError(f"Several records for {sorted(twice)}; each arm has one record for each seed.")
    names = list(dict.fromkeys([primary.versus, *arms, primary.arm, *(record.arm for record in records)]))
    runs = {(record.arm, record.seed): record for record in records if record.curve}
    planned = sorted({*seeds, *(seed for _, seed in runs)})
    values = _end_values(runs, names)
    settings = {**{arm: run.settings for (arm, _), run in runs.items()}, **arms}
    controls, unclean = find_controls(settings, primary.arm, tuned)
    baseline_kind, _ = controls.pop(primary.versus, None), unclean.pop(primary.versus, None)
    if family is None:
        family = _default_family(names, primary, controls)
    tested = [(arm, primary.versus) for arm in names if arm != primary.versus]
    tested += [(primary.arm, control) for control in controls] + [(test.arm, test.versus) for test in family]
    matched, pairs, unmatched = _matched(runs, list(dict.fromkeys(tested)), planned)
    values += [value for value, _ in matched]
    bounds = _by_seed((*value[:4], bound) for value, bound in matched)
    # Even finite values of a diverged run mean nothing, such as an exact match of 0.
    finite = _by_seed(value for value in values if math.isfinite(value[4]) and not runs[value[:2]].diverged)
    return Analysis(
        primary=primary,
        family=list(family),
        margin=margin,
        arms=names,
        seeds=planned,
        metrics=in_order(metric for _, _, metric, _, _ in values),
        values=values,
        rows=_rows(finite, bounds, names, primary, family, controls, margin),
        controls=controls,
        unclean=unclean,
        baseline_kind=baseline_kind,
        missing={arm: gaps for arm in names if (gaps := [seed for seed in planned if (arm, seed) not in runs])},
        non_finite=[(*key, metrics) for key, run in sorted(runs.items()) if (metrics := _non_finite(run))],
        pairs=pairs,
        unmatched=unmatched,
        unconverged=_unconverged(runs.values()),
        across_arms=_correlation(finite, names, primary.versus),
    )


def _end_values(runs: Mapping[tuple[str, int], RunRecord], arms: Sequence[str]) -> list[_Value]:
    in_table = sorted(runs.items(), key=lambda item: (arms.index(item[0][0]), item[0][1]))
    return [(*key, metric, None, value) for key, run in in_table for metric, value in run.metrics().items()]


def _default_family(arms: Sequence[str], primary: Test, controls: Iterable[str]) -> list[Test]:
    """The primary metric of the other arms against the baseline, and of the primary arm against each control."""
    others = [primary._replace(arm=arm) for arm in arms if arm not in primary[:2]]
    return others + [primary._replace(versus=control) for control in controls]


def _by_seed(values: Iterable[_Value]) -> _Finite:
    found: _Finite = {}
    for arm, seed, metric, against, value in values:
        found.setdefault((arm, metric, against), {})[seed] = value
    return found


def _matched(
    runs: Mapping[tuple[str, int], RunRecord], versus: Sequence[tuple[str, str]], seeds: Sequence[int]
) -> tuple[list[tuple[_Value, float]], int, list[tuple[str, str, int]]]:
    """
    The losses of each pair of runs where both have the higher one of their final training losses, each with the bound
    of its interpolation error, the number of pairs, and those of which a run does not reach it.
    """
    values: list[tuple[_Value, float]] = []
    pairs, unmatched = 0, []
    for (a, b), seed in product(versus, seeds):
        one, other = runs.get((a, seed)), runs.get((b, seed))
        if one is None or other is None or one.diverged or other.diverged:
            continue
        pairs += 1
        target = max(one.end.train_loss, other.end.train_loss)
        matched = {(a, b): _losses_at(one, target), (b, a): _losses_at(other, target)}
        if not all(matched.values()):
            unmatched.append((a, b, seed))
            continue
        for (arm, against), losses in matched.items():
            values += [((arm, seed, metric, against, loss), bound) for metric, (loss, bound) in losses.items()]
    return values, pairs, unmatched


def _unconverged(records: Iterable[RunRecord]) -> tuple[int, int]:
    """Number of minima searches that did not converge, and of all."""
    searches = [done for run in records if run.minima for done in run.minima.converged.values()]
    return searches.count(False), len(searches)


def _non_finite(record: RunRecord) -> list[str]:
    """Metrics that are not finite at the end or earlier in training."""
    found = [metric for metric, value in record.metrics().items() if not math.isfinite(value)]
    for point in record.curve[:-1]:
        found += [f"{name} at step {point.step}" for name, loss in point.metrics().items() if not math.isfinite(loss)]
    return found


def _losses_at(record: RunRecord, train_loss: float) -> dict[str, tuple[float, float]]:
    """
    Held-out losses where the training loss first reaches `train_loss`, each with the bound of its interpolation error;
    empty if it never does.
    """
    train = [point.train_loss for point in record.curve]
    curves = [point.metrics() for point in record.curve]
    ends = [metric for metric, loss in curves[-1].items() if metric != "train_loss" and math.isfinite(loss)]
    found = {metric: value_at(train, [curve.get(metric, math.nan) for curve in curves], train_loss) for metric in ends}
    return {metric: loss for metric, loss in found.items() if loss is not None}


def _rows(
    finite: _Finite,
    bounds: _Finite,
    arms: Sequence[str],
    primary: Test,
    family: Sequence[Test],
    controls: Mapping[str, str],
    margin: float | None,
) -> list[Row]:
    metrics = in_order(metric for _, metric, _ in finite)
    wheres: tuple[Where, ...] = ("end", "matched")
    wanted = [primary._replace(arm=a, metric=metric, where=w) for w, metric, a in product(wheres, metrics, arms)]
    wanted += [primary._replace(versus=control, where=w) for w, control in product(wheres, controls)]
    rows: list[Row] = []
    for test in dict.fromkeys([*wanted, *family]):
        arm, versus, metric, where = test
        against = (versus, arm) if where == "matched" else (None, None)
        sides = [(arm, metric, against[0]), (versus, metric, against[1])]
        own, other = (finite.get(side, {}) for side in sides)
        if not own:
            continue
        difference, bound = None, 0.0
        if arm != versus and (shared := sorted(own.keys() & other.keys())):
            difference = paired_difference([own[seed] for seed in shared], [other[seed] for seed in shared])
            if difference.n < MIN_PAIRS:
                difference = replace(difference, p=None)
            bound = math.fsum(bounds.get(side, {}).get(seed, 0.0) for side in sides for seed in shared) / len(shared)
        role: Role = "primary" if test == primary else "family" if test in family else "exploratory"
        rows.append(Row(*test, mean(list(own.values())), difference, role, interpolation=bound))
    tested = [(row, row.difference) for row in rows if row.difference is not None and row.difference.p is not None]
    differ = {row.test: found.p for row, found in tested}
    corrected = holm({test: differ.get(test) for test in family})
    alike = {
        row.test: equivalence_p(found, margin)
        for row, found in tested
        if margin is not None and row.metric == primary.metric
    }
    alike |= holm({test: alike.get(test) for test in family if test.metric == primary.metric})
    return [replace(row, p_holm=corrected.get(row.test), p_equivalent=alike.get(row.test)) for row in rows]


def _correlation(finite: _Finite, arms: Sequence[str], baseline: str) -> Correlation | None:
    """Correlation of minima distance and OOD gain across arms."""
    reference = finite.get((baseline, "ood_loss", None), {})
    points: list[list[float]] = []
    for arm in arms:
        distances, losses = (finite.get((arm, metric, None), {}) for metric in ("minima_distance", "ood_loss"))
        shared = sorted(distances.keys() & (distances if arm == baseline else losses.keys() & reference.keys()))
        gains = [0.0 if arm == baseline else reference[seed] - losses[seed] for seed in shared]
        if shared:
            points.append([mean([distances[seed] for seed in shared]).mean, mean(gains).mean])
    return correlate([x for x, _ in points], [y for _, y in points]) if points else None
