"""One run of a comparison: an arm under a seed, from its configuration to its record."""

import itertools
import json
import math
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from transformers import TrainerCallback

from ..evaluation.answers import answer_scores
from ..mixture.stream.documents import StreamedDocuments
from ..pretrain.parsing import parse_arguments
from ..pretrain.run import PretrainRun, prepare_run
from ..trainer.checkpoints import last_checkpoint
from .config import ComparisonConfig
from .parts import Task
from .records import RECORD_NAME, LossPoint, Pairs, RunRecord

if TYPE_CHECKING:
    from datasets import Dataset

    from ..mixture.loading import Mixture

__all__ = ["Run", "read_rows", "train_sample"]

CONFIG_NAME, MEASURED_NAME, MINIMA_NAME = "run.yaml", "measured.yaml", "minima.yaml"
_SAMPLE = "train_sample"  # prefix of the metrics on the sample of training rows
_SCORES = ("answer_loss", "exact_match")
_PATH_FIGURES = ("path_cosine", "pseudo_gradient_norm", "inner_lr", "learning_rate")


@dataclass(frozen=True)
class Run:
    """
    An arm under a seed, in a folder of its own.

    Args:
        config ([`ComparisonConfig`]):
            The comparison.
        arm (`str`), seed (`int`):
            Which of its runs.
        settings (`dict[str, Any]`):
            The training fields that differ from the comparison's, chosen ones included.
        folder (`Path`):
            `output_dir` of the run.
        tokenizer (`str`):
            Folder of the tokenizer of all runs.
        trial (`bool`, *optional*, defaults to `False`):
            Part of a tuning: nothing is measured but the losses at the end.
    """

    config: ComparisonConfig
    arm: str
    seed: int
    settings: dict[str, Any]
    folder: Path
    tokenizer: str
    trial: bool = False

    def __str__(self) -> str:
        tried = ", ".join(f"{key} {value}" for key, value in self.settings.items() if self.trial)
        return f"{self.arm} seed {self.seed}" + (f" ({tried})" if tried else "")

    def sections(self) -> dict[str, dict[str, Any]]:
        """The pretraining configuration of this run."""
        own = {"output_dir": str(self.folder), "seed": self.seed, "overwrite_output_dir": True}
        if self.trial:
            own |= {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "gradient_cosine_steps": 0}
        sections = self.config.run_config({**self.settings, **own})
        sections["model"] = {**sections["model"], "tokenizer": self.tokenizer}
        return sections

    def measured(self) -> dict[str, Any]:
        """What decides on the figures beside the training."""
        tasks = {name: asdict(task) for name, task in self.config.tasks.items()}
        return {"train_sample_rows": self.config.train_sample_rows, "tasks": tasks}

    def record(self) -> RunRecord | None:
        """
        What the run left, if it has been run.

        Raises:
            ValueError: the folder holds a run with another configuration, or one that was measured otherwise.
        """
        self._refuse_other(CONFIG_NAME, self.sections())
        if not self.trial:
            self._refuse_other(MEASURED_NAME, self.measured())
        return RunRecord.load(self.folder) if (self.folder / RECORD_NAME).exists() else None

    def refuse_other_minima(self) -> None:
        """Raise `ValueError` if the minima of this run were searched for with other settings."""
        if self.config.minima is not None:
            self._refuse_other(MINIMA_NAME, asdict(replace(self.config.minima, seeds=None)))

    def note_minima(self) -> None:
        """Note with which settings they were searched for."""
        assert self.config.minima is not None
        text = yaml.safe_dump(asdict(replace(self.config.minima, seeds=None)), sort_keys=False)
        (self.folder / MINIMA_NAME).write_text(text, encoding="utf-8")

    def _refuse_other(self, name: str, expected: dict[str, Any]) -> None:
        path = self.folder / name
        if path.exists() and yaml.safe_load(path.read_text(encoding="utf-8")) != expected:
            raise ValueError(
                f"{self.folder} holds a run with other settings (see {name} there). Give the comparison another "
                "output_dir, or delete that folder."
            )

    def execute(self) -> RunRecord:
        """Train, measure, and save the record; from the last checkpoint on, if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / CONFIG_NAME
        for name, content in ((CONFIG_NAME, self.sections()), (MEASURED_NAME, self.measured())):
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            (self.folder / name).write_text(text, encoding="utf-8")
        resume = ["--resume_from_checkpoint", "last"] if last_checkpoint(self.folder) else []
        run = prepare_run(parse_arguments(["--config", str(path), *resume]))
        if not self.trial:
            sample = train_sample(run.mixture, self.config.train_sample_rows)
            run.trainer.add_callback(_EvaluateSample(run.trainer, sample))
        run.train()
        record = self._measure(run)
        record.save(self.folder)
        return record

    def _measure(self, run: PretrainRun) -> RunRecord:
        log, names = run.trainer.state.log_history, run.trainer.data.names
        window = run.trainer.args.train_batch_size * run.trainer.args.gradient_accumulation_steps
        record = RunRecord(
            arm=self.arm,
            seed=self.seed,
            settings=self.settings,
            curve=_curve(log, run.mixture, window * run.arguments.mixture.sequence_length),
            seconds=next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), 0.0),
        )
        if self.trial:
            return record
        record.path = [
            {"step": entry["step"]} | {key: float(entry[key]) for key in _PATH_FIGURES if key in entry}
            for entry in log
            if "loss" in entry
        ]
        last = run.trainer.state.global_step
        record.cosines = [*_logged_cosines(log, names), (last, _pairs(run.trainer.source_cosines()))]
        for name, task in self.config.tasks.items():
            scores = answer_scores(
                run.trainer.model,
                run.trainer.processing_class,
                read_rows(task),
                prompt=task.prompt,
                max_new_tokens=task.max_new_tokens,
                batch_size=run.trainer.args.per_device_eval_batch_size,
            )
            record.downstream |= {f"{name}/{key}": value for key, value in scores.items() if key in _SCORES}
        return record


def train_sample(mixture: "Mixture", rows: int) -> "dict[str, Dataset]":
    """
    The rows of each training source on which the training loss is measured: the same ones for any seed.

    Raises:
        ValueError: a streaming source, of which no fixed sample can be had.
    """
    sample = {}
    for name, dataset in mixture.train.items():
        if isinstance(dataset, StreamedDocuments):
            raise ValueError(
                f"sources.{name}.streaming: a comparison measures the training loss on fixed rows, and a stream has "
                "none. Remove it, and bound the source by max_tokens."
            )
        order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(dataset))
        sample[name] = dataset.select(sorted(order[:rows].tolist()))
    return sample


def read_rows(task: Task) -> list[dict[str, Any]]:
    """
    The rows of a task's file.

    Raises:
        ValueError: a line that is not a JSON object with `question` and `answer`, or no line at all.
        OSError: the file cannot be read.
    """
    with open(task.path, encoding="utf-8") as lines:
        try:
            rows = [json.loads(line) for line in itertools.islice(lines, task.max_rows)]
            whole = bool(rows) and all(isinstance(row[key], str) for row in rows for key in ("question", "answer"))
        except (ValueError, KeyError, TypeError):
            whole = False
    if not whole:
        raise ValueError(f"{task.path} must hold a JSON object with the texts `question` and `answer` in each line.")
    return rows


class _EvaluateSample(TrainerCallback):
    """Measures the loss on the sample of training rows whenever the held-out losses are measured."""

    def __init__(self, trainer: Any, sample: "dict[str, Dataset]"):
        self.trainer, self.sample = trainer, sample

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        if "eval_loss" in (metrics or {}):  # and not the evaluation that this begins
            self.trainer.evaluate(self.sample, metric_key_prefix=_SAMPLE)


def _curve(log: list[dict[str, Any]], mixture: "Mixture", step_tokens: int) -> list[LossPoint]:
    measured: dict[int, dict[str, Any]] = {}
    for entry in log:
        if "eval_loss" in entry or f"{_SAMPLE}_loss" in entry:
            measured[entry["step"]] = measured.get(entry["step"], {}) | entry
    train, ood = mixture.config.train_sources, mixture.config.ood_sources
    return [
        LossPoint(
            step=step,
            tokens=step * step_tokens,
            train=_losses(metrics, _SAMPLE, train),
            validation=_losses(metrics, "eval", train),
            ood=_losses(metrics, "eval", ood),
            train_loss=metrics.get(f"{_SAMPLE}_loss", math.nan),
            validation_loss=metrics["eval_loss"],
            ood_loss=metrics.get("eval_ood_loss"),
        )
        for step, metrics in sorted(measured.items())
    ]


def _losses(metrics: dict[str, Any], prefix: str, names: Any) -> dict[str, float]:
    return {name: metrics[f"{prefix}_{name}_loss"] for name in names if f"{prefix}_{name}_loss" in metrics}


def _logged_cosines(log: list[dict[str, Any]], names: list[str]) -> list[tuple[int, Pairs]]:
    found = []
    for entry in log:
        keys = {(a, b): f"cosine/{a}-{b}" for a, b in itertools.combinations(names, 2)}
        if pairs := {pair: entry[key] for pair, key in keys.items() if key in entry}:
            found.append((entry["step"], _pairs(pairs)))
    return found


def _pairs(values: dict[tuple[str, str], float]) -> Pairs:
    return [(a, b, float(value)) for (a, b), value in values.items()]
