"""The command `hf-nexus benchmark`."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import require_folder

if TYPE_CHECKING:
    from ..evaluation.lm_eval.runner import TaskResult

__all__ = ["benchmark"]


def benchmark(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model or a LoRA adapter.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: paper, quick, tasks of lm-eval (gsm8k, ...), task files, or folders of them."
        ),
    ] = "paper",
    output: Annotated[
        str | None,
        typer.Option(help="Folder for the results. By default that of the model, or for a Hub id a new one."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of examples per task or subtask. The score never replaces one on all examples.",
        ),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto for the largest that fits.")] = "8",
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda:1, cpu, ... By default the first accelerator.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a task is killed.")] = 4 * 3600,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let HumanEval and MBPP execute code that the model writes.")
    ] = False,
) -> None:
    """
    Score a model with lm-eval: hf-nexus benchmark runs/nexus-demo --tasks quick

    Scores are saved after each task, and shown on the card of a run. The exit status is 1 if a task failed.
    """
    from ..evaluation.lm_eval.model_arguments import model_arguments
    from ..evaluation.lm_eval.runner import require_lm_eval, run_tasks
    from ..evaluation.lm_eval.tasks import select_tasks

    selected, left_out = select_tasks([name.strip() for name in tasks.split(",")], limit, allow_code_execution)
    require_lm_eval()
    arguments = model_arguments(model, revision, dtype)
    folder = _output_folder(model, revision, output)
    if left_out:
        print(f"Left out because they execute code: {', '.join(left_out)} (see --allow-code-execution)")
    print(f"Running {', '.join(task.name for task in selected)}. Results and logs: {folder}")
    results = run_tasks(
        arguments,
        selected,
        folder,
        batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
        device=device,
        timeout=timeout,
        allow_code_execution=allow_code_execution,
    )
    raise SystemExit(_record(results, len(selected), folder) > 0)


def _record(results: Iterable["TaskResult"], selected: int, folder: Path) -> int:
    """Save and print each result when its task ends. Returns the number of tasks that failed."""
    from ..hub.benchmarks import SCORES_NAME, record_scores
    from ..hub.results import RESULTS_NAME

    failed, problem = 0, None
    for result in results:
        failed += result.error is not None
        print(_describe(result))
        try:
            record_scores(folder, result.scores)
        except ValueError as error:  # a README that cannot be changed must not stop the other tasks
            problem = error
    written = [file for file in (SCORES_NAME, RESULTS_NAME, "README.md") if (folder / file).exists()]
    print(f"{selected - failed} of {selected} tasks done. In {folder}: {', '.join(written) or 'no scores'}")
    if problem is not None:
        raise problem
    return failed


def _output_folder(model: str, revision: str | None, output: str | None) -> Path:
    """The folder of the model, or another one that holds scores of this model only."""
    from ..hub.benchmarks import claim_scores

    own_folder = Path(model).is_dir() and (output is None or Path(output).resolve() == Path(model).resolve())
    name = model if revision is None else f"{model}@{revision}"
    folder = Path(model if own_folder else output or re.sub(r"[^\w.@-]+", "--", name))
    require_folder(folder, "output")
    claim_scores(folder, None if own_folder else name)
    return folder


def _describe(result: "TaskResult") -> str:
    if result.error:
        return f"FAILED: {result.error}"
    return "\n".join(
        f"{score.name}   {score.metric} {score.value:.2f}"
        + ("" if score.stderr is None else f" ± {score.stderr:.2f}")
        + f"   ({score.notes}; {result.seconds:.0f} s)"
        for score in result.scores
    )
