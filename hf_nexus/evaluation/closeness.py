"""How close the sources of a saved model are: held-out losses, gradient cosines, distances between minimizers."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import finite_json, nearest, write_atomic
from ..mixture.config import MixtureConfig
from ..mixture.loading import load_mixture
from ..tensors import accelerator_or_cpu
from .cosines import dot, gradient_cosines
from .held_out import HeldOutSet, held_out_sets
from .landscape import minima_landscape
from .losses import OOD, mean_losses
from .models import load_model, saved_tokenizer, trainable_parameters

__all__ = ["Closeness", "measure_closeness"]


@dataclass(frozen=True)
class Closeness:
    """Results of [`measure_closeness`]. Losses are in nats per token."""

    model: str  # folder or Hub id
    base: str | None  # base model of an adapter
    parameters: int  # number of the measured parameters; those of an adapter if it is one
    parameter_norm: float
    losses: dict[str, float]  # of the training sources
    ood_losses: dict[str, float]
    macro_loss: float
    ood_loss: float | None
    tokens: dict[str, int]  # target tokens of each loss
    cosines: list[tuple[str, str, float]]  # of each pair of training sources
    cosine_tokens: dict[str, int]  # target tokens of each gradient
    projection: int | None  # size of the gradient sketches; None if the cosines are exact
    minima: dict[str, Any] | None = None  # what `minima_landscape` returns

    @property
    def mean_cosine(self) -> float | None:
        """Mean cosine over the pairs; `None` with one source."""
        return sum(value for *_, value in self.cosines) / len(self.cosines) if self.cosines else None

    def save(self, path: str | Path) -> Path:
        """Write a JSON file. Numbers that are not finite are `null`. Missing folders are created."""
        return write_atomic(path, finite_json({**asdict(self), "mean_cosine": self.mean_cosine}, indent=1) + "\n")


def measure_closeness(
    model: str,
    mixture: MixtureConfig,
    *,
    base: str | None = None,
    batches: int = 4,
    batch_size: int = 8,
    projection: int | None = None,
    seed: int = 0,
    minima: Mapping[str, str] | None = None,
    track: Callable[[str, Sequence], Iterable] = lambda text, parts: parts,
) -> Closeness:
    """
    Measure held-out losses of a model and gradient cosines between its training sources. With models that were
    trained further on single sources, also measure distances and losses between these minimizers. Weights are
    float32 and dropout is off.

    Of an adapter, only its own parameters are measured. Distances between LoRA matrices depend on how a product is
    split in two, so compare only adapters with the same start.

    Gradients, and losses between minimizers, are computed on the first `batches * batch_size` held-out rows of each
    source. Losses of the model itself are computed on all of them. `projection` and `seed` are those of
    [`gradient_cosines`]. `minima` has, for two or more training sources, the folder or Hub id of `model` trained
    further on that source alone. `track` takes what is measured and its parts, and gives the parts one by one, for a
    progress bar.

    Raises:
        ValueError: no held-out rows, unknown sources, or minimizers of another model.
        OSError: a model that does not exist.
        ImportError: an adapter, and peft is not installed.
    """
    _check_minima(minima or {}, mixture)
    module, base = load_model(model, base)
    loaded = load_mixture(mixture, saved_tokenizer(model, base))
    module.to(accelerator_or_cpu()).eval()
    held_out = held_out_sets(module, loaded, batch_size)
    params = trainable_parameters(module)
    sources = [name for name in loaded.train if name in held_out]
    if not sources:
        raise ValueError("No training source has held-out rows. Give them eval_rows or an eval_split.")
    measured = {name: held_out[name].mean_loss() for name in track("Held-out losses", list(held_out))}
    losses = {name: loss for name, (loss, _) in measured.items()}
    means = mean_losses({f"eval_{name}_loss": loss for name, loss in losses.items()}, list(losses), loaded.weights)
    sample = {name: held_out[name].first(batches) for name in sources}
    cosines = _measure_cosines(sample, list(params.values()), projection, seed, track)
    return Closeness(
        model=model,
        base=base,
        parameters=sum(p.numel() for p in params.values()),
        parameter_norm=math.sqrt(dot(params.values(), params.values())),
        losses={name: losses[name] for name in sources},
        ood_losses={name: loss for name, loss in losses.items() if name not in sources},
        macro_loss=means["eval_loss"],
        ood_loss=means.get(f"eval_{OOD}_loss"),
        tokens={name: tokens for name, (_, tokens) in measured.items()},
        cosines=cosines,
        cosine_tokens={name: int(sum(tokens for _, tokens in rows)) for name, rows in sample.items()},
        projection=projection,
        minima=_measure_minima(minima, base, params, sample) if minima else None,
    )


@dataclass(frozen=True)
class _Counted:
    """Batches that advance `ticks`, each time that they are read."""

    batches: Iterable
    ticks: Iterator

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            next(self.ticks, None)
            yield batch


def _measure_cosines(
    sample: Mapping[str, HeldOutSet], params: list[Tensor], projection: int | None, seed: int, track: Callable
) -> list[tuple[str, str, float]]:
    passes = [1 if projection else i + (i < len(sample) - 1) for i in range(len(sample))]  # over each source
    total = sum(n * -(-len(rows.rows) // rows.batch_size) for n, rows in zip(passes, sample.values(), strict=True))
    ticks = iter(track("Gradients", range(total)))
    counted = {name: _Counted(rows, ticks) for name, rows in sample.items()}
    cosines = gradient_cosines(counted, params, projection=projection, seed=seed)
    next(ticks, None)  # the last one is done
    return [(a, b, value) for (a, b), value in cosines.items()]


def _check_minima(minima: Mapping[str, str], mixture: MixtureConfig) -> None:
    allowed = [name for name, source in mixture.train_sources.items() if source.eval_rows or source.eval_split]
    for name in minima:
        if name not in allowed:
            raise ValueError(
                f"minima: {name!r} is not a training source with held-out rows.{nearest(name, allowed)} Allowed: "
                f"{', '.join(allowed)}."
            )
    if len(minima) == 1:
        raise ValueError("minima: distances need the minimizers of two or more sources, and one was given.")


def _measure_minima(
    paths: Mapping[str, str], base: str | None, params: Mapping[str, Tensor], rows: Mapping[str, HeldOutSet]
) -> dict[str, Any]:
    points = {}
    for name, path in paths.items():
        point = trainable_parameters(load_model(path, base)[0])
        if {key: p.shape for key, p in point.items()} != {key: p.shape for key, p in params.items()}:
            raise ValueError(f"The minimizer of {name!r}, {path}, does not have the parameters of the model.")
        points[name] = point
    return minima_landscape(params, points, {name: rows[name].loss for name in points})
