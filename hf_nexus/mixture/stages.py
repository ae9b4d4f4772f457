"""Weights that change during training: a list of stages, each up to a fraction of the run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .strict import known_keys

__all__ = ["Stage", "parse_stages", "stage_borders", "weight_stages"]


@dataclass(frozen=True)
class Stage:
    """
    Weights up to a point of training.

    Args:
        until (`float`):
            Where the stage ends, as a fraction of the outer steps: above 0, and 1.0 for the last stage.
        weights (`dict[str, float]`):
            Shares of the tokens of this stage, relative to each other. 0 leaves a source out of the stage.
    """

    until: float
    weights: dict[str, float]


def parse_stages(value: Any, names: Iterable[str] | None = None, key: str = "stages") -> list[Stage]:
    """
    Read stages from plain data, or check those that were built already.

    Args:
        value (`list[dict]` or `list[Stage]`):
            For instance `[{"until": 0.8, "weights": {"web": 1, "code": 0}}, {"until": 1.0, "weights": ...}]`.
        names (`Iterable[str]`, *optional*):
            The training sources. Those of the first stage by default.
        key (`str`, *optional*, defaults to `"stages"`):
            Named in errors.

    Raises:
        ValueError: an unknown or missing key, fractions that do not rise to 1, weights that do not name every training
            source or are negative, or a source without weight in all stages.

    Example:
        >>> from hf_nexus.mixture.stages import parse_stages
        >>> parse_stages([{"until": 1.0, "weights": {"web": 3, "code": 1}}])
        [Stage(until=1.0, weights={'web': 3.0, 'code': 1.0})]
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(
            f"{key}: {value!r} is no list of stages. Give one or more, as in `[{{until: 0.8, weights: {{web: 1}}}}, "
            "{until: 1.0, weights: {web: 1}}]`."
        )
    expected = None if names is None else list(names)
    stages: list[Stage] = []
    for i, entry in enumerate(value):
        where = f"{key}[{i}]"
        fields = vars(entry) if isinstance(entry, Stage) else known_keys(entry, Stage, where)
        weights = _check_weights(f"{where}.weights", fields["weights"], expected)
        expected = expected or list(weights)
        before = stages[-1].until if stages else 0.0
        stages.append(
            Stage(_check_until(f"{where}.until", fields["until"], before, last=i == len(value) - 1), weights)
        )
    for name in stages[0].weights:
        if all(stage.weights[name] == 0 for stage in stages):
            raise ValueError(f"{key}: the source {name!r} has no weight in any stage. Give it one, or remove it.")
    return stages


def _check_until(key: str, value: Any, before: float, last: bool) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if last and (not number or value != 1):
        raise ValueError(f"{key}: {value!r} is not allowed; the last stage ends with training, at 1.0.")
    if not number or not before < value <= 1 or (value == 1 and not last):
        raise ValueError(
            f"{key}: {value!r} is not allowed; each stage ends at a fraction of training above that of the one before "
            f"({before:g} here), and only the last at 1.0."
        )
    return float(value)


def _check_weights(key: str, weights: Any, names: list[str] | None) -> dict[str, float]:
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{key}: {weights!r} is no mapping of sources to weights.")
    if names is not None and set(weights) != set(names):
        raise ValueError(
            f"{key}: it names {', '.join(map(str, weights))}, but the training sources are {', '.join(names)}. Give "
            "each of them a weight in every stage, and no other name; 0 leaves a source out of a stage."
        )
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{key}.{name}: {weight!r} is not allowed; it must be a finite number of 0 or more.")
    if sum(weights.values()) <= 0:
        raise ValueError(f"{key}: all weights are 0. Give one of the sources a weight.")
    return {name: float(weights[name]) for name in names or weights}


def weight_stages(weights: Mapping[str, float] | Sequence[Any]) -> list[tuple[float, dict[str, float]]]:
    """
    `(until, weights)` of each stage of what may be given as `mixture_weights`: one mapping, or a list of stages.

    Raises:
        ValueError: as for [`parse_stages`].

    Example:
        >>> from hf_nexus.mixture.stages import weight_stages
        >>> weight_stages({"web": 0.5, "code": 0.5})
        [(1.0, {'web': 0.5, 'code': 0.5})]
    """
    if isinstance(weights, Mapping):
        return [(1.0, dict(weights))]
    return [(stage.until, stage.weights) for stage in parse_stages(weights, key="mixture_weights")]


def stage_borders(
    stages: Iterable[tuple[float, Mapping[str, float]]], max_steps: int, inner_steps: int
) -> list[tuple[int, dict[str, float]]]:
    """
    Where each stage begins: at an outer step, `round(until * max_steps)` of the stage before it.

    Args:
        stages (`Iterable[tuple[float, Mapping[str, float]]]`):
            `(until, weights)` of each, from [`weight_stages`] or [`MixtureConfig`]'s `stage_weights`.
        max_steps (`int`), inner_steps (`int`):
            Outer steps of the run; micro-batches of each, k.

    Returns:
        `list[tuple[int, dict[str, float]]]`: the first micro-batch of each stage and its weights, for
        [`SourceSchedule`]. A stage that rounds to no step at all is left out.

    Example:
        >>> from hf_nexus.mixture.stages import stage_borders
        >>> stage_borders([(0.8, {"web": 1.0}), (1.0, {"web": 1.0})], max_steps=100, inner_steps=4)
        [(0, {'web': 1.0}), (320, {'web': 1.0})]
    """
    borders, first = [], 0
    for until, weights in stages:
        end = round(until * max_steps)
        if end > first:
            borders.append((first * inner_steps, dict(weights)))
        first = end
    return borders
