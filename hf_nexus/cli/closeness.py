"""`hf-nexus closeness`: how close a model's sources are, from a folder or a Hub id, of an adapter as well."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..evaluation.closeness import gradient_cosines
from ..evaluation.held_out import HeldOut, held_out_rows
from ..evaluation.landscape import minima_landscape
from ..evaluation.losses import OOD, mean_losses, perplexity
from ..evaluation.points import norm
from ..files import finite_json, write_atomic
from ..mixture.config import MixtureConfig
from .closeness_inputs import check_minima, load_model, load_tokenizer, mixture_of, trainable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["REPORT_NAME", "Closeness", "measure_closeness", "print_closeness"]

REPORT_NAME = "closeness.json"


@dataclass(frozen=True)
class Closeness:
    """
    What [`measure_closeness`] found.

    Args:
        model (`str`), base (`str`, *optional*):
            Folder or Hub id of the model, and for an adapter that of what it adapts.
        parameters (`int`), parameter_norm (`float`):
            Number and L2 norm of the parameters that gradients and distances are of: for an adapter its own.
        losses (`dict[str, float]`), ood_losses (`dict[str, float]`):
            Held-out loss of each training source and of each OOD source, nats per token.
        macro_loss (`float`), ood_loss (`float`, *optional*):
            Their means: with the mixture's weights, and plain.
        tokens (`dict[str, int]`):
            Target tokens behind each loss.
        cosines (`list[tuple[str, str, float]]`), cosine_tokens (`dict[str, int]`):
            Cosine between the gradients of each two training sources, and target tokens behind each gradient.
        projection (`int`, *optional*):
            Numbers to which gradients were reduced; `None` if the cosines are exact.
        minima (`dict[str, Any]`, *optional*):
            What [`~evaluation.landscape.minima_landscape`] returns, where minimizers were given.
    """

    model: str
    base: str | None
    parameters: int
    parameter_norm: float
    losses: dict[str, float]
    ood_losses: dict[str, float]
    macro_loss: float
    ood_loss: float | None
    tokens: dict[str, int]
    cosines: list[tuple[str, str, float]]
    cosine_tokens: dict[str, int]
    projection: int | None
    minima: dict[str, Any] | None = None

    @property
    def mean_cosine(self) -> float | None:
        """Mean of the pairs' cosines; `None` with one source."""
        return sum(value for *_, value in self.cosines) / len(self.cosines) if self.cosines else None

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, in which what is not finite is `null`. Missing folders are made."""
        return write_atomic(path, finite_json({**asdict(self), "mean_cosine": self.mean_cosine}, indent=1) + "\n")


def measure_closeness(
    model: str,
    mixture: MixtureConfig | None = None,
    *,
    base: str | None = None,
    batches: int = 4,
    batch_size: int = 8,
    projection: int | None = None,
    seed: int = 0,
    minima: Mapping[str, str] | None = None,
    resolution: int = 7,
    device: str | None = None,
) -> Closeness:
    """
    Held-out losses of a model, the gradient cosines between its training sources, and, from models trained on single
    sources, the distances and losses between these minimizers. Weights are float32, dropout is off.

    An adapter is measured as such: gradients and distances are those of its parameters, the base model is frozen.
    (Distances between LoRA matrices depend on how a product is split in two. Compare adapters of one start.)

    Args:
        model (`str`):
            A folder or a Hub id, of a model or of a PEFT adapter, with its tokenizer; that of the base will do.
        mixture ([`MixtureConfig`], *optional*):
            The sources, by default those of the `pretrain.yaml` beside the model. Of its rows, held-out ones are used.
        base (`str`, *optional*):
            What an adapter adapts, by default the model that it names.
        batches (`int`, *optional*, defaults to 4), batch_size (`int`, *optional*, defaults to 8):
            Gradients and losses between minimizers are taken on the first `batches * batch_size` held-out rows of each
            source. (The losses of the model itself are over all of them.)
        projection (`int`, *optional*), seed (`int`, *optional*, defaults to 0):
            As for [`~evaluation.gradient_cosines`]: cheaper cosines with an error.
        minima (`Mapping[str, str]`, *optional*):
            For two or more training sources, the folder or Hub id of their minimizer: `model`, trained on. The first
            three span the slice.
        resolution (`int`, *optional*, defaults to 7):
            Grid points along each axis of the slice.
        device (`str`, *optional*):
            A GPU by default, if there is one.

    Raises:
        ValueError: no mixture, no held-out rows, unknown sources, or minimizers that are not of this model.
        OSError: a model that cannot be found.
        ImportError: an adapter, and `peft` is not installed; or `datasets` is not.

    Example:
        >>> from hf_nexus.cli.closeness import measure_closeness
        >>> found = measure_closeness("runs/nexus-demo", projection=1024)  # doctest: +SKIP
        >>> found.mean_cosine  # doctest: +SKIP
        0.31
    """
    from ..mixture.loading import load_mixture

    for key, value in (("batches", batches), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{key}={value} is not allowed; it must be 1 or more.")
    mixture = mixture_of(model) if mixture is None else mixture
    check_minima(minima or {}, mixture)
    module, base = load_model(model, base)
    loaded = load_mixture(mixture, load_tokenizer(model, base))
    module.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    held_out = held_out_rows(module, loaded, batch_size)
    params = trainable(module)
    sources = [name for name in loaded.train if name in held_out]
    if not sources:
        raise ValueError("No training source has held-out rows. Give them eval_rows or an eval_split.")
    means = {name: rows.mean() for name, rows in held_out.items()}
    losses = {name: loss for name, (loss, _) in means.items()}
    over = mean_losses({f"eval_{name}_loss": loss for name, loss in losses.items()}, list(losses), loaded.weights)
    sample = {name: held_out[name].first(batches) for name in sources}
    cosines = gradient_cosines(sample, list(params.values()), projection=projection, seed=seed)
    return Closeness(
        model=model,
        base=base,
        parameters=sum(p.numel() for p in params.values()),
        parameter_norm=norm(params),
        losses={name: losses[name] for name in sources},
        ood_losses={name: loss for name, loss in losses.items() if name not in sources},
        macro_loss=over["eval_loss"],
        ood_loss=over.get(f"eval_{OOD}_loss"),
        tokens={name: tokens for name, (_, tokens) in means.items()},
        cosines=[(a, b, value) for (a, b), value in cosines.items()],
        cosine_tokens={name: int(sum(tokens for _, tokens in rows)) for name, rows in sample.items()},
        projection=projection,
        minima=_minima(minima, base, params, sample, resolution) if minima else None,
    )


def _minima(
    paths: Mapping[str, str], base: str | None, params: Mapping[str, Tensor], rows: Mapping[str, HeldOut], size: int
) -> dict[str, Any]:
    points = {}
    for name, path in paths.items():
        point = trainable(load_model(path, base)[0])
        if {key: p.shape for key, p in point.items()} != {key: p.shape for key, p in params.items()}:
            raise ValueError(f"The minimizer of {name!r}, {path}, does not have the parameters of the model it is of.")
        points[name] = point
    losses = {name: lambda name=name: rows[name].mean()[0] for name in points}
    plane = list(points)[:3] if len(points) >= 3 else ()
    return minima_landscape(params, params, points, losses, plane=plane, resolution=size)


def print_closeness(found: Closeness, console: "Console") -> None:
    """
    Print the tables: held-out losses, gradient cosines, and distances of the minimizers where there are any.

    Example:
        >>> from rich.console import Console
        >>> from hf_nexus.cli.closeness import measure_closeness, print_closeness
        >>> print_closeness(measure_closeness("runs/nexus-demo"), Console())  # doctest: +SKIP
    """
    kind = f"adapter of {found.base}" if found.base else "model"
    console.print(f"{found.model} ({kind}): {found.parameters:,} parameters, L2 norm {found.parameter_norm:.4g}")
    console.print(_losses_table(found))
    names = list(found.losses)
    if found.cosines:
        how = "exact" if found.projection is None else f"of count sketches of {found.projection} numbers"
        fewest = min(found.cosine_tokens.values())
        title = f"Gradient cosines on held-out rows ({how}; at least {fewest:,} tokens each)"
        console.print(_pairs_table(title, names, found.cosines, "{:+.3f}"))
        console.print(f"Mean of the pairs: {found.mean_cosine:+.4f}")
    if found.minima:
        _print_minima(found.minima, console)


def _losses_table(found: Closeness) -> "Table":
    from rich.table import Table

    table = Table(title="Held-out loss (nats per token)")
    for column in ("", "role", "tokens", "loss", "perplexity"):
        table.add_column(column, justify="left" if column in ("", "role") else "right")
    groups = [("train", found.losses, "macro", found.macro_loss), ("ood", found.ood_losses, "OOD", found.ood_loss)]
    for role, losses, total, mean in groups:
        for name, loss in losses.items():
            table.add_row(name, role, f"{found.tokens[name]:,}", f"{loss:.4f}", f"{perplexity(loss):,.2f}")
        if mean is not None:
            table.add_row(total, "mean", "", f"{mean:.4f}", f"{perplexity(mean):,.2f}", end_section=True)
    return table


def _pairs_table(
    title: str, names: Sequence[str], pairs: Sequence[tuple[str, str, float]], form: str, diagonal: str = "1"
) -> "Table":
    from rich.table import Table

    cells = {(a, b): form.format(value) for a, b, value in pairs}
    table = Table("", *names, title=title)
    for i, a in enumerate(names):
        table.add_row(a, *(diagonal if a == b else cells[a, b] if i < j else cells[b, a] for j, b in enumerate(names)))
    return table


def _print_minima(minima: Mapping[str, Any], console: "Console") -> None:
    from rich.table import Table

    names, size = list(minima["to_start"]), minima["parameter_norm"]
    table = Table(title="Minimizers, from the model")
    for column in ("", "distance", "relative", "loss before", "loss after"):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        far, before, after = (minima[key][name] for key in ("to_start", "start_loss", "end_loss"))
        table.add_row(name, f"{far:.4g}", f"{far / size:.4f}", f"{before:.4f}", f"{after:.4f}")
    console.print(table)
    if minima["pairwise"]:
        console.print(_pairs_table("Distances between minimizers", names, minima["pairwise"], "{:.4g}", "0"))
        mean = sum(value for *_, value in minima["pairwise"]) / len(minima["pairwise"])
        console.print(f"Minima distance (mean of the pairs): {mean:.4g}, {mean / size:.4f} of the parameter norm")
        console.print(_pairs_table("Barriers between minimizers (nats)", names, minima["barriers"], "{:.4f}", "0"))
