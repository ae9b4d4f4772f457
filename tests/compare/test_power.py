"""Simulated arms of known effect: false positives are as rare, and finds as frequent, as the power analysis says."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from hf_nexus.compare.analysis import Analysis, compare_arms
from hf_nexus.compare.records import LossPoint, RunRecord
from hf_nexus.evaluation.statistics import pairs_needed, power
from tests.support.comparison import against_baseline

SPREAD = 0.03  # standard deviation of the paired differences of two arms


def simulate(gains: dict[str, float], seeds: int, studies: int, **options: Any) -> Iterator[Analysis]:
    """
    Studies of arms whose OOD loss is `gain` lower, at the end and at matched training loss. A seed moves all of its
    runs, each run has noise, and the arms end at different training losses.
    """
    chance = random.Random(0)
    for _ in range(studies):
        records = []
        for seed in range(seeds):
            level = chance.gauss(0, 0.2)
            for place, (arm, gain) in enumerate(gains.items()):
                noise = chance.gauss(0, SPREAD / math.sqrt(2)) - gain
                curve = [
                    LossPoint(i, i, {}, {}, {}, x, x, 2 * x + level + noise)
                    for i, x in enumerate((5.0, 3.0, 2.0 - 0.1 * place))
                ]
                records.append(RunRecord(arm, seed, curve=curve))
        yield compare_arms(records, against_baseline("nexus", where="matched"), **options)


@pytest.mark.slow
def test_false_positives_are_as_rare_as_alpha():
    """0.05 within three standard errors, 0.0185, of 1250 studies; for the primary test and for the whole family."""
    arms = dict.fromkeys(("adamw", "nexus", "other", "third"), 0.0)
    primary = family = 0
    for analysis in simulate(arms, seeds=4, studies=1250):
        primary += analysis.primary_row.p < 0.05
        family += any(row.p < 0.05 for row in analysis.rows if row.role == "family")
    assert primary / 1250 == pytest.approx(0.05, abs=0.0185)
    assert family / 1250 <= 0.05 + 0.0185


@pytest.mark.slow
def test_false_equivalence_is_as_rare_as_alpha():
    """True differences of exactly the margin: 0.05 within three standard errors, 0.0253, of 666 studies."""
    margin, others = 2 * SPREAD, [f"arm-{i}" for i in range(5)]
    gains = {"adamw": 0.0, "nexus": margin} | dict.fromkeys(others, margin)
    primary = family = 0
    for analysis in simulate(gains, seeds=6, studies=666, margin=margin):
        primary += analysis.primary_row.p_equivalent < 0.05
        family += any(row.p_equivalent < 0.05 for row in analysis.rows if row.role == "family")
    assert primary / 666 == pytest.approx(0.05, abs=0.0253)
    assert family / 666 <= 0.05 + 0.0253


@pytest.mark.parametrize("difference", [0.05, 0.03])
def test_effects_are_found_as_often_as_planned(difference):
    """0.8 within three standard errors, 0.049, of 600 studies. A whole number of seeds gives a little more power."""
    seeds = pairs_needed(difference, SPREAD)
    found = [analysis.primary_row for analysis in simulate({"adamw": 0.0, "nexus": difference}, seeds, studies=600)]
    rate = sum(row.p < 0.05 and row.difference.mean < 0 for row in found) / 600
    assert rate == pytest.approx(power(difference, SPREAD, seeds), abs=0.049) and rate > 0.8 - 0.049
