"""All pictures of a run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .cosines import plot_cosines
from .training import plot_run

__all__ = ["COSINES_NAME", "PLOT_NAME", "draw_pictures"]

PLOT_NAME, COSINES_NAME = "training.png", "gradient_cosines.png"


def draw_pictures(log_history: Sequence[Mapping[str, Any]], sources: Sequence[str], folder: str | Path) -> list[Path]:
    """
    Draw what a log allows: the curves (`training.png`), and the gradient cosines (`gradient_cosines.png`).

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            What `trainer.state.log_history` holds.
        sources (`Sequence[str]`):
            Names of the training sources.
        folder (`str` or `Path`):
            Where to.

    Returns:
        `list[Path]`: the pictures drawn; empty if it is too early for any.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.plots.run import draw_pictures
        >>> log = [{"step": step, "eval_text_loss": 3 / step} for step in (1, 2, 3)]
        >>> [path.name for path in draw_pictures(log, ["text"], mkdtemp())]
        ['training.png']
    """
    pictures: list[Path] = []
    with suppress(ValueError):  # it is too early for a curve
        pictures.append(plot_run(log_history, Path(folder, PLOT_NAME), sources))
    cosines = plot_cosines(log_history, sources, Path(folder, COSINES_NAME))
    return pictures if cosines is None else [*pictures, cosines]
