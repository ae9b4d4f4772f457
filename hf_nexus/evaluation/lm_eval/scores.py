"""What the raw results of lm-eval say, as plain rows."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from .benchmarks import Task

__all__ = ["Score", "read_scores"]

# Shares of 1, which leaderboards and cards show in percent; other metrics stay as they are.
_SHARES = {"acc", "acc_norm", "exact_match", "f1", "math_verify", "pass@1", "pass_at_1"}


@dataclass(frozen=True)
class Score:
    """One score, as plain data.

    Args:
        task (`str`): lm-eval's name of the task that was asked for.
        name, metric (`str`): What the card calls the task, and what was measured.
        value (`float`): In percent if it is a share.
        stderr (`float`, *optional*): Standard error over the examples, in the same unit.
        dataset (`str`, *optional*): Hub id of the data; `None` for local files.
        task_id (`str`, *optional*): Of a registered benchmark, for scores on all of its examples only.
        date (`str`): ISO date of the evaluation.
        notes (`str`): How it was asked.
        limit (`int`, *optional*): Only so many examples, of each part.
    """

    task: str
    name: str
    metric: str
    value: float
    stderr: float | None
    dataset: str | None
    task_id: str | None
    date: str
    notes: str
    limit: int | None = None


def read_scores(task: Task, results: Mapping[str, Any]) -> list[Score]:
    """
    The scores in what lm-eval returns.

    Args:
        task ([`Task`]):
            What was run.
        results (`Mapping[str, Any]`):
            Of `lm_eval.simple_evaluate`.

    Returns:
        `list[Score]`: the headline figure of a benchmark of the suite; every metric of another task, or of each task
        under a tag.

    Raises:
        ValueError: the headline figure is not there, or no figure is finite.
    """
    all_rows = {**results["results"], **results.get("groups", {})}
    rows = {task.name: all_rows[task.name]} if task.name in all_rows else all_rows
    scores = []
    for name, row in rows.items():
        keys = [key for key, value in row.items() if "," in key and "_stderr," not in key and _finite(value)]
        if task.benchmark is not None:
            if task.benchmark.metric not in keys:
                raise ValueError(f"lm-eval gives no {task.benchmark.metric!r} for {task.name}, but {keys}.")
            keys = [task.benchmark.metric]
        scores += [_score(task, name, key, row, results) for key in keys]
    if not scores:
        raise ValueError(f"lm-eval gives no finite score for {task.name}: {rows}")
    return scores


def _score(task: Task, name: str, key: str, row: Mapping[str, Any], results: Mapping[str, Any]) -> Score:
    metric, _, kind = key.partition(",")
    unit = 100 if metric in _SHARES else 1
    stderr = row.get(f"{metric}_stderr,{kind}")
    configs = results["configs"]
    shots = sorted({results["n-shot"][part] for part in configs if part in results["n-shot"]})
    notes = [f"{'/'.join(map(str, shots))}-shot"] if shots else []
    notes += [kind] * (kind != "none") + [f"lm-eval {results['lm_eval_version']}"]
    if task.limit is not None:
        notes.append(f"first {task.limit} examples" + " of each part" * (len(configs) > 1))
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
    """The Hub id in a task's definition, if it is one; `json`, `csv` and local folders are not."""
    config: Mapping[str, Any] = configs.get(name) or next(iter(configs.values()), {})
    dataset = str(config.get("dataset_path"))
    local = task.path is not None and (task.path.parent / dataset).exists()
    return dataset if re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset) and not local else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
