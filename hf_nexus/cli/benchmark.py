"""`hf-nexus benchmark`: runs tasks, and puts their scores where the card and the Hub read them."""

import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..evaluation.lm_eval.benchmarks import select_tasks
from ..evaluation.lm_eval.models import model_arguments
from ..evaluation.lm_eval.runs import Outcome, run_tasks
from ..evaluation.lm_eval.scores import Score
from ..files import write_atomic
from ..hub.card import save_card
from ..hub.results import RESULTS_NAME, BenchmarkScore, save_results
from ..hub.run_summary import SUMMARY_NAME, RunSummary

__all__ = ["SCORES_NAME", "benchmark", "load_scores", "record_scores"]

SCORES_NAME = "benchmark_results.json"


def benchmark(
    model: str,
    tasks: Sequence[str] = ("paper",),
    *,
    output: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    limit: int | None = None,
    allow_code_execution: bool = False,
    say: Callable[[str], None] = print,
    **running: Any,
) -> list[Outcome]:
    """
    Benchmark a model. Scores are saved as each task ends, so that whatever comes later cannot take them away.

    Args:
        model (`str`):
            A folder or a Hub id, of a whole model or of a LoRA adapter.
        tasks (`Sequence[str]`, *optional*, defaults to `("paper",)`):
            What [`select_tasks`] takes: sets (`"paper"`, `"quick"`), tasks, task files, folders of them.
        output (`str`, *optional*):
            Where to write to: by default the model's own folder, or for one of the Hub a folder in the current one
            that is named after it.
        revision (`str`, *optional*):
            Branch, tag or commit of a model of the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the weights; that of the checkpoint by default.
        limit (`int`, *optional*):
            Only so many examples of each task or part of one; such a score is marked and never takes the place of one
            on all examples.
        allow_code_execution (`bool`, *optional*, defaults to `False`):
            Whether code that the model writes may be executed (HumanEval, MBPP).
        say (`Callable[[str], None]`, *optional*, defaults to `print`):
            Gets a line for each thing that happens.
        running:
            `batch_size`, `device` and `timeout` of [`run_tasks`].

    Returns:
        `list[Outcome]`: of each task; those that failed have an `error`.

    Raises:
        ImportError: lm-eval is missing, or peft for an adapter.
        ValueError: no such model or task, a task that executes code without leave, or an `output` that holds the
            scores of another model.

    Example:
        >>> from hf_nexus.cli.benchmark import benchmark
        >>> benchmark("runs/demo", ["quick"])  # doctest: +SKIP
    """
    selected, left_out = select_tasks(tasks, limit, allow_code_execution)
    _require_lm_eval()
    arguments = model_arguments(model, revision, dtype)
    own = Path(model).is_dir() and (output is None or Path(output).resolve() == Path(model).resolve())
    name = model if revision is None else f"{model}@{revision}"
    folder = Path(model if own else output or re.sub(r"[^\w.@-]+", "--", name))
    _claim(folder, None if own else name)
    if left_out:
        say(f"Left out, as they execute code that the model writes: {', '.join(left_out)} (--allow-code-execution)")
    say(f"To run: {', '.join(task.name for task in selected)}. Logs and results: {folder}")
    outcomes, problem = [], None
    for outcome in run_tasks(arguments, selected, folder, allow_code_execution=allow_code_execution, **running):
        outcomes.append(outcome)
        say(f"FAILED: {outcome.error}" if outcome.error else _lines(outcome))
        try:
            record_scores(folder, outcome.scores)
        except ValueError as error:  # a README that must not be touched is no reason to skip the tasks that follow
            problem = error
    done = sum(outcome.error is None for outcome in outcomes)
    written = [file for file in (SCORES_NAME, RESULTS_NAME, "README.md") if (folder / file).exists()]
    say(f"{done} of {len(outcomes)} tasks done. {folder} holds {', '.join(written) or 'no score'}")
    if problem is not None:
        raise problem
    return outcomes


def record_scores(folder: str | os.PathLike[str], scores: Sequence[Score]) -> None:
    """
    Merge scores into `benchmark_results.json`, and render anew what shows them: `.eval_results`, and in the folder of
    a run the card and `run_summary.json`.

    Of each task the newest scores stay, except that those on all examples stay beside newer ones on some.

    Args:
        folder (`str` or `os.PathLike`):
            Of the model.
        scores (`Sequence[Score]`):
            New ones.

    Raises:
        ValueError: the existing README is damaged, or the run of the folder is only planned.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.cli.benchmark import load_scores, record_scores
        >>> from hf_nexus.evaluation.lm_eval.scores import Score
        >>> folder = mkdtemp()
        >>> record_scores(folder, [Score("sums", "sums", "acc", 50.0, 5.0, None, None, "2026-01-31", "0-shot")])
        >>> load_scores(folder)[0].value
        50.0
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
        benchmarks = _with_others(benchmarks, summary.benchmarks)
        summary = replace(summary, benchmarks=benchmarks)
        save_card(summary, folder)
        summary.save(folder)
    save_results(benchmarks, folder)


def load_scores(folder: str | os.PathLike[str]) -> list[BenchmarkScore]:
    """
    The scores in a folder's `benchmark_results.json`, as a card takes them; none without that file.

    Args:
        folder (`str` or `os.PathLike`):
            Of the model.

    Raises:
        ValueError: the file is not what [`record_scores`] writes.
    """
    names = {field.name for field in fields(BenchmarkScore)}
    scores = []
    for row in _read(Path(folder))["scores"]:
        # A card names data that lies in local files like the task, as it does with losses.
        dataset = row["dataset"] or re.sub(r"\W+", "_", row["task"]).strip("_")[:96]
        scores.append(BenchmarkScore(**{k: v for k, v in row.items() if k in names} | {"dataset": dataset}))
    return scores


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("Benchmarks need lm-eval: pip install 'hf-nexus[eval]'")


def _with_others(ours: list[BenchmarkScore], old: Sequence[BenchmarkScore]) -> list[BenchmarkScore]:
    """Our scores, with what the old ones knew of the other arm, and the old ones that come from elsewhere."""
    arms = {(score.name, score.metric, score.notes): score.arm_value for score in old}
    names = {score.name for score in ours}
    ours = [replace(score, arm_value=arms.get((score.name, score.metric, score.notes))) for score in ours]
    return [score for score in old if score.name not in names] + ours


def _lines(outcome: Outcome) -> str:
    return "\n".join(
        f"{score.name}   {score.metric} {score.value:.2f}"
        + ("" if score.stderr is None else f" ± {score.stderr:.2f}")
        + f"   ({score.notes}; {outcome.seconds:.0f} s)"
        for score in outcome.scores
    )


def _claim(folder: Path, model: str | None) -> None:
    """Note whose scores a folder holds that is not the model's own, so that two models' are never mixed."""
    saved = _read(folder)
    if saved["scores"] and saved["model"] != model:
        raise ValueError(
            f"{folder} holds the scores of {saved['model'] or 'the model in it'}: choose another --output."
        )
    if model is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, saved | {"model": model})


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SCORES_NAME
    if not path.exists():
        return {"model": None, "scores": []}
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(saved, dict) or not isinstance(saved.get("scores"), list) or "model" not in saved:
        raise ValueError(f"{path} is no file of ours, which have `model` and `scores`: move it away.")
    return saved


def _write(folder: Path, saved: dict[str, Any]) -> None:
    write_atomic(folder / SCORES_NAME, json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
