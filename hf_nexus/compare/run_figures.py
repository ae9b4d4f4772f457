"""What records say: figures by name, at the end of a run and where its training loss passed another's."""

import math
from collections.abc import Iterable, Mapping

from ..evaluation.statistics import value_at
from .records import LossPoint, RunRecord

__all__ = ["at_losses", "control_kind", "end_figures", "in_order", "losses_to_match", "non_finite"]

# By arm and seed.
Runs = Mapping[tuple[str, int], RunRecord]


def end_figures(record: RunRecord) -> dict[str, float]:
    """
    All figures of a run at its end, by name, finite or not.

    Example:
        >>> from hf_nexus.compare.records import LossPoint, RunRecord
        >>> from hf_nexus.compare.run_figures import end_figures
        >>> point = LossPoint(9, 900, {"a": 2.0}, {"a": 2.5}, {"b": 4.0}, 2.0, 2.5, 4.0)
        >>> end_figures(RunRecord("adamw", 1, curve=[point], downstream={"gsm8k/exact_match": 0.25}))
        ... # doctest: +NORMALIZE_WHITESPACE
        {'train_loss': 2.0, 'validation_loss': 2.5, 'ood_loss': 4.0, 'validation/a': 2.5, 'ood/b': 4.0,
         'downstream/gsm8k/exact_match': 0.25}
    """
    figures = {"train_loss": record.end.train_loss} | _losses(record.end)
    figures |= {f"downstream/{name}": value for name, value in record.downstream.items()}
    if record.cosines and (pairs := record.cosines[-1][1]):
        figures["gradient_cosine"] = math.fsum(value for _, _, value in pairs) / len(pairs)
    if record.minima is not None and record.minima.pairwise and record.minima.parameter_norm:
        figures["minima_distance"] = record.minima.relative_distance
    return figures


def in_order(figures: Iterable[str]) -> list[str]:
    """Names of figures without repetition, in the order of a report: means first, sources last."""
    first = ["train_loss", "validation_loss", "ood_loss", "gradient_cosine", "minima_distance"]
    kinds = ["downstream", "validation", "ood"]
    found = set(figures)
    rest = sorted(found - set(first), key=lambda figure: (kinds.index(figure.split("/")[0]), figure))
    return [figure for figure in first if figure in found] + rest


def non_finite(record: RunRecord) -> list[str]:
    """The figures of a run that are not finite, at its end or on the way."""
    wrong = [figure for figure, value in end_figures(record).items() if not math.isfinite(value)]
    for point in record.curve[:-1]:
        losses = {"train_loss": point.train_loss} | _losses(point)
        wrong += [f"{name} at step {point.step}" for name, loss in losses.items() if not math.isfinite(loss)]
    return wrong


def losses_to_match(runs: Runs) -> dict[int, tuple[str, float]]:
    """For each seed the highest of the last training losses, to which all runs came down, and the arm that has it."""
    highest: dict[int, tuple[str, float]] = {}
    for (arm, seed), run in sorted(runs.items()):
        loss = run.end.train_loss
        if math.isfinite(loss) and (seed not in highest or loss > highest[seed][1]):
            highest[seed] = (arm, loss)
    return dict(sorted(highest.items()))


def at_losses(record: RunRecord, train_loss: float) -> dict[str, float]:
    """
    The losses of a run where its training loss first came down to `train_loss`; none if it never did, or diverged.

    A run that diverged later has no place among the others: what it was before would be averaged with what they are.
    """
    train = [point.train_loss for point in record.curve]
    if not math.isfinite(train[-1]):
        return {}
    curves = [_losses(point) for point in record.curve]
    ends = [figure for figure, loss in curves[-1].items() if math.isfinite(loss)]
    found = {figure: value_at(train, [curve.get(figure, math.nan) for curve in curves], train_loss) for figure in ends}
    return {figure: loss for figure, loss in found.items() if loss is not None}


def control_kind(record: RunRecord) -> str | None:
    """Which control an arm is, if it is one: it does part of what Nexus does, without its path."""
    if not record.settings.get("nexus", True):
        return None
    if record.settings.get("inner_lr") == 0:
        return "gamma 0"
    return "random direction" if record.settings.get("inner_direction") == "random" else None


def _losses(point: LossPoint) -> dict[str, float]:
    """All but the training loss, which is what they are matched by."""
    means = {"validation_loss": point.validation_loss}
    if point.ood_loss is not None:
        means["ood_loss"] = point.ood_loss
    sources = {"validation": point.validation, "ood": point.ood}
    return means | {f"{kind}/{name}": loss for kind, losses in sources.items() for name, loss in losses.items()}
