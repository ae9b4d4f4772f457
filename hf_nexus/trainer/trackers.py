"""The pictures of a run in the experiment tracker that has its metrics: TensorBoard, Weights & Biases, Trackio."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

if TYPE_CHECKING:
    from .mixture_trainer import MixtureTrainerMixin

__all__ = ["TrackerPlots"]

logger = logging.getLogger(__name__)

# Takes a picture's name, its PNG file and the outer step.
Send = Callable[[str, Path, int], None]


class TrackerPlots(TrainerCallback):
    """
    At the end of training, sends the pictures of the card as `plots/<name>` to those trackers of `report_to` that show
    images. Metrics need no help: each integration logs what [`~transformers.Trainer.log`] is given.

    Args:
        trainer ([`MixtureTrainerMixin`]):
            Whose log is drawn, and whose callbacks are asked for trackers.
    """

    def __init__(self, trainer: "MixtureTrainerMixin"):
        self.trainer = trainer

    @classmethod
    def attach(cls, trainer: "MixtureTrainerMixin") -> None:
        """Become the first callback of `trainer`: at the end of training the trackers' own close them."""
        trainer.callback_handler.callbacks.insert(0, cls(trainer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw and send. A picture is not worth a run: what goes wrong is a warning."""
        if not state.is_world_process_zero:
            return
        try:
            senders = list(_senders(self.trainer.callback_handler.callbacks))
            if senders:
                self._draw_and_send(senders, state)
        except Exception as error:
            logger.warning(f"The plots could not be sent to the experiment tracker: {error}")

    def _draw_and_send(self, senders: list[Send], state: Any) -> None:
        from ..plots.run import plot_run

        with TemporaryDirectory() as folder:
            for picture in plot_run(state.log_history, self.trainer.data.names, folder):
                for send in senders:
                    send(f"plots/{picture.stem}", picture, state.global_step)


def _senders(callbacks: Iterable[TrainerCallback]) -> Iterator[Send]:
    """One for each tracker that has a run open."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            yield _to_tensorboard(callback.tb_writer)
        elif isinstance(callback, WandbCallback):
            yield _to_wandb
        elif isinstance(callback, TrackioCallback):
            yield _to_trackio


def _to_tensorboard(writer: Any) -> Send:
    def send(name: str, picture: Path, step: int) -> None:
        from matplotlib.image import imread

        writer.add_image(name, imread(picture)[..., :3], step, dataformats="HWC")

    return send


# As the integrations of transformers do, these two tell the step by a metric and leave the tracker's own count alone.
def _to_wandb(name: str, picture: Path, step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.run.log({name: wandb.Image(str(picture)), "train/global_step": step})


def _to_trackio(name: str, picture: Path, step: int) -> None:
    import trackio

    trackio.log({name: trackio.Image(str(picture)), "train/global_step": step})
