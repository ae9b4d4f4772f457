"""Mixture weights, as shares and in stages that each last up to a fraction of the run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..schema import documented
from ..strict import Bound, check, check_fields

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Stage", "StageWeights", "Weight", "normalized", "parse_stages", "shares_of", "stage_borders", "stages_of"]


Weight = Annotated[float, Bound(least=0, most=1e9)]


@documented
@dataclass(frozen=True)
class Stage:
    """
    Mixture weights up to a point of training, checked on creation.

    Args:
        until (`float`):
            End of the stage, as a fraction of the outer steps: above 0, and 1.0 for the last stage.
        weights (`dict[str, float]`):
            Shares of the tokens of this stage, relative to each other. 0 leaves a source out of the stage.

    Raises:
        ValueError: a value that is not allowed, or no weight above 0.
    """

    until: Annotated[float, Bound(above=0, most=1)]
    weights: dict[str, Weight]

    def __post_init__(self) -> None:
        check_fields(self)
        if sum(self.weights.values()) <= 0:
            raise ValueError("weights: all weights are 0, or there are none. Give one of the sources a weight.")


def parse_stages(value: Any, names: Iterable[str] | None = None, key: str = "stages") -> list[Stage]:
    """
    Stages from plain data or existing ones, with weights in the order of `names`, by default those of the first stage.

    Raises:
        ValueError: an unknown or missing key, fractions that do not rise to 1, weights that do not name every training
            source or are negative, or a source without weight in all stages. The message starts with `key`.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(
            f"{key}: {value!r} is not a list of stages. Give one or more, as in "
            "`[{until: 0.8, weights: {web: 1}}, {until: 1.0, weights: {web: 1}}]`."
        )
    stages: list[Stage] = check(value, list[Stage], key)
    expected, before = list(stages[0].weights if names is None else names), 0.0
    for i, stage in enumerate(stages):
        if set(stage.weights) != set(expected):
            raise ValueError(
                f"{key}[{i}].weights: it names {', '.join(map(str, stage.weights))}, but the training sources are "
                f"{', '.join(expected)}. Give each of them a weight in every stage, and no other name; 0 leaves a "
                "source out of a stage."
            )
        last = i == len(stages) - 1
        if last and stage.until != 1:
            raise ValueError(f"{key}[{i}].until: {stage.until!r} is not allowed; the last stage ends at 1.0.")
        if not last and not before < stage.until < 1:
            raise ValueError(
                f"{key}[{i}].until: {stage.until!r} is not allowed; each stage ends later than the one before it "
                f"({before:g} here), and only the last one at 1.0."
            )
        before = stage.until
    for name in expected:
        if all(stage.weights[name] == 0 for stage in stages):
            raise ValueError(f"{key}: the source {name!r} has no weight in any stage. Give it one, or remove it.")
    return [Stage(stage.until, {name: stage.weights[name] for name in expected}) for stage in stages]


def stages_of(weights: Mapping[str, float] | Sequence[Any]) -> list[Stage]:
    """The stages of a checked `mixture_weights` value: one mapping, or a list of stages."""
    return [Stage(1.0, dict(weights))] if isinstance(weights, Mapping) else [Stage(**stage) for stage in weights]


def stage_borders(stages: Iterable[Stage], max_steps: int) -> list[tuple[int, dict[str, float]]]:
    """
    First outer step and weights of each stage, which begins at `round(until * max_steps)` of the one before it. A
    stage of zero steps is left out.
    """
    borders, first = [], 0
    for stage in stages:
        end = round(stage.until * max_steps)
        if end > first:
            borders.append((first, stage.weights))
        first = end
    return borders


class StageWeights:
    """The weights of stages as a function of the outer step."""

    def __init__(self, stages: list[Stage], max_steps: int):
        self.borders = stage_borders(stages, max_steps)

    def __call__(self, step: int) -> dict[str, float]:
        return next(weights for first, weights in reversed(self.borders) if first <= step)


def normalized(weights: Mapping[str, float], names: Sequence[str]) -> "np.ndarray":
    """
    Weights as shares that sum to one, (S,) float64, in the order of `names`. Shares stay exactly as they are.

    Raises:
        ValueError: The weights name other sources, are negative or not finite, or sum to zero.
    """
    import numpy as np  # the upload process, which reads the stages of a card, starts faster without

    if set(weights) != set(names):
        raise ValueError(
            f"mixture_weights name {', '.join(weights)}, but the training sources are {', '.join(names)}. Give each "
            "of them a weight, and no other name; 0 leaves a source out."
        )
    shares = np.array([weights[name] for name in names], dtype=np.float64)
    if not len(shares) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise ValueError(f"weights={dict(weights)} must be finite, >= 0, and sum to more than zero.")
    total = shares.sum()
    return shares if math.isclose(total, 1, rel_tol=1e-12) else shares / total


def shares_of(weights: Mapping[str, float], names: Sequence[str] | None = None) -> dict[str, float]:
    """[`normalized`] by name, by default in the order of the weights."""
    names = list(weights) if names is None else names
    return dict(zip(names, normalized(weights, names).tolist(), strict=True))
