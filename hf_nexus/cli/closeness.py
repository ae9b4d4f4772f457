"""The command `hf-nexus closeness`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import require_folder
from ..terminal import is_live, new_console, new_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.closeness import Closeness
    from ..mixture.config import MixtureConfig

__all__ = ["closeness", "find_mixture", "parse_minima", "print_closeness"]

_OUTPUT_NAME = "closeness.json"


def closeness(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model or a LoRA adapter.")],
    config: Annotated[
        str | None,
        typer.Option(
            help="Configuration (demo, 3b, ...) or YAML file with the sources. By default the model's pretrain.yaml."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model of an adapter, if not the one that it names.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="Held-out batches per source to compute gradients on.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    projection: Annotated[
        int | None,
        typer.Option(min=1, help="Size of gradient sketches, for cheaper cosines. 1024 has an error of 0.03."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the projection.")] = 0,
    minima: Annotated[
        str | None, typer.Option(help="Models trained from MODEL on one source each: code=DIR,math=DIR.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="JSON file to write. By default closeness.json in MODEL.")] = None,
) -> None:
    """Measure how close the sources of a model are: hf-nexus closeness runs/nexus-demo --projection 1024"""
    path = Path(output or Path(model if Path(model).is_dir() else "", _OUTPUT_NAME))
    mixture, models = find_mixture(model, config), parse_minima(minima)
    if path.is_dir():
        raise ValueError(f"output: {path} is a folder. Give a file, such as {path / _OUTPUT_NAME}.")
    require_folder(path.parent, "output")
    from rich.progress import track
    from transformers.utils.logging import disable_progress_bar

    from ..evaluation.closeness import measure_closeness

    disable_progress_bar()  # while weights are loaded
    console = new_console()
    found = measure_closeness(
        model,
        mixture,
        base=base,
        batches=batches,
        batch_size=batch_size,
        projection=projection,
        seed=seed,
        minima=models,
        track=lambda text, parts: track(parts, text, console=console, transient=True, disable=not is_live(console)),
    )
    found.save(path)
    print_closeness(found, console)
    print(f"Saved in {path}")


def find_mixture(model: str, config: str | None = None) -> "MixtureConfig":
    """
    Read the mixture of a configuration, by name or path, or of a YAML file with the fields of a mixture. By default
    read the `pretrain.yaml` in the folder of the model, or for a checkpoint in the folder above.
    """
    from ..mixture.config import MixtureConfig
    from ..pretrain.sections import CONFIG_NAME, load_config, naming

    if config is None:
        folder = Path(model).resolve()
        folders = [folder, folder.parent] if re.fullmatch(r"checkpoint-\d+", folder.name) else [folder]
        found = [path for path in (one / CONFIG_NAME for one in folders) if path.is_file()]
        if not found:
            raise ValueError(
                f"There is no {CONFIG_NAME} in {model} to read the sources from. Pass --config: a configuration "
                "(demo, 3b), a run's pretrain.yaml, or a YAML file of a mixture."
            )
        config = str(found[0])
    data = load_config(config)["data"]
    with naming(config, "data.", {}):
        return MixtureConfig.from_dict(data)


def parse_minima(text: str | None) -> dict[str, str]:
    """Parse `code=runs/code,math=runs/math`."""
    minima: dict[str, str] = {}
    for item in text.split(",") if text else []:
        name, _, path = (piece.strip() for piece in item.partition("="))
        if not name or not path or name in minima:
            raise ValueError(f"--minima: {item!r} is not allowed. Give each source once, as in code=DIR,math=DIR.")
        minima[name] = path
    return minima


def print_closeness(found: "Closeness", console: "Console") -> None:
    """Print tables of the held-out losses, the gradient cosines and the distances between minimizers."""
    kind = f"adapter of {found.base}" if found.base else "model"
    console.print(f"{found.model} ({kind}): {found.parameters:,} parameters, L2 norm {found.parameter_norm:.4g}")
    console.print(_losses_table(found))
    if found.cosines:
        method = "exact" if found.projection is None else f"from sketches of {found.projection} numbers"
        fewest = min(found.cosine_tokens.values())
        title = f"Gradient cosines on held-out rows ({method}; at least {fewest:,} tokens per source)"
        console.print(_pairs_table(title, list(found.losses), found.cosines, "{:+.3f}", console.width))
        console.print(f"Mean over pairs: {found.mean_cosine:+.4f}")
    if found.minima:
        _print_minima(found.minima, console)


def _losses_table(found: "Closeness") -> "Table":
    from ..evaluation.losses import perplexity

    table = new_table("Held-out loss (nats per token)", "", "role", "tokens", "loss", "perplexity", texts=2)
    groups = [("train", found.losses, "macro", found.macro_loss), ("ood", found.ood_losses, "OOD", found.ood_loss)]
    for role, losses, label, mean in groups:
        for name, loss in losses.items():
            table.add_row(name, role, f"{found.tokens[name]:,}", f"{loss:.4f}", f"{perplexity(loss):,.2f}")
        if mean is not None:
            table.add_row(label, "mean", "", f"{mean:.4f}", f"{perplexity(mean):,.2f}", end_section=True)
    return table


def _pairs_table(
    title: str,
    names: Sequence[str],
    pairs: Sequence[tuple[str, str, float]],
    form: str,
    width: int,
    diagonal: str = "1",
) -> "Table":
    """A matrix of sources, or a list of pairs if the console of `width` columns is too narrow for it."""
    cells = {(a, b): form.format(value) for a, b, value in pairs}
    widest = max(map(len, cells.values()), default=0)
    if 4 + max(map(len, names)) + sum(3 + max(len(name), widest) for name in names) > width:
        table = new_table(title, "", "", "", texts=2)
        for (a, b), cell in cells.items():
            table.add_row(a, b, cell)
        return table
    table = new_table(title, "", *names)
    for i, a in enumerate(names):
        table.add_row(a, *(diagonal if a == b else cells[a, b] if i < j else cells[b, a] for j, b in enumerate(names)))
    return table


def _print_minima(minima: Mapping[str, Any], console: "Console") -> None:
    names, norm = list(minima["to_start"]), minima["parameter_norm"]
    table = new_table("Minimizers, relative to the model", "", "distance", "relative", "loss before", "loss after")
    for name in names:
        distance, before, after = (minima[key][name] for key in ("to_start", "start_loss", "end_loss"))
        table.add_row(name, f"{distance:.4g}", f"{distance / norm:.4f}", f"{before:.4f}", f"{after:.4f}")
    console.print(table)
    if minima["pairwise"]:
        distances = minima["pairwise"]
        console.print(_pairs_table("Distances between minimizers", names, distances, "{:.4g}", console.width, "0"))
        mean = sum(value for *_, value in distances) / len(distances)
        console.print(f"Minima distance (mean over pairs): {mean:.4g}, {mean / norm:.4f} of the parameter norm")
        title, barriers = "Barriers between minimizers (nats)", minima["barriers"]
        console.print(_pairs_table(title, names, barriers, "{:.4f}", console.width, "0"))
