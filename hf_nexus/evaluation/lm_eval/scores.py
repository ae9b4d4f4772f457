"""Scores in the raw results of lm-eval."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from .tasks import Task

__all__ = ["Score", "read_scores"]

# Fractions, which leaderboards and cards show in percent. Other metrics keep their unit.
_FRACTIONS = {"acc", "acc_norm", "exact_match", "f1", "math_verify", "pass@1", "pass_at_1"}


@dataclass(frozen=True)
class Score:
    """One score."""

    task: str  # name in lm-eval of the task that was run
    name: str  # name on the card
    metric: str
    value: float  # in percent if it is a fraction
    stderr: float | None  # over the examples, in the same unit
    dataset: str | None  # Hub id; None for local files
    task_id: str | None  # of a benchmark registered on the Hub, only for scores on all examples
    date: str  # ISO date of the evaluation
    notes: str  # shots, filter, version of lm-eval, limit
    limit: int | None = None  # maximum number of examples, per subtask


def read_scores(task: Task, results: Mapping[str, Any]) -> list[Score]:
    """
    Read the scores of a task in the results of `lm_eval.simple_evaluate`: the headline metric of a benchmark of the
    suite, or all metrics of another task, or of each task of a tag.

    Raises:
        ValueError: the headline metric is missing, or no metric is finite.
    """
    all_rows = {**results["results"], **results.get("groups", {})}
    rows = {task.name: all_rows[task.name]} if task.name in all_rows else all_rows
    scores = []
    for name, row in rows.items():
        keys = [key for key, value in row.items() if "," in key and "_stderr," not in key and _finite(value)]
        if task.benchmark is not None:
            if task.benchmark.metric not in keys:
                raise ValueError(f"lm-eval reports no {task.benchmark.metric!r} for {task.name}, only {keys}.")
            keys = [task.benchmark.metric]
        scores += [_score(task, name, key, row, results) for key in keys]
    if not scores:
        raise ValueError(f"lm-eval reports no finite score for {task.name}: {rows}")
    return scores


def _score(task: Task, name: str, key: str, row: Mapping[str, Any], results: Mapping[str, Any]) -> Score:
    metric, _, kind = key.partition(",")
    unit = 100 if metric in _FRACTIONS else 1
    stderr = row.get(f"{metric}_stderr,{kind}")
    configs = results["configs"]
    shots = sorted({results["n-shot"][subtask] for subtask in configs if subtask in results["n-shot"]})
    notes = [f"{'/'.join(map(str, shots))}-shot"] if shots else []
    notes += [kind] * (kind != "none") + [f"lm-eval {results['lm_eval_version']}"]
    if task.limit is not None:
        notes.append(f"first {task.limit} examples" + " per subtask" * (len(configs) > 1))
    if task.path is not None:
        notes.append("local task file")
    benchmark = task.benchmark
    return Score(
        task=task.name,
        name=name if benchmark is None else benchmark.name,
        metric=metric,
        value=unit * float(row[key]),
        stderr=unit * float(stderr) if stderr is not None and _finite(stderr) else None,
        dataset=_hub_dataset(task, configs, name) if benchmark is None else benchmark.dataset,
        task_id=benchmark.task_id if benchmark is not None and task.limit is None else None,
        date=date.fromtimestamp(results["date"]).isoformat(),
        notes=", ".join(notes),
        limit=task.limit,
    )


def _hub_dataset(task: Task, configs: Mapping[str, Any], name: str) -> str | None:
    """Hub id of the data in the definition of a task; `None` for `json`, `csv` and local folders."""
    config: Mapping[str, Any] = configs.get(name) or next(iter(configs.values()), {})
    dataset = str(config.get("dataset_path"))
    local = task.path is not None and (task.path.parent / dataset).exists()
    return dataset if re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset) and not local else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
