"""All plots of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cosines import plot_cosines
from .training import plot_training

__all__ = ["COSINES_PLOT", "TRAINING_PLOT", "plot_run"]

TRAINING_PLOT, COSINES_PLOT = "training.png", "gradient_cosines.png"


def plot_run(log_history: Sequence[Mapping[str, Any]], sources: Sequence[str], folder: str | Path) -> list[Path]:
    """
    Draw each plot that the log has data for: `training.png` and `gradient_cosines.png`.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`.
        sources (`Sequence[str]`):
            Names of the training sources.
        folder (`str` or `Path`):
            Folder to write to.

    Returns:
        `list[Path]`: the files written.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.plots.run import plot_run
        >>> log = [{"step": step, "eval_text_loss": 3 / step} for step in (1, 2, 3)]
        >>> [path.name for path in plot_run(log, ["text"], mkdtemp())]
        ['training.png']
    """
    plots = [
        plot_training(log_history, sources, Path(folder, TRAINING_PLOT)),
        plot_cosines(log_history, sources, Path(folder, COSINES_PLOT)),
    ]
    return [path for path in plots if path is not None]
