"""Scores of a finished run on benchmarks of lm-eval."""

from collections import Counter
from dataclasses import replace

from ..evaluation.lm_eval.model_arguments import model_arguments
from ..evaluation.lm_eval.runner import require_lm_eval, run_tasks
from ..evaluation.lm_eval.tasks import Task, select_tasks
from ..hub.benchmarks import record_scores
from ..lock import locked
from ..pretrain.parsing import parse_arguments
from .config import ComparisonConfig
from .records import RunRecord
from .runs import SETTINGS_NAME, Run

__all__ = ["check_benchmarks", "comparable", "missing_tasks", "score_benchmarks"]


def check_benchmarks(config: ComparisonConfig) -> None:
    """
    Find errors before anything runs.

    Raises:
        ValueError: a task file that is missing, a task that executes code, or a question set with the name of a task.
        ImportError: lm-eval is not installed.
    """
    names = {task.name for task in select_tasks(config.benchmarks)[0]}
    if both := sorted(names & config.question_sets.keys()):
        raise ValueError(f"question_sets: {both} are names of benchmarks, too. Choose other names.")
    if config.benchmarks:
        require_lm_eval()


def missing_tasks(config: ComparisonConfig, record: RunRecord) -> list[Task]:
    """The tasks on which a run is not scored yet, on as many examples; none for a run that diverged."""
    selected, _ = select_tasks([] if record.diverged else config.benchmarks)
    return [task for task in selected if (task.name, task.limit) not in record.benchmarks.items()]


def comparable(config: ComparisonConfig, record: RunRecord) -> RunRecord:
    """The record without scores on another number of examples than the configuration says."""
    old = tuple(f"{task.name}/" for task in missing_tasks(config, record))
    kept = {name: score for name, score in record.downstream.items() if not name.startswith(old)}
    return replace(record, downstream=kept)


def score_benchmarks(run: Run) -> RunRecord:
    """
    Score a run on the tasks that are missing. The scores are saved with its record, and shown on its card.

    Raises:
        RuntimeError: a task failed. The scores of the others are saved.
        ValueError: another process trains or measures the run.
    """
    with locked(run.folder):
        record = RunRecord.load(run.folder)
        training = parse_arguments(["--config", str(run.folder / SETTINGS_NAME)]).training
        results = run_tasks(
            model_arguments(str(run.folder)),
            missing_tasks(run.config, record),
            run.folder,
            batch_size=training.per_device_eval_batch_size,
            device="cpu" if training.use_cpu else None,
        )
        errors = []
        for result in results:
            if result.error is not None:
                errors.append(result.error)
                continue
            times = Counter((score.name, score.metric) for score in result.scores)
            for score in result.scores:
                name = result.task.name if result.task.benchmark else score.name
                several = times[score.name, score.metric] > 1  # one for each filter
                record.downstream[f"{name}/{score.metric}" + f",{score.filter}" * several] = score.value
            record.benchmarks[result.task.name] = result.task.limit
            record.save(run.folder)
            record_scores(run.folder, result.scores)
        if errors:
            raise RuntimeError("; ".join(errors))
        return record
