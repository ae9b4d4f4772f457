"""Benchmark scores of a model: its `benchmark_results.json`, the card and `.eval_results`."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..evaluation.lm_eval.scores import Score
from ..files import read_plain, write_atomic
from .card import save_card
from .results import BenchmarkScore, save_results
from .run_summary import SUMMARY_NAME, RunSummary

__all__ = ["SCORES_NAME", "claim_scores", "load_scores", "record_scores"]

SCORES_NAME = "benchmark_results.json"


def claim_scores(folder: Path, model: str | None) -> None:
    """
    Note whose scores a folder holds. `model` is `None` if the folder is the model's.

    Raises:
        ValueError: the folder holds scores of another model.
    """
    saved = _read(folder)
    if saved["scores"] and saved["model"] != model:
        raise ValueError(f"{folder} holds the scores of {saved['model'] or 'its own model'}. Choose another --output.")
    if model is not None:
        _write(folder, saved | {"model": model})


def record_scores(folder: str | os.PathLike[str], scores: Sequence[Score]) -> None:
    """
    Merge scores into `benchmark_results.json` of a model's folder and update what shows them: `.eval_results`, and in
    the folder of a run the card and `run_summary.json`.

    New scores of a task replace old ones. Scores on a part of the examples never replace those on all.

    Raises:
        ValueError: the README is damaged, or the run of the folder is only planned.
    """
    if not scores:
        return
    saved = _read(Path(folder))
    whole, part = ({score.task for score in scores if (score.limit is None) == kind} for kind in (True, False))
    kept = [row for row in saved["scores"] if not (row["task"] in whole or (row["task"] in part and row["limit"]))]
    _write(Path(folder), saved | {"scores": [*kept, *map(asdict, scores)]})
    benchmarks = load_scores(folder)
    if Path(folder, SUMMARY_NAME).exists():
        summary = RunSummary.load(folder)
        summary = replace(summary, benchmarks=_merged(benchmarks, summary.benchmarks))
        save_card(summary, folder)
        summary.save(folder)
        benchmarks = summary.benchmarks
    save_results(benchmarks, folder)


def load_scores(folder: str | os.PathLike[str]) -> list[BenchmarkScore]:
    """
    Scores in `benchmark_results.json` of a model's folder, as a card takes them; empty without that file.

    Raises:
        ValueError: the file was not written by [`record_scores`].
    """
    names = {field.name for field in fields(BenchmarkScore)}
    scores = []
    for row in _read(Path(folder))["scores"]:
        # Local data has no Hub id: the card names it like the task.
        dataset = row["dataset"] or re.sub(r"\W+", "_", row["task"]).strip("_")[:96]
        scores.append(BenchmarkScore(**{k: v for k, v in row.items() if k in names} | {"dataset": dataset}))
    return scores


def _merged(new: list[BenchmarkScore], old: Sequence[BenchmarkScore]) -> list[BenchmarkScore]:
    """The new scores with the compared arm's values of the old ones, after old scores of other benchmarks."""
    arms = {score.setting: score.arm_value for score in old}
    names = {score.name for score in new}
    new = [replace(score, arm_value=arms.get(score.setting)) for score in new]
    return [score for score in old if score.name not in names] + new


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SCORES_NAME
    if not path.exists():
        return {"model": None, "scores": []}
    saved = json.loads(read_plain(path))
    if not isinstance(saved, dict) or not isinstance(saved.get("scores"), list) or "model" not in saved:
        raise ValueError(f"{path} was not written by hf-nexus: it has no `model` and `scores`. Move it away.")
    return saved


def _write(folder: Path, saved: dict[str, Any]) -> None:
    write_atomic(folder / SCORES_NAME, json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
