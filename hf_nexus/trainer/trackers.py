"""The plots of a run in its experiment tracker: TensorBoard, Weights & Biases, Trackio."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

__all__ = ["send_plots"]

logger = logging.getLogger(__name__)

# Takes the name of a plot, its PNG file and the outer step.
Send = Callable[[str, Path, int], None]


def send_plots(callbacks: list[TrainerCallback], state: TrainerState, sources: list[str]) -> None:
    """
    Send the plots of the card, as `plots/<name>`, to the trackers among the callbacks that show images. Trackers close
    in `on_train_end`, so it is called before. An error is a warning: a plot must not cost a run.
    """
    senders = list(_senders(callbacks)) if state.is_world_process_zero else []
    if not senders:
        return
    try:
        from ..plots.run import plot_run

        with TemporaryDirectory() as folder:
            for plot in plot_run(state.log_history, sources, folder):
                for send in senders:
                    send(f"plots/{plot.stem}", plot, state.global_step)
    except Exception as error:
        logger.warning(f"The plots could not be sent to the experiment tracker: {error}")


def _senders(callbacks: list[TrainerCallback]) -> Iterator[Send]:
    """One for each tracker that has a run open."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            yield _to_tensorboard(callback.tb_writer)
        elif isinstance(callback, WandbCallback):
            yield _to_wandb
        elif isinstance(callback, TrackioCallback):
            yield _to_trackio


def _to_tensorboard(writer: Any) -> Send:
    def send(name: str, plot: Path, step: int) -> None:
        from matplotlib.image import imread

        writer.add_image(name, imread(plot)[..., :3], step, dataformats="HWC")

    return send


# Like the callbacks of transformers, these two log the step as a metric and leave the tracker's own count alone.
def _to_wandb(name: str, plot: Path, step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.run.log({name: wandb.Image(str(plot)), "train/global_step": step})


def _to_trackio(name: str, plot: Path, step: int) -> None:
    import trackio

    trackio.log({name: trackio.Image(str(plot)), "train/global_step": step})
