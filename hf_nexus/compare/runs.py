"""One run of a comparison, an arm at one seed: its configuration, its training, and its record."""

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from ..evaluation.answers import ANSWER_MARK, final_answer
from ..evaluation.losses import losses_of, mean_losses
from ..evaluation.questions import answer_scores
from ..files import checkpoints_of, write_atomic
from ..lock import locked
from ..mixture.stream.dataset import MixtureStream
from ..mixture.stream.documents import StreamedDocuments
from ..mixture.stream.lanes import Lanes
from ..pretrain.fields import PretrainConfig
from ..pretrain.parsing import parse_arguments
from ..pretrain.run import PretrainRun, prepare_run
from ..strict import dump_yaml, read_yaml
from ..trainer.checkpoints import STAGING_DIR, is_complete, last_checkpoint
from .config import ComparisonConfig, QuestionSet
from .records import RECORD_NAME, LossPoint, Pairs, RunRecord

if TYPE_CHECKING:
    from ..mixture.loading import Mixture

__all__ = [
    "MEASURED_NAME",
    "MINIMA_NAME",
    "SETTINGS_NAME",
    "Run",
    "read_questions",
    "shared_settings",
    "train_sample",
]

SETTINGS_NAME, MEASURED_NAME, MINIMA_NAME = "run.yaml", "measured.yaml", "minima.yaml"
_BATCH = "per_device_train_batch_size"
_SAMPLE = "train_sample"  # prefix of the metrics on the sample of training rows
_NOT_COMPUTED = ("output_dir", "run_name", "overwrite_output_dir", "push_to_hub", "hub_model_id")
_PATH_METRICS = ("path_cosine", "pseudo_gradient_norm", "inner_lr", "learning_rate")


@dataclass(frozen=True)
class Run:
    """An arm at one seed, or a trial of its tuning, of which only the final losses are measured."""

    config: ComparisonConfig
    arm: str
    seed: int
    settings: dict[str, Any]  # training fields of the arm, with those chosen by its tuning
    folder: Path  # `output_dir` of the run
    tokenizer: str  # folder of the tokenizer that all runs share
    trial: bool = False

    def __str__(self) -> str:
        tried = ", ".join(f"{key} {value}" for key, value in self.settings.items() if self.trial)
        return f"{self.arm} seed {self.seed}" + (f" ({tried})" if tried else "")

    def files(self) -> dict[str, dict[str, Any]]:
        """Settings of training, measurements and minima search, by the file of the folder that holds them."""
        study = Path(self.config.output_dir).resolve().name
        # A tracker may append the curves of a run to those of another with its name.
        own: dict[str, Any] = {"output_dir": str(self.folder), "run_name": f"{study}/{self.name}", "seed": self.seed}
        own |= {"push_to_hub": self.repo_id is not None, "hub_model_id": self.repo_id}
        if self.trial:
            own |= {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "gradient_cosine_steps": 0}
        sections = self.config.run_config({**self.settings, **own})
        sections["model"] = {**sections["model"], "tokenizer": self.tokenizer}
        # Devices multiply the batch.
        measured: dict[str, Any] = {"devices_per_run": self.config.devices_per_run}
        files: dict[str, dict[str, Any]] = {SETTINGS_NAME: sections, MEASURED_NAME: measured}
        if not self.trial:
            questions = {name: asdict(questions) for name, questions in self.config.question_sets.items()}
            measured |= {"train_sample_rows": self.config.train_sample_rows, "question_sets": questions}
            if self.config.minima is not None:
                files[MINIMA_NAME] = asdict(replace(self.config.minima, arms=None, seeds=None))
        return files

    @property
    def name(self) -> str:
        """The folder in that of the comparison, as in `nexus/seed-2` or `tuning/nexus/trial-0/seed-0`."""
        return self.folder.relative_to(self.config.output_dir).as_posix().removeprefix("arms/")

    @property
    def repo_id(self) -> str | None:
        """Repository that the run is pushed to."""
        if self.trial or self.config.push_to is None:
            return None
        return f"{self.config.push_to}-{self.arm}-seed-{self.seed}"

    def write(self, names: Iterable[str] = (SETTINGS_NAME, MEASURED_NAME)) -> None:
        """Write some of `files` into the folder: by default those that `train` needs."""
        files = self.files()
        for name in (name for name in names if name in files):
            write_atomic(self.folder / name, dump_yaml(files[name]))

    def check(self, names: Iterable[str] = (SETTINGS_NAME, MEASURED_NAME, MINIMA_NAME)) -> None:
        """
        Check that the folder holds no run with other settings.

        Raises:
            ValueError: a file of the folder differs from `files`.
        """
        files = self.files()
        for path in (self.folder / name for name in names if name in files):
            if path.exists() and _computed(read_yaml(path)) != _computed(files[path.name]):
                raise ValueError(
                    f"{self.folder} holds a run with other settings (see {path.name} there). Choose another "
                    "output_dir for the comparison, or delete that folder."
                )

    def load(self) -> RunRecord | None:
        """The record of the run, `None` if it has not completed."""
        return RunRecord.load(self.folder) if (self.folder / RECORD_NAME).exists() else None

    def train(self) -> RunRecord:
        """
        Train from the last checkpoint if there is one, measure, and save the record. A finished run has its record
        already. The folder must hold its configuration (see `write`). All ranks of the run must call it.

        Raises:
            ValueError: another process trains the run.
        """
        with locked(self.folder) if int(os.environ.get("RANK", "0")) == 0 else nullcontext():
            return self.load() or self._train()

    def _train(self) -> RunRecord:
        # Looked for first: one that a killed process has completed, to which `prepare_run` gives its name.
        unnamed = any(map(is_complete, checkpoints_of(self.folder / STAGING_DIR)))
        resume = ["--resume_from_checkpoint", "last"] if unnamed or last_checkpoint(self.folder) else []
        run = prepare_run(parse_arguments(["--config", str(self.folder / SETTINGS_NAME), *resume]))
        if not self.trial:
            batch = run.trainer.cosine_rows = shared_settings(self.config, [_BATCH])[_BATCH]
            sample = train_sample(run, self.config.train_sample_rows, batch)
            run.trainer.add_callback(_EvaluateSample(run.trainer, sample))
        run.train()
        record = self._measure(run)
        if run.trainer.is_world_process_zero():
            record.save(self.folder)
        run.trainer.publish("Add the record of the run")
        run.trainer.end_publishing(60.0)  # this process goes on with other runs
        run.trainer.accelerator.wait_for_everyone()  # no rank leaves while another still communicates
        return record

    def _measure(self, run: PretrainRun) -> RunRecord:
        log, names, args = run.trainer.state.log_history, run.trainer.data.names, run.trainer.args
        window = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        record = RunRecord(
            arm=self.arm,
            seed=self.seed,
            settings=self.settings,
            curve=_curve(log, run.mixture, window * run.arguments.mixture.sequence_length),
            seconds=run.trainer.meter.seconds,
        )
        if self.trial:
            return record
        record.path = [
            {"step": entry["step"]} | {key: float(entry[key]) for key in _PATH_METRICS if key in entry}
            for entry in log
            if "loss" in entry
        ]
        if not run.trainer.sharded:  # whose ranks hold parts of the gradients
            last = run.trainer.state.global_step
            record.cosines = _logged_cosines(log, names)
            if not record.cosines or record.cosines[-1][0] != last:
                record.cosines.append((last, _pairs(run.trainer.source_cosines())))
        for name, questions in self.config.question_sets.items():
            scores = answer_scores(
                run.trainer.model,
                run.trainer.processing_class,
                read_questions(questions),
                prompt=questions.prompt,
                max_new_tokens=questions.max_new_tokens,
                batch_size=args.per_device_eval_batch_size,
            )
            record.downstream |= {f"{name}/{key}": value for key, value in scores.items()}
        return record


def _computed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without names, paths and those of pushes, which change nothing that is computed."""
    left_out = {"training": _NOT_COMPUTED, "model": ("tokenizer",)}
    return settings | {
        section: {key: value for key, value in settings.get(section, {}).items() if key not in names}
        for section, names in left_out.items()
    }


def shared_settings(config: ComparisonConfig, names: Iterable[str]) -> dict[str, Any]:
    """Training arguments of a measurement that may not depend on the arm: those of the baseline."""
    training = config.run_config(config.settings(config.baseline))["training"]
    return {name: training.get(name, getattr(PretrainConfig, name)) for name in names}


def train_sample(run: PretrainRun, rows: int, batch: int) -> dict[str, Any]:
    """
    The rows of each training source on which the training loss is measured. Those of a stream are the first of a run
    with micro-batches of `batch` rows per device: all arms of a seed train on them, since they cut it into the same
    lanes. Those of another source are the same for all seeds.

    Raises:
        SourceError: a stream cannot be read.
    """
    args, streams = run.trainer.args, run.trainer.data.dataset
    batch *= args.world_size  # rows of a micro-batch of all ranks
    if isinstance(streams, MixtureStream):  # read apart from the training, by one reader and in the run's order
        lanes = Lanes.of_run(batch, args.world_size, max(1, args.dataloader_num_workers))
        streams = MixtureStream(streams.sources, seed=streams.seed, buffer_size=streams.buffer_size)
        streams.place(0, 1, 1, lanes)
    sample: dict[str, Any] = {}
    for number, (name, dataset) in enumerate(run.mixture.train.items()):
        if not isinstance(dataset, StreamedDocuments):
            order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(dataset))
            sample[name] = dataset.select(sorted(order[:rows].tolist()))
        else:
            numbers = (range(first, first + batch) for first in range(0, rows, batch))
            read = (streams.__getitems__([(row, number) for row in of_batch]) for of_batch in numbers)
            sample[name] = list(itertools.islice(itertools.chain.from_iterable(read), rows))
    return sample


def read_questions(questions: QuestionSet) -> list[dict[str, Any]]:
    """
    The rows of a question set.

    Raises:
        ValueError: the file is empty, a line is not a JSON object with `question` and `answer`, or the answers are to
            be generated and one of the given has no final answer to compare with.
        OSError: the file cannot be read.
    """
    with open(questions.path, encoding="utf-8") as lines:
        try:
            rows = [json.loads(line) for line in itertools.islice(lines, questions.max_rows)]
            valid = bool(rows) and all(isinstance(row[key], str) for row in rows for key in ("question", "answer"))
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
    if not valid:
        raise ValueError(
            f"{questions.path}: each line must be a JSON object with the strings `question` and `answer`."
        )
    for number, row in enumerate(rows, start=1) if questions.max_new_tokens else ():
        if final_answer(row["answer"]) is None:
            raise ValueError(
                f"{questions.path}: `answer` in line {number} must end in a line '{ANSWER_MARK}<answer>', to compare "
                "generated answers with. Add it, or set max_new_tokens to 0 to measure only the loss."
            )
    return rows


class _EvaluateSample(TrainerCallback):
    """Measures the loss on the sample of training rows after each evaluation of the held-out losses."""

    def __init__(self, trainer: Any, sample: dict[str, Any]):
        self.trainer, self.sample = trainer, sample

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        if "eval_loss" in (metrics or {}):  # false for the evaluation that this starts
            self.trainer.evaluate(self.sample, metric_key_prefix=_SAMPLE)


def _curve(log: list[dict[str, Any]], mixture: "Mixture", step_tokens: int) -> list[LossPoint]:
    """The losses of the log. Arms may train with other weights, but their means have those of the mixture."""
    measured: dict[int, dict[str, Any]] = {}
    for entry in log:
        if "eval_loss" in entry or f"{_SAMPLE}_loss" in entry:
            measured[entry["step"]] = measured.get(entry["step"], {}) | entry
    train, ood, weights = mixture.config.train_sources, mixture.config.ood_sources, mixture.weights
    return [
        LossPoint(
            step=step,
            tokens=step * step_tokens,
            train=losses_of(metrics, train, _SAMPLE),
            validation=losses_of(metrics, train),
            ood=losses_of(metrics, ood),
            train_loss=mean_losses(metrics, [*train], weights, _SAMPLE).get(f"{_SAMPLE}_loss", math.nan),
            validation_loss=mean_losses(metrics, [*train], weights).get("eval_loss", math.nan),
            ood_loss=metrics.get("eval_ood_loss"),
        )
        for step, metrics in sorted(measured.items())
    ]


def _logged_cosines(log: list[dict[str, Any]], names: list[str]) -> list[tuple[int, Pairs]]:
    found = []
    for entry in log:
        keys = {(a, b): f"cosine/{a}/{b}" for a, b in itertools.combinations(names, 2)}
        if pairs := {pair: entry[key] for pair, key in keys.items() if key in entry}:
            found.append((entry["step"], _pairs(pairs)))
    return found


def _pairs(values: dict[tuple[str, str], float]) -> Pairs:
    return [(a, b, float(value)) for (a, b), value in values.items()]
