"""Comparisons of tiny models: their configuration, and records without training."""

import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_nexus.compare.analysis import Test, Where
from hf_nexus.compare.config import ComparisonConfig
from hf_nexus.compare.records import LossPoint, Minima, RunRecord
from hf_nexus.strict import read

ARMS: dict[str, Any] = {"adamw": {"nexus": False}, "nexus": {"inner_lr": 0.05}}
SETTINGS = {
    "adamw": {"nexus": False},
    "gamma-0": {"nexus": True, "inner_lr": 0.0},
    "random": {"nexus": True, "inner_lr": 0.05, "inner_direction": "random"},
    "nexus-0.05": {"nexus": True, "inner_lr": 0.05},
}


def comparison_fields(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A comparison of two arms at three seeds, as in a YAML."""
    return {
        "base": str(base),
        "arms": ARMS,
        "baseline": "adamw",
        "primary": {"arm": "nexus", "metric": "ood_loss"},
        "seeds": [1, 2, 3],
        "output_dir": str(output),
        "training": {"gradient_cosine_steps": 3, "save_strategy": "no", "logging_steps": 1},
        "train_sample_rows": 4,
        "workers": 2,
    } | changes


def make_comparison(base: Path, output: Path, **changes: Any) -> ComparisonConfig:
    return read(ComparisonConfig, comparison_fields(base, output, **changes))


def against_baseline(arm: str = "nexus-0.05", metric: str = "ood_loss", where: Where = "end") -> Test:
    return Test(arm, "adamw", metric, where)


def make_record(
    arm: str,
    seed: int,
    gain: float = 0.0,
    *,
    train: float = 0.0,
    noise: float = 0.002,
    ood: bool = True,
    minima: bool = True,
) -> RunRecord:
    """A run whose OOD loss is `gain` below that of the others, up to noise; `train` is added to its training loss."""
    chance = random.Random(f"{arm} {seed}")
    level = random.Random(seed).gauss(0, 0.05)  # of the seed: pairing removes it
    curve = []
    for i in range(6):
        base = 3.0 + 4.0 * 0.4**i + level
        text, code = base + 0.1 + chance.gauss(0, noise), base - 0.1 + chance.gauss(0, noise)
        law = base + 1.0 - gain + chance.gauss(0, noise)
        curve.append(
            LossPoint(
                step=10 * i,
                tokens=1000 * i,
                train={"text": base + train, "code": base + train},
                validation={"text": text, "code": code},
                ood={"law": law} if ood else {},
                train_loss=base + train,
                validation_loss=(text + code) / 2,
                ood_loss=law if ood else None,
            )
        )
    distance = 2.0 - 20 * gain + 5 * chance.gauss(0, noise)
    found = Minima(
        steps={"text": 5, "code": 5},
        converged={"text": True, "code": False},
        start_loss={"text": 3.0, "code": 3.0},
        end_loss={"text": 2.9, "code": 2.9},
        parameter_norm=10.0,
        to_start={"text": 1.0, "code": 1.0},
        pairwise=[("text", "code", distance)],
        positions=[0.0, 1.0],
        segments=[("text", "code", [2.9, 2.9])],
        barriers=[("text", "code", 0.0)],
    )
    return RunRecord(
        arm,
        seed,
        SETTINGS.get(arm, {"inner_lr": 0.2}),
        curve,
        cosines=[(0, [("text", "code", 0.1)]), (50, [("text", "code", 0.2 + gain + 5 * chance.gauss(0, noise))])],
        downstream={"sums/answer_loss": 1.0 + 5 * chance.gauss(0, noise), "sums/exact_match": 0.0},
        seconds=60.0,
        minima=found if minima else None,
    )


def make_records(gains: Mapping[str, float], seeds: Iterable[int] = range(4), **options: Any) -> list[RunRecord]:
    return [make_record(arm, seed, gain, **options) for arm, gain in gains.items() for seed in seeds]


def diverge(record: RunRecord, at: int = -1) -> None:
    """Make all losses of one point NaN, by default those at the end."""
    point, nan = record.curve[at], math.nan
    losses = {name: dict.fromkeys(getattr(point, name), nan) for name in ("train", "validation", "ood")}
    record.curve[at] = LossPoint(point.step, point.tokens, **losses, train_loss=nan, validation_loss=nan, ood_loss=nan)
