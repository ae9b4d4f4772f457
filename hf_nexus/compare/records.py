"""The results of one run as plain data, and the metrics that they hold."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_atomic

__all__ = [
    "METRICS",
    "ON_CURVE",
    "RECORD_NAME",
    "LossPoint",
    "Minima",
    "Pairs",
    "RunRecord",
    "finished_runs",
    "in_order",
    "metric_label",
]

RECORD_NAME = "record.json"

# A value for each pair of sources: `(source, source, value)`.
Pairs = list[tuple[str, str, float]]

# Metrics and their labels, in the order of the report. The last three are prefixes, as in `ood/<source>`. The value of
# another is in `metrics` of `RunRecord`, or of `LossPoint` and in `ON_CURVE` if each evaluation has one. Tables,
# missing values, matched values and a plot follow. Diverged runs are left out of all metrics. A metric also needs,
# - if it is neither on the curve nor in the record: a field with a default, `tests/support/comparison.py`
#   (`make_record`), `compare/runs.py` (`_measure`, where `run.trainer.meter` has the totals of the training, or a
#   callback like `_EvaluateSample`), `tests/compare/test_runs.py`, and what measures it in `evaluation/`;
# - if it is on the curve: `tests/compare/test_plots.py`; if it is also no loss, or small next to one:
#   `compare/plots.py` (`_losses` for the title, `_on_scale`);
# - if it is a loss whose name does not say so: `compare/conclusions.py` (`_is_loss`); if it is no loss and has a
#   better direction: `_verdict`; if it has larger values: `rounded`; if it needs an explanation: `plain_words`, and
#   `compare/report.py` (`_metrics`); for each of them `tests/compare/test_conclusions.py`;
# - if some comparisons cannot have it (all others count as measured): `compare/comparison.py` (`_check_measured`),
#   `tests/compare/test_comparison.py`; if it differs when a run is repeated: the same test file;
# - if it was in the table "Setup": `compare/report.py` (`_setup`), which drops it.
METRICS = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "ood_loss": "OOD loss",
    "gradient_cosine": "gradient cosine",
    "minima_distance": "relative minima distance",
    "downstream/": "",
    "validation/": "validation loss on ",
    "ood/": "OOD loss on ",
}
ON_CURVE = ("validation_loss", "ood_loss", "validation/", "ood/")  # those with a value at matched training loss


@dataclass(frozen=True)
class LossPoint:
    """Losses at restored weights during training, in nats per token."""

    step: int  # outer steps
    tokens: int  # tokens trained on
    train: dict[str, float]  # by source, on a fixed sample of training rows
    validation: dict[str, float]  # by source, on held-out rows
    ood: dict[str, float]  # by OOD source
    train_loss: float  # mean over sources by the weights of the mixture, also if the run trained with others
    validation_loss: float  # likewise
    ood_loss: float | None  # plain mean over OOD sources; `None` without any

    def metrics(self) -> dict[str, float]:
        """The losses by metric."""
        means = {"train_loss": self.train_loss, "validation_loss": self.validation_loss}
        if self.ood_loss is not None:
            means["ood_loss"] = self.ood_loss
        sources = {"validation": self.validation, "ood": self.ood}
        return means | {f"{kind}/{name}": loss for kind, losses in sources.items() for name, loss in losses.items()}


@dataclass(frozen=True)
class Minima:
    """The minimizer of each source near the end of a run, and the losses between minimizers. Distances are L2."""

    steps: dict[str, int]  # by source: steps of the search to the minimizer
    converged: dict[str, bool]  # whether the held-out loss stopped improving within `max_steps`
    start_loss: dict[str, float]  # held-out loss at the end of the run, nats per token
    end_loss: dict[str, float]  # held-out loss at the minimizer
    parameter_norm: float  # L2 norm of the trainable parameters at the end of the run
    to_start: dict[str, float]  # distance to the end of the run
    pairwise: Pairs  # distance of two minimizers
    positions: list[float]  # in 0..1 on the segment between two minimizers
    segments: list[tuple[str, str, list[float]]]  # mean held-out loss of the two sources at each position
    barriers: Pairs  # height of a segment's loss above the straight line between its ends
    # Slice through the minimizers of three `sources`: grid coordinates `x` and `y`, `points` (coordinates of the three
    # minimizers and the end of the run), and `loss` (len(y), len(x)), the mean held-out loss of the three sources.
    plane: dict[str, Any] | None = None

    @property
    def mean_distance(self) -> float:
        """Mean L2 distance between two minimizers: the minima distance of the run."""
        return math.fsum(value for _, _, value in self.pairwise) / len(self.pairwise)

    @property
    def relative_distance(self) -> float:
        """`mean_distance` relative to `parameter_norm`."""
        return self.mean_distance / self.parameter_norm


@dataclass
class RunRecord:
    """
    The results of one arm at one seed.

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
    settings: dict[str, Any] = field(default_factory=dict)  # training fields set by the arm or its tuning
    curve: list[LossPoint] = field(default_factory=list)  # the last point is the end of training
    path: list[dict[str, float]] = field(default_factory=list)  # `step` and logged metrics such as `path_cosine`
    cosines: list[tuple[int, Pairs]] = field(default_factory=list)  # outer step, gradient cosines between sources
    downstream: dict[str, float] = field(default_factory=dict)  # `<question set or benchmark>/<score>`
    # Tasks of lm-eval that are among `downstream`, and their number of examples, `None` for all.
    benchmarks: dict[str, int | None] = field(default_factory=dict)
    seconds: float = 0.0  # training time over all sessions, with evaluations and checkpoints, without set-up
    minima: Minima | None = None

    @property
    def end(self) -> LossPoint:
        """Losses at the end of training."""
        return self.curve[-1]

    @property
    def diverged(self) -> bool:
        """Whether the run has no finite training loss at its end."""
        return not self.curve or not math.isfinite(self.end.train_loss)

    def metrics(self) -> dict[str, float]:
        """
        All metrics at the end of training, finite or not.

        Example:
            >>> point = LossPoint(9, 900, {"a": 2.0}, {"a": 2.5}, {"b": 4.0}, 2.0, 2.5, 4.0)
            >>> list(RunRecord("adamw", 1, curve=[point], downstream={"gsm8k/exact_match": 0.25}).metrics())
            ['train_loss', 'validation_loss', 'ood_loss', 'validation/a', 'ood/b', 'downstream/gsm8k/exact_match']
        """
        found = self.end.metrics() | {f"downstream/{name}": value for name, value in self.downstream.items()}
        if self.cosines and (pairs := self.cosines[-1][1]):
            found["gradient_cosine"] = math.fsum(value for _, _, value in pairs) / len(pairs)
        if self.minima is not None and self.minima.pairwise and self.minima.parameter_norm:
            found["minima_distance"] = self.minima.relative_distance
        return found

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `record.json` into `folder` atomically."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        return write_atomic(Path(folder, RECORD_NAME), text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RunRecord":
        """Read `record.json` from `folder`. A damaged one is a `ValueError`."""
        path = Path(folder, RECORD_NAME)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["curve"] = [LossPoint(**point) for point in fields["curve"]]
            fields["cosines"] = [(step, _tuples(pairs)) for step, pairs in fields["cosines"]]
            if (minima := fields["minima"]) is not None:
                lists = {key: _tuples(minima[key]) for key in ("pairwise", "segments", "barriers")}
                fields["minima"] = Minima(**minima | lists)
            return cls(**fields)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is not the record of a run: {what}. Restore it, or delete it to make the run again."
            ) from error


def finished_runs(folder: Path) -> list[Path]:
    """The folders of the finished runs of a comparison, also of those that its configuration does not name."""
    return sorted(path.parent for path in folder.glob(f"arms/*/seed-*/{RECORD_NAME}"))


def in_order(metrics: Iterable[str]) -> list[str]:
    """Names of metrics without repetition, in the order of the report."""
    kinds = list(METRICS)
    return sorted(set(metrics), key=lambda metric: (kinds.index(_kind(metric)), metric))


def metric_label(metric: str) -> str:
    """
    A metric's label for readers.

    Example:
        >>> metric_label("ood/news"), metric_label("downstream/gsm8k/exact_match")
        ('OOD loss on news', 'gsm8k/exact_match')
    """
    kind = _kind(metric)
    return METRICS[kind] + metric.removeprefix(kind)


def _kind(metric: str) -> str:
    """The key of `METRICS` that a metric belongs to."""
    return metric if metric in METRICS else metric.partition("/")[0] + "/"


def _tuples(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [tuple(row) for row in rows]
