"""The plots of a run in its experiment tracker: TensorBoard, Weights & Biases, Trackio."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

__all__ = ["send_plots"]

logger = logging.getLogger(__name__)


def send_plots(callbacks: list[TrainerCallback], state: TrainerState, sources: list[str], per_token: bool) -> None:
    """
    Send the plots of the card, as `plots/<name>`, to the trackers among the callbacks that show images. Trackers close
    in `on_train_end`, so it is called before. `per_token` is as for [`plot_run`]. An error is a warning: a plot must
    not cost a run.
    """
    trackers = [c for c in callbacks if isinstance(c, TensorBoardCallback | WandbCallback | TrackioCallback)]
    if not trackers or not state.is_world_process_zero:
        return
    try:
        from ..plots.run import plot_run

        with TemporaryDirectory() as folder:
            for plot in plot_run(state.log_history, sources, folder, per_token):
                for tracker in trackers:
                    _send(tracker, f"plots/{plot.stem}", plot, state.global_step)
    except Exception as error:
        logger.warning(f"The plots could not be sent to the experiment tracker: {error}")


def _send(tracker: TrainerCallback, name: str, plot: Path, step: int) -> None:
    """Send a PNG file, if the tracker has a run open."""
    if isinstance(tracker, TensorBoardCallback):
        from matplotlib.image import imread

        if tracker.tb_writer is not None:
            tracker.tb_writer.add_image(name, imread(plot)[..., :3], step, dataformats="HWC")
    # Like the callbacks of transformers, these two log the step as a metric and leave the tracker's own count alone.
    elif isinstance(tracker, WandbCallback):
        import wandb

        if wandb.run is not None:
            wandb.run.log({name: wandb.Image(str(plot)), "train/global_step": step})
    else:
        import trackio

        trackio.log({name: trackio.Image(str(plot)), "train/global_step": step})
