"""What a finished run leaves for its reader: a table, curves and the card, all from `trainer.state.log_history`."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel, TrainerCallback

from .arguments import PretrainArguments
from .environment import describe_hardware, installed_versions
from .hub.card import save_card
from .hub.card_check import is_repo_id
from .hub.run_summary import Evaluation, MixtureRow, RunSummary
from .mixture.strict import BUILTIN_PREFIX
from .plots import plot_run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .mixture.loading import Mixture
    from .trainer import NexusTrainer

__all__ = ["RunLog", "evaluations", "summarize", "write_report"]

PLOT_NAME = "training.png"
_NUMBERS = ("path_cosine", "pseudo_gradient_norm", "inner_lr", "inner_steps_skipped", "tokens_per_second", "mfu")


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


def write_report(
    arguments: PretrainArguments, trainer: "NexusTrainer", mixture: "Mixture", console: "Console"
) -> RunSummary:
    """Print the table of losses; write the curves and `README.md` into the output folder."""
    folder = arguments.folder
    summary = summarize(arguments, trainer, mixture)
    plot_run(trainer.state.log_history, folder / PLOT_NAME)
    save_card(summary, folder)
    console.print(_loss_table(summary.evaluations))
    console.print(f"Saved in {folder}: the model and its tokenizer, trainer_state.json, {PLOT_NAME}, README.md")
    return summary


def evaluations(log_history: Sequence[Mapping[str, Any]], mixture: "Mixture") -> list[Evaluation]:
    """First and last loss of every evaluation set, in the order sources, macro, OOD sources, their mean."""
    sources, ood = mixture.config.train_sources, mixture.config.ood_sources
    rows: list[tuple[str, str, Literal["train", "ood", "macro"], str | None]]
    rows = [(name, f"eval_{name}_loss", "train", _hub_id(source.path)) for name, source in sources.items()]
    rows.append(("macro", "eval_loss", "macro", None))
    rows += [(name, f"eval_{name}_loss", "ood", _hub_id(source.path)) for name, source in ood.items()]
    rows.append(("macro over OOD", "eval_ood_loss", "macro", None))
    found = []
    for name, key, role, path in rows:
        losses = [entry[key] for entry in sorted(log_history, key=lambda e: e.get("step", 0)) if key in entry]
        if losses:
            first = losses[0] if len(losses) > 1 else None
            found.append(Evaluation(name, role, first, losses[-1], path))
    return found


def summarize(arguments: PretrainArguments, trainer: "NexusTrainer", mixture: "Mixture") -> RunSummary:
    """Everything that the card says about a run."""
    args, log = arguments.training, trainer.state.log_history
    last: dict[str, Any] = {}
    for entry in log:
        last.update(entry)
    trained = {name: trainer.meter.trained_tokens[name] for name in mixture.train}
    total = max(1, sum(trained.values()))
    weights, model = trainer.mixture_weights, trainer.model
    assert weights is not None and isinstance(model, PreTrainedModel)
    rows = [  # the first token of a row is not predicted, and so not counted
        MixtureRow(
            source=name,
            weight=float(weights[name]) / sum(weights.values()),
            share=trained[name] / total,
            epochs=trained[name] / (len(mixture.train[name]) * (mixture.config.sequence_length - 1)),
            tokens=trained[name],
            license=mixture.licenses[name],
            dataset=_public_path(mixture.config.sources[name].path),
        )
        for name in mixture.train
    ]
    return RunSummary(
        model_name=args.hub_model_id or arguments.folder.resolve().name,
        model_type=model.config.model_type,
        parameters=model.num_parameters(),
        nexus=trainer.nexus_settings(),
        mixture=rows,
        evaluations=evaluations(log, mixture),
        hyperparameters=arguments.resolved["training"],
        changed_hyperparameters=arguments.changed,
        numbers={key: float(last[key]) for key in _NUMBERS if key in last},
        repo_id=args.hub_model_id,
        datasets=[hub_id for source in mixture.config.train_sources.values() if (hub_id := _hub_id(source.path))],
        hardware=describe_hardware(args.world_size),
        seconds=last.get("train_runtime"),
        tokens_per_second=last.get("tokens_per_second"),
        versions=installed_versions(),
        plot=PLOT_NAME,
    )


def _hub_id(path: str) -> str | None:
    local = path.startswith(BUILTIN_PREFIX) or Path(path).exists()
    return path if not local and is_repo_id(path) else None


def _public_path(path: str) -> str:
    """Of a local path the last part: where it lay on the machine that trained is nobody's business."""
    return path if path.startswith(BUILTIN_PREFIX) or _hub_id(path) else Path(path).name


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
