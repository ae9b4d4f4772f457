"""Losses that do not depend on how the rows were batched: sums over tokens, means over sets, perplexities."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["OOD", "TokenMean", "mask_rows", "mean_losses", "perplexities", "perplexity"]

# The name under which the sources that are not trained on are summed up.
OOD = "ood"


class TokenMean:
    """
    The sum of token losses, and the number of tokens, over batches whose mean losses are given one by one.

    Attributes:
        sums (`Tensor`): The two, (2,) in float64. Those of several ranks can be added up.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.losses import TokenMean
        >>> loss = TokenMean()
        >>> loss.add(torch.tensor(2.0), torch.tensor(3))
        >>> loss.add(torch.tensor(float("nan")), torch.tensor(0))  # the mean over no token
        >>> loss.add(torch.tensor(4.0), torch.tensor(1))
        >>> loss.sums.tolist()
        [10.0, 4.0]
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, mean: Tensor, tokens: Tensor) -> None:
        """
        Add a batch.

        Args:
            mean (`Tensor`): 0-d, its loss per token. Whatever it is, without tokens it adds nothing.
            tokens (`Tensor`): 0-d.
        """
        device = "cpu" if mean.device.type == "mps" else mean.device  # which has no float64
        mean, tokens = mean.detach().to(device).double(), tokens.to(device).double()
        total = torch.where(tokens > 0, mean * tokens, 0.0)
        self.sums = self.sums.to(device) + torch.stack([total, tokens])


def mask_rows(labels: Tensor, rows: int, real: int) -> Tensor:
    """
    Labels of which only the first `real` rows count.

    Args:
        labels (`Tensor`): (rows, T), or the rows laid end to end, (1, rows * T).
        rows (`int`), real (`int`): `real` is at most `rows`.

    Returns:
        `Tensor`: a copy in the same shape, -100 in the other rows.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.losses import mask_rows
        >>> labels = torch.tensor([[1, 2], [3, 4]])
        >>> mask_rows(labels, 2, 1).tolist(), mask_rows(labels.view(1, 4), 2, 1).tolist()
        ([[1, 2], [-100, -100]], [[1, 2, -100, -100]])
    """
    masked = labels.clone(memory_format=torch.contiguous_format)
    masked.view(rows, -1)[real:] = -100
    return masked


def perplexity(loss: float) -> float:
    """
    `exp(loss)`; infinite where a float cannot hold it.

    Example:
        >>> from hf_nexus.evaluation import perplexity
        >>> perplexity(0.0), perplexity(1000.0)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


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
    # `sum` rounds differently from Python 3.12 on; `fsum` is exact everywhere.
    if losses:
        weighted = math.fsum(losses[name] * weight for name, weight in inside.items())
        means[f"{prefix}_loss"] = weighted / math.fsum(inside.values())
    if outside:
        means[f"{prefix}_{OOD}_loss"] = math.fsum(outside) / len(outside)
    return means


def perplexities(metrics: Mapping[str, float], names: Sequence[str], prefix: str = "eval") -> dict[str, float]:
    """
    Perplexities of evaluation sets, and those that belong to the macro loss and to the mean over the OOD sources.

    Args:
        metrics (`Mapping[str, float]`):
            With the losses of the sets and what [`mean_losses`] returned.
        names (`Sequence[str]`):
            The evaluation sets.
        prefix (`str`, *optional*, defaults to `"eval"`):
            Of the metrics' names.

    Returns:
        `dict[str, float]`: `<prefix>_<name>_perplexity`, `<prefix>_perplexity` and `<prefix>_ood_perplexity`, each
        where there is a loss and the perplexity is finite: neither JSON nor experiment trackers take an infinity.

    Example:
        >>> from hf_nexus.evaluation import perplexities
        >>> perplexities({"eval_text_loss": 0.0, "eval_code_loss": 1e4, "eval_loss": 5e3}, ["text", "code"])
        {'eval_text_perplexity': 1.0}
    """
    keys = [f"{prefix}_{name}" for name in names] + [prefix, f"{prefix}_{OOD}"]
    found = {f"{key}_perplexity": perplexity(metrics[f"{key}_loss"]) for key in keys if f"{key}_loss" in metrics}
    return {key: value for key, value in found.items() if math.isfinite(value)}
