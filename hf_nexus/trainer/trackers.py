"""The plots of a run in its experiment tracker: TensorBoard, Weights & Biases, Trackio."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

__all__ = ["TrackerPlots", "attach_plots"]

logger = logging.getLogger(__name__)

# Takes the name of a plot, its PNG file and the outer step.
Send = Callable[[str, Path, int], None]

_TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)


class TrackerPlots(TrainerCallback):
    """
    Sends the plots of the card at the end of training, as `plots/<name>`, to the trackers that show images. The
    tracker's callback logs the metrics of [`~transformers.Trainer.log`].
    """

    def __init__(self, sources: list[str], callbacks: list[TrainerCallback]):
        self.sources = sources
        self.callbacks = callbacks

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw and send. An error here is a warning: a plot must not cost a run."""
        if not state.is_world_process_zero:
            return
        try:
            senders = list(self._senders())
            if senders:
                self._draw_and_send(senders, state)
        except Exception as error:
            logger.warning(f"The plots could not be sent to the experiment tracker: {error}")

    def _draw_and_send(self, senders: list[Send], state: Any) -> None:
        from ..plots.run import plot_run

        with TemporaryDirectory() as folder:
            for plot in plot_run(state.log_history, self.sources, folder):
                for send in senders:
                    send(f"plots/{plot.stem}", plot, state.global_step)

    def _senders(self) -> Iterator[Send]:
        """One for each tracker that has a run open."""
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                yield _to_tensorboard(callback.tb_writer)
            elif isinstance(callback, WandbCallback):
                yield _to_wandb
            elif isinstance(callback, TrackioCallback):
                yield _to_trackio


def attach_plots(callbacks: list[TrainerCallback], sources: list[str]) -> None:
    """
    Send the plots to the trackers among the callbacks of a trainer, if there are any.

    The callback comes first: at the end of training the trackers' own callbacks close them.
    """
    if any(isinstance(c, _TRACKERS) for c in callbacks) and not any(isinstance(c, TrackerPlots) for c in callbacks):
        callbacks.insert(0, TrackerPlots(sources, callbacks))


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
