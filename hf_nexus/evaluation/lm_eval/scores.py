"""Scores in the raw results of lm-eval."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from .tasks import Task

__all__ = ["BenchmarkScore", "read_scores"]

# Fractions, which leaderboards and cards show in percent: their names have one of these parts, such as
# `prompt_level_strict_acc`. Other metrics keep their unit.
_FRACTION = re.compile(r"(.*_)?(acc|accuracy|em|exact_match|f1|math_verify|pass(@|_at_)\d+)(_.*)?")
_IN_PERCENT = ("squadv2", "scrolls_")  # starts of the names of tasks that report all but accuracies in percent already


@dataclass(frozen=True)
class BenchmarkScore:
    """
    One score on one task.

    Raises:
        ValueError: the value is not finite, or `dataset` is not a Hub id.
    """

    name: str  # of the task on the card, such as "GSM8K"
    dataset: str  # Hub id of the data, such as "openai/gsm8k"; local data is named like the task
    metric: str  # such as "exact_match"
    value: float  # in the unit of the leaderboard, for most tasks percent (41.2, not 0.412)
    stderr: float | None = None  # over the examples, in the same unit
    # Task in the `eval.yaml` of the dataset ("gsm8k"), if the Hub has registered the dataset as a benchmark. Only
    # these scores are written to `.eval_results`, and only those on all examples have one.
    task_id: str | None = None
    revision: str | None = None  # commit of the dataset
    date: str | None = None  # ISO date of the evaluation
    notes: str | None = None  # setting of the evaluation, such as "8-shot"
    arm_value: float | None = None  # score of the other arm, see [`RunSummary.against`]
    task: str | None = None  # name in lm-eval of the task that was run
    limit: int | None = None  # maximum number of examples, per subtask
    filter: str | None = None  # of lm-eval, which reads the answers that the metric compares

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"The score of {self.name} is {self.value}, but must be finite. Leave it out.")
        try:
            validate_repo_id(self.dataset)
        except HFValidationError as error:
            raise ValueError(f"dataset={self.dataset!r} of {self.name} is not a Hub id. Use 'user/name'.") from error

    @property
    def setting(self) -> tuple[str, str, str | None]:
        """What two scores share that can be compared."""
        return self.name, self.metric, self.notes


def read_scores(task: Task, results: Mapping[str, Any]) -> list[BenchmarkScore]:
    """
    Read the scores of a task in the results of `lm_eval.simple_evaluate`: the headline metric of a benchmark of the
    suite, or all metrics of another task, or of each task of a tag or of a group without metrics.

    Raises:
        ValueError: the headline metric is missing, or no metric is finite.
    """
    all_rows = {**results["results"], **results.get("groups", {})}
    found = {name: [key for key, x in row.items() if _is_score(key) and _finite(x)] for name, row in all_rows.items()}
    rows = {task.name: all_rows[task.name]} if found.get(task.name) else all_rows
    scores = []
    for name, row in rows.items():
        keys = found[name]
        if task.benchmark is not None:
            if task.benchmark.metric not in keys:
                raise ValueError(f"lm-eval reports no {task.benchmark.metric!r} for {task.name}, only {keys}.")
            keys = [task.benchmark.metric]
        scores += [_score(task, name, key, row, results) for key in keys]
    if not scores:
        raise ValueError(f"lm-eval reports no finite score for {task.name}: {rows}")
    return scores


def _score(task: Task, name: str, key: str, row: Mapping[str, Any], results: Mapping[str, Any]) -> BenchmarkScore:
    metric, _, kind = key.partition(",")
    in_percent = float(row[key]) > 1 or (name.startswith(_IN_PERCENT) and not metric.startswith("acc"))
    unit = 100 if _FRACTION.fullmatch(metric) and not in_percent else 1
    stderr = row.get(f"{metric}_stderr,{kind}")
    leaves = [leaf for leaf in _leaves(name, results) if leaf in results["configs"]] or list(results["configs"])
    shots = sorted({results["n-shot"][leaf] for leaf in leaves if leaf in results["n-shot"]})
    notes = [f"{'/'.join(map(str, shots))}-shot"] if shots else []
    notes += [kind] * (kind != "none") + [f"lm-eval {results['lm_eval_version']}"]
    if task.limit is not None:
        notes.append(f"first {task.limit} examples" + " per subtask" * (len(leaves) > 1))
    if "answer_tokens" in results:
        notes.append(f"answers cut at {results['answer_tokens']} tokens by the model's context")
    if task.path is not None:
        notes.append("local task file")
    benchmark, configs = task.benchmark, [results["configs"][leaf] for leaf in leaves]
    return BenchmarkScore(
        task=task.name,
        name=name if benchmark is None else benchmark.name,
        metric=metric,
        value=unit * float(row[key]),
        stderr=unit * float(stderr) if stderr is not None and _finite(stderr) else None,
        dataset=_dataset(task, configs) if benchmark is None else benchmark.dataset,
        task_id=benchmark.task_id if benchmark is not None and task.limit is None else None,
        date=date.fromtimestamp(results["date"]).isoformat(),
        notes=", ".join(notes),
        limit=task.limit,
        filter=None if kind == "none" else kind,
    )


def _leaves(name: str, results: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, of the groups in it as well; of a task, itself."""
    members = results.get("group_subtasks", {}).get(name, ())
    return [leaf for member in members for leaf in _leaves(member, results)] or [name]


def _dataset(task: Task, configs: Sequence[Mapping[str, Any]]) -> str:
    """
    Hub id of the data in the definitions of tasks. `json`, `csv`, local folders and several datasets are named like
    the task.
    """
    datasets = {str(path) for config in configs if (path := config.get("dataset_path"))}
    dataset = datasets.pop() if len(datasets) == 1 else ""
    local = task.path is not None and (task.path.parent / dataset).exists()
    if not local and "/" in dataset:
        with suppress(HFValidationError):
            validate_repo_id(dataset)
            return dataset
    return re.sub(r"[^A-Za-z0-9]+", "_", task.name)[:96].strip("_") or "local"


def _is_score(key: str) -> bool:
    return "," in key and "_stderr," not in key


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
