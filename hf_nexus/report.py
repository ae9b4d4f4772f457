"""What a run leaves for its reader: lines while it goes on, then a table, curves, the card and its results."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .arguments import PretrainArguments
from .cosine_plot import plot_cosines
from .hub.card import save_card
from .hub.results import RESULTS_NAME, Evaluation, save_results
from .hub.run_summary import SUMMARY_NAME, RunSummary
from .plots import plot_run
from .summary import summarize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .trainer import NexusTrainer, NexusTrainerMixin

__all__ = ["CARD_FILES", "RunLog", "draw_pictures", "write_card", "write_report"]

PLOT_NAME, COSINES_NAME = "training.png", "gradient_cosines.png"
# What `write_card` may leave in a folder, all of which belongs beside a published model.
CARD_FILES = ("README.md", SUMMARY_NAME, PLOT_NAME, COSINES_NAME, RESULTS_NAME)


class RunLog(TrainerCallback):
    """
    One line per log entry, in place of the Trainer's bars and dictionaries, which many sources make unreadable.

    Args:
        console (`rich.console.Console`):
            Where to; a quiet one on every process but the main.
    """

    def __init__(self, console: "Console"):
        self.console = console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Print what there is of a training log or an evaluation."""
        logs = logs or {}
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            ood = f"   OOD {logs['eval_ood_loss']:.3f}" if "eval_ood_loss" in logs else ""
            self.console.print(f"[bold]{step}   held-out loss   sources {logs['eval_loss']:.3f}{ood}[/bold]")
        elif "loss" in logs:
            parts = [step, f"loss {logs['loss']:.3f}"]
            if "path_cosine" in logs:
                parts.append(f"path cosine {logs['path_cosine']:+.3f}")
            if "tokens_per_second" in logs:
                parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
            self.console.print("   ".join([*parts, f"{self._remaining(state)} left"]), highlight=False)

    def _remaining(self, state: Any) -> str:
        done = max(1, state.global_step - self.first_step)
        seconds = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))


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
        >>> from hf_nexus.report import draw_pictures
        >>> log = [{"step": step, "eval_text_loss": 3 / step} for step in (1, 2, 3)]
        >>> [path.name for path in draw_pictures(log, ["text"], mkdtemp())]
        ['training.png']
    """
    pictures: list[Path] = []
    with suppress(ValueError):  # it is too early for a curve
        pictures.append(plot_run(log_history, Path(folder, PLOT_NAME), sources))
    cosines = plot_cosines(log_history, sources, Path(folder, COSINES_NAME))
    return pictures if cosines is None else [*pictures, cosines]


def write_card(
    trainer: "NexusTrainerMixin", folder: str | Path | None = None, *, plots: bool = True, **known: Any
) -> RunSummary:
    """
    Write the card of a run as far as it has come, with everything that it shows: `CARD_FILES`. What a user wrote into
    an existing `README.md` stays.

    Args:
        trainer ([`NexusTrainerMixin`]):
            On the main process.
        folder (`str` or `Path`, *optional*):
            Where to; `output_dir` by default.
        plots (`bool`, *optional*, defaults to `True`):
            Draw the pictures, which takes most of the time. A card without them does not mention them.
        known:
            Fields of [`RunSummary`] that a trainer cannot know, such as `license`, `languages` or `benchmarks`.

    Returns:
        [`RunSummary`]: what the card says.

    Raises:
        ValueError: the existing README is damaged, or the card would be invalid (an unknown licence, for example).

    Example:
        >>> from hf_nexus.report import write_card
        >>> write_card(trainer, license="apache-2.0", languages=["en"])  # doctest: +SKIP
    """
    folder = Path(folder or trainer.args.output_dir)
    summary = summarize(trainer, **known)
    if plots:
        drawn = {path.name for path in draw_pictures(trainer.state.log_history, trainer.data.names, folder)}
        summary.plot = PLOT_NAME if PLOT_NAME in drawn else None
        summary.cosine_plot = COSINES_NAME if COSINES_NAME in drawn else None
    save_card(summary, folder)
    save_results(summary.benchmarks, folder)
    summary.save(folder)
    return summary


def write_report(arguments: PretrainArguments, trainer: "NexusTrainer", console: "Console") -> RunSummary:
    """Write the card of a pretraining run into its output folder, and print the table of losses."""
    summary = write_card(trainer, arguments.folder, **trainer.card_details)
    written = ", ".join(name for name in CARD_FILES if (arguments.folder / name).exists())
    console.print(_loss_table(summary.evaluations))
    console.print(f"Saved in {arguments.folder}: the model and its tokenizer, trainer_state.json, {written}")
    return summary


def _loss_table(rows: Sequence[Evaluation]) -> "Table":
    from rich.table import Table

    table = Table(title="Held-out loss at restored weights (nats per token)")
    for column in ("", "role", "first", "last", "change"):
        table.add_column(column, justify="left" if column in ("", "role") else "right")
    for row in rows:
        first = "-" if row.first_loss is None else f"{row.first_loss:.4f}"
        change = "-" if row.first_loss is None else f"{row.last_loss - row.first_loss:+.4f}"
        table.add_row(row.name, row.role, first, f"{row.last_loss:.4f}", change, end_section=row.role == "macro")
    return table
