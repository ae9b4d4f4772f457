"""Losses that do not depend on the batching: sums over tokens, means over evaluation sets, perplexities."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..tensors import as_float64

__all__ = ["OOD", "TokenMean", "losses_of", "mean_losses", "perplexities", "perplexity"]

# Name of the mean over the sources that are not trained on.
OOD = "ood"


class TokenMean:
    """
    Sum of token losses and number of tokens, accumulated from the mean losses of batches. `sums` has both, (2,) in
    float64. The sums of several ranks can be added.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.losses import TokenMean
        >>> loss = TokenMean()
        >>> loss.add(torch.tensor(2.0), torch.tensor(3))
        >>> loss.add(torch.tensor(float("nan")), torch.tensor(0))  # the mean over no tokens
        >>> loss.add(torch.tensor(4.0), torch.tensor(1))
        >>> loss.sums.tolist()
        [10.0, 4.0]
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, mean: Tensor | None, tokens: Tensor | int | None) -> None:
        """
        Add a batch by its loss per token and its number of tokens, both 0-d. Without tokens, or if one of both is not
        known, it adds nothing.
        """
        if mean is None or tokens is None:
            return
        mean = as_float64(mean.detach())
        tokens = torch.as_tensor(tokens).to(mean.device).double()
        total = torch.where(tokens > 0, mean * tokens, 0.0)
        self.sums = self.sums.to(mean.device) + torch.stack([total, tokens])


def perplexity(loss: float) -> float:
    """
    `exp(loss)`; infinity if a float cannot hold it.

    Example:
        >>> from hf_nexus.evaluation.losses import perplexity
        >>> perplexity(0.0), perplexity(1000.0)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def losses_of(metrics: Mapping[str, float], names: Iterable[str], prefix: str = "eval") -> dict[str, float]:
    """The losses of those evaluation sets that have the metric `<prefix>_<name>_loss`, by name."""
    return {name: metrics[f"{prefix}_{name}_loss"] for name in names if f"{prefix}_{name}_loss" in metrics}


def mean_losses(
    metrics: Mapping[str, float], names: Sequence[str], weights: Mapping[str, float], prefix: str = "eval"
) -> dict[str, float]:
    """
    Macro loss over the sources of a mixture, and mean loss over the other evaluation sets.

    `names` are those of all sets; a set may lack the metric `<prefix>_<name>_loss`. The mixture weight of a source
    that is not trained on is 0. Returns `<prefix>_loss`, the weighted mean over the sets named like a source, or the
    plain mean over all sets if there are none, and `<prefix>_ood_loss`, the plain mean over the other sets, if there
    are any.

    Example:
        >>> from hf_nexus.evaluation.losses import mean_losses
        >>> losses = {"eval_text_loss": 2.0, "eval_code_loss": 1.0, "eval_law_loss": 3.0}
        >>> mean_losses(losses, ["text", "code", "law"], {"text": 0.75, "code": 0.25})
        {'eval_loss': 1.75, 'eval_ood_loss': 3.0}
    """
    losses = losses_of(metrics, names, prefix)
    sources = [name for name in losses if name in weights] or list(losses)
    inside = {name: weights.get(name, 0.0) for name in sources}
    if not sum(inside.values()):  # no set is named like a source, or only like sources that are not trained on
        inside = dict.fromkeys(sources, 1.0)
    outside = [loss for name, loss in losses.items() if name not in inside]
    means = {}
    # `sum` rounds differently from Python 3.12 on; `fsum` is exact in all versions.
    if losses:
        weighted = math.fsum(losses[name] * weight for name, weight in inside.items())
        means[f"{prefix}_loss"] = weighted / math.fsum(inside.values())
    if outside:
        means[f"{prefix}_{OOD}_loss"] = math.fsum(outside) / len(outside)
    return means


def perplexities(metrics: Mapping[str, float], names: Sequence[str], prefix: str = "eval") -> dict[str, float]:
    """
    Perplexities of evaluation sets, of the macro loss and of the mean loss over OOD sources, by their names with
    `_perplexity` in place of `_loss`. Infinite ones are left out: JSON and experiment trackers do not take them.

    Example:
        >>> from hf_nexus.evaluation.losses import perplexities
        >>> perplexities({"eval_text_loss": 0.0, "eval_code_loss": 1e4, "eval_loss": 5e3}, ["text", "code"])
        {'eval_text_perplexity': 1.0}
    """
    keys = [f"{prefix}_{name}" for name in names] + [prefix, f"{prefix}_{OOD}"]
    found = {f"{key}_perplexity": perplexity(metrics[f"{key}_loss"]) for key in keys if f"{key}_loss" in metrics}
    return {key: value for key, value in found.items() if math.isfinite(value)}
