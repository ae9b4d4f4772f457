"""What a pretraining run prints: lines while it trains, then a table of losses."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..hub.results import Evaluation
from ..hub.run_summary import RunSummary
from ..trainer.card import CARD_FILES
from .fields import PretrainArguments

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..trainer.mixin import NexusTrainer

__all__ = ["RunLog", "write_report"]


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


def write_report(arguments: PretrainArguments, trainer: "NexusTrainer", console: "Console") -> RunSummary:
    """Write the card of a pretraining run into its output folder, and print the table of losses."""
    summary = trainer.write_card(arguments.folder)
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
