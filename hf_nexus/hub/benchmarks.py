"""Benchmark scores of a model: its `benchmark_results.json`, the card and `.eval_results`."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

from ..files import read_plain, write_atomic
from .card import save_card
from .results import BenchmarkScore, save_results
from .run_summary import SUMMARY_NAME, RunSummary

__all__ = ["SCORES_NAME", "claim_scores", "record_scores", "set_aside"]

logger = logging.getLogger(__name__)

SCORES_NAME = "benchmark_results.json"
_MEASURED = (SCORES_NAME, "closeness.json")


def claim_scores(folder: Path, model: str | None) -> None:
    """
    Note whose scores a folder holds. `model` is `None` if the folder is the model's.

    Raises:
        ValueError: the folder holds scores of another model.
    """
    known, scores = _read(folder)
    if scores and known != model:
        raise ValueError(f"{folder} holds the scores of {known or 'its own model'}. Choose another --output.")
    if model is not None:
        _write(folder, model, scores)


def record_scores(folder: str | os.PathLike[str], scores: Sequence[BenchmarkScore]) -> None:
    """
    Merge scores into `benchmark_results.json` of a model's folder and update what shows them: `.eval_results`, and in
    the folder of a run the card and `run_summary.json`.

    New scores of a task replace old ones. Scores on a part of the examples never replace those on all.

    Raises:
        ValueError: the file or the README is damaged, or the run of the folder is only planned.
    """
    if not scores:
        return
    model, old = _read(Path(folder))
    whole, part = ({score.task for score in scores if (score.limit is None) == kind} for kind in (True, False))
    kept = [score for score in old if not (score.task in whole or (score.task in part and score.limit))]
    benchmarks = [*kept, *scores]
    _write(Path(folder), model, benchmarks)
    if Path(folder, SUMMARY_NAME).exists():
        summary = RunSummary.load(folder)
        summary = replace(summary, benchmarks=_merged(benchmarks, summary.benchmarks))
        save_card(summary, folder)
        summary.save(folder)
        benchmarks = summary.benchmarks
    save_results(benchmarks, folder)


def set_aside(folder: str | os.PathLike[str]) -> None:
    """
    Rename the files of measurements on the weights of a folder, because training will replace the weights. Files that
    start with `_` are not pushed, and later scores are not merged with theirs.
    """
    for path in (Path(folder, name) for name in _MEASURED):
        if path.exists():
            names = (path.with_stem(f"_{path.stem}-{number}") for number in count(1))
            kept = path.rename(next(name for name in names if not name.exists()))
            logger.warning(f"{path} was measured on earlier weights. It is kept as {kept.name}.")


def _merged(new: list[BenchmarkScore], old: Sequence[BenchmarkScore]) -> list[BenchmarkScore]:
    """The new scores with the compared arm's values of the old ones, after old scores of other benchmarks."""
    arms = {score.setting: score.arm_value for score in old}
    names = {score.name for score in new}
    new = [replace(score, arm_value=arms.get(score.setting)) for score in new]
    return [score for score in old if score.name not in names] + new


def _read(folder: Path) -> tuple[str | None, list[BenchmarkScore]]:
    """The model that has the scores of a folder, `None` if it is the folder's, and the scores."""
    path = folder / SCORES_NAME
    if not path.exists():
        return None, []
    text = read_plain(path)
    try:
        saved = json.loads(text)
        return saved["model"], [BenchmarkScore(**row) for row in saved["scores"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(f"{path} was not written by hf-nexus: {what}. Move it away.") from error


def _write(folder: Path, model: str | None, scores: Sequence[BenchmarkScore]) -> None:
    saved = {"model": model, "scores": [asdict(score) for score in scores]}
    write_atomic(folder / SCORES_NAME, json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
