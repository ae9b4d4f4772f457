"""Means over evaluation sets."""

from collections.abc import Mapping, Sequence

__all__ = ["OOD", "mean_losses"]

# The name under which the sources that are not trained on are summed up.
OOD = "ood"


def mean_losses(
    metrics: Mapping[str, float], names: Sequence[str], weights: Mapping[str, float], prefix: str = "eval"
) -> dict[str, float]:
    """
    The macro loss over a mixture's sources, and the mean over the others.

    Args:
        metrics (`Mapping[str, float]`):
            With `<prefix>_<name>_loss` for each evaluation set that has a loss.
        names (`Sequence[str]`):
            The evaluation sets.
        weights (`Mapping[str, float]`):
            Share of each source that is trained on; 0 for one left out.
        prefix (`str`, *optional*, defaults to `"eval"`):
            Of the metrics' names.

    Returns:
        `dict[str, float]`: `<prefix>_loss`, the weighted mean over the sets named like a source (or the plain mean
        over all sets, if none is), and `<prefix>_ood_loss`, the plain mean over the rest, if there is one.

    Example:
        >>> from hf_nexus.evaluation import mean_losses
        >>> losses = {"eval_text_loss": 2.0, "eval_code_loss": 1.0, "eval_law_loss": 3.0}
        >>> mean_losses(losses, ["text", "code", "law"], {"text": 0.75, "code": 0.25})
        {'eval_loss': 1.75, 'eval_ood_loss': 3.0}
    """
    losses = {name: metrics[f"{prefix}_{name}_loss"] for name in names if f"{prefix}_{name}_loss" in metrics}
    sources = [name for name in losses if name in weights] or list(losses)
    inside = {name: weights.get(name, 0.0) for name in sources}
    if not sum(inside.values()):  # no set's name matches a source, or only those that are left out of training
        inside = dict.fromkeys(sources, 1.0)
    outside = [loss for name, loss in losses.items() if name not in inside]
    means = {}
    if losses:
        means[f"{prefix}_loss"] = sum(losses[name] * w for name, w in inside.items()) / sum(inside.values())
    if outside:
        means[f"{prefix}_{OOD}_loss"] = sum(outside) / len(outside)
    return means
