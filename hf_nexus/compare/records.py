"""What one run of a comparison leaves behind: plain data, written once it is complete."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import fsum
from pathlib import Path
from typing import Any

from ..files import write_atomic

__all__ = ["RECORD_NAME", "LossPoint", "Minima", "Pairs", "RunRecord"]

RECORD_NAME = "record.json"

# A value for each pair of sources: `(source, source, value)`.
Pairs = list[tuple[str, str, float]]


@dataclass(frozen=True)
class LossPoint:
    """
    Losses at restored weights after `step` outer steps, nats per token, token-weighted.

    Args:
        step (`int`), tokens (`int`):
            Outer steps taken, and tokens trained on by then.
        train (`dict[str, float]`), validation (`dict[str, float]`), ood (`dict[str, float]`):
            For each source: on a fixed sample of its training rows, which is the same for all arms; on its held-out
            rows; and on the OOD sources.
        train_loss (`float`), validation_loss (`float`), ood_loss (`float`, *optional*):
            Their means: over sources with the mixture's weights, and the plain mean over OOD sources if there are any.
    """

    step: int
    tokens: int
    train: dict[str, float]
    validation: dict[str, float]
    ood: dict[str, float]
    train_loss: float
    validation_loss: float
    ood_loss: float | None


@dataclass(frozen=True)
class Minima:
    """
    Where training on each source alone leads from the end of a run, and what lies between.

    Args:
        steps (`dict[str, int]`), converged (`dict[str, bool]`):
            For each source: steps to its minimizer, and whether its held-out loss had stopped improving within the
            bound.
        start_loss (`dict[str, float]`), end_loss (`dict[str, float]`):
            Held-out loss of the source, nats per token, at the end of the run and at its minimizer.
        parameter_norm (`float`):
            L2 norm of the trainable parameters at the end of the run.
        to_start (`dict[str, float]`), pairwise (`Pairs`):
            L2 distances of the minimizers to the end of the run, and to one another.
        positions (`list[float]`), segments (`list[tuple[str, str, list[float]]]`):
            Positions in 0..1 along the segment between two minimizers, and at each the mean held-out loss of the two
            sources.
        barriers (`Pairs`):
            How far a segment's loss rises above the straight line between its ends.
        plane (`dict`, *optional*):
            A slice through the minimizers of three sources: `sources` (3), `x` and `y` (grid coordinates, in units of
            L2 distance), `points` (the three minimizers' and then the start's coordinates), `loss` (len(y), len(x)),
            the mean held-out loss of the three.
    """

    steps: dict[str, int]
    converged: dict[str, bool]
    start_loss: dict[str, float]
    end_loss: dict[str, float]
    parameter_norm: float
    to_start: dict[str, float]
    pairwise: Pairs
    positions: list[float]
    segments: list[tuple[str, str, list[float]]]
    barriers: Pairs
    plane: dict[str, Any] | None = None

    @property
    def mean_distance(self) -> float:
        """Mean L2 distance between two minimizers: what is called the minima distance of a run."""
        return fsum(value for _, _, value in self.pairwise) / len(self.pairwise)

    @property
    def relative_distance(self) -> float:
        """`mean_distance` relative to `parameter_norm`."""
        return self.mean_distance / self.parameter_norm


@dataclass
class RunRecord:
    """
    One arm under one seed.

    Args:
        arm (`str`), seed (`int`):
            Which.
        settings (`dict[str, Any]`):
            The training fields that the arm or its tuning set.
        curve (`list[LossPoint]`):
            Losses along training, the last at the end.
        path (`list[dict[str, float]]`):
            Logged figures of the windows, each with `step`: `path_cosine`, `pseudo_gradient_norm`, `inner_lr`.
        cosines (`list[tuple[int, Pairs]]`):
            Outer step, and the gradient cosines between sources there, the last at the end.
        downstream (`dict[str, float]`):
            Figures of the tasks, such as `"gsm8k/answer_loss"` (nats per token) or `"gsm8k/exact_match"` (0..1).
        seconds (`float`):
            Time of training.
        minima ([`Minima`], *optional*):
            Where they were searched for.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.compare.records import RunRecord
        >>> folder = mkdtemp()
        >>> RunRecord("adamw", 1, {"nexus": False}).save(folder).name
        'record.json'
        >>> RunRecord.load(folder).arm
        'adamw'
    """

    arm: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    curve: list[LossPoint] = field(default_factory=list)
    path: list[dict[str, float]] = field(default_factory=list)
    cosines: list[tuple[int, Pairs]] = field(default_factory=list)
    downstream: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    minima: Minima | None = None

    @property
    def end(self) -> LossPoint:
        """The losses at the end."""
        return self.curve[-1]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `record.json` into `folder`; whole, or not at all."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        return write_atomic(Path(folder, RECORD_NAME), text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RunRecord":
        """
        Read what `save` wrote.

        Raises:
            FileNotFoundError: `folder` holds no record.
        """
        fields = json.loads(Path(folder, RECORD_NAME).read_text(encoding="utf-8"))
        fields["curve"] = [LossPoint(**point) for point in fields["curve"]]
        fields["cosines"] = [(step, _pairs(pairs)) for step, pairs in fields["cosines"]]
        if fields["minima"] is not None:
            minima = fields["minima"]
            minima["segments"] = [(a, b, losses) for a, b, losses in minima["segments"]]
            fields["minima"] = Minima(**minima | {key: _pairs(minima[key]) for key in ("pairwise", "barriers")})
        return cls(**fields)


def _pairs(rows: Sequence[Sequence[Any]]) -> Pairs:
    return [(a, b, float(value)) for a, b, value in rows]
