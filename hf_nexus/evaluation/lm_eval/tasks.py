"""Tasks of lm-eval: the suite of the paper, task files, and any other task that lm-eval knows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["QUICK", "SUITE", "Benchmark", "Task", "select_tasks"]


@dataclass(frozen=True)
class Benchmark:
    """Entry of the suite of the paper."""

    task: str  # name in lm-eval
    name: str  # name on the card
    dataset: str  # Hub id
    metric: str  # headline metric, as "metric,filter" in lm-eval's results; between 0 and 1
    shots: int | None = None  # examples in the prompt, if the usual number is not the default of the task
    task_id: str | None = None  # if the Hub has registered the dataset as a benchmark
    runs_code: bool = False  # executes code that the model writes


SUITE = {
    "gsm8k": Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "exact_match,strict-match", task_id="gsm8k"),
    "math": Benchmark("minerva_math", "MATH", "EleutherAI/hendrycks_math", "math_verify,none"),
    "mmlu": Benchmark("mmlu", "MMLU", "cais/mmlu", "acc,none", shots=5),
    "bbh": Benchmark("bbh", "BBH", "SaylorTwift/bbh", "exact_match,get-answer"),
    "humaneval": Benchmark("humaneval", "HumanEval", "openai/openai_humaneval", "pass@1,create_test", runs_code=True),
    "mbpp": Benchmark("mbpp", "MBPP", "google-research-datasets/mbpp", "pass_at_1,none", runs_code=True),
    "gpqa": Benchmark("gpqa_main_zeroshot", "GPQA", "Idavidrein/gpqa", "acc,none"),
}
# Examples per task, or per subtask of a task: 100 + 57 x 10 + 7 x 10.
QUICK = {"gsm8k": 100, "mmlu": 10, "math": 10}

_BY_TASK = {benchmark.task: benchmark for benchmark in SUITE.values()}


@dataclass(frozen=True)
class Task:
    """Task to run."""

    name: str  # in lm-eval
    benchmark: Benchmark | None = None  # its entry in the suite
    path: Path | None = None  # absolute path of the file that defines it
    limit: int | None = None  # maximum number of examples, per subtask
    needs_defaults: bool = True  # whether lm-eval must list its own tasks

    @property
    def file_stem(self) -> str:
        """Stem of the names of its files. A limited task has another one than the whole task."""
        stem = re.sub(r"[^\w.-]+", "-", self.name)
        return stem if self.limit is None else f"{stem}-first-{self.limit}"


def select_tasks(
    names: Sequence[str] = ("paper",), limit: int | None = None, allow_code_execution: bool = False
) -> tuple[list[Task], list[str]]:
    """
    Resolve names to tasks. Returns the tasks, and the keys left out of the sets because they execute code.

    A name is that of a set (`"paper"`, `"quick"`), a key or task of `SUITE`, a task file (`path/to/task.yaml`), a
    folder of task files, or another task of lm-eval, and the first of these that there is. `limit` is the maximum
    number of examples, per subtask. `"quick"` has its own by default.

    Raises:
        ValueError: a task by name that executes code without permission, a file that defines no task, a repeated
            task, or an empty name.

    Example:
        >>> from hf_nexus.evaluation.lm_eval.tasks import select_tasks
        >>> [task.name for task in select_tasks(["quick"])[0]]
        ['gsm8k', 'mmlu', 'minerva_math']
    """
    if "" in names:
        raise ValueError(f"The tasks {list(names)} have an empty name. Remove it, or a comma too many.")
    tasks, left_out = [], []
    for name in names:
        benchmark = SUITE.get(name) or _BY_TASK.get(name)
        if name in ("paper", "quick"):
            for key in SUITE if name == "paper" else QUICK:
                if SUITE[key].runs_code and not allow_code_execution:
                    left_out.append(key)
                else:
                    default = QUICK[key] if name == "quick" else None
                    tasks.append(Task(SUITE[key].task, SUITE[key], limit=default if limit is None else limit))
        elif benchmark is None and (name.endswith((".yaml", ".yml")) or Path(name).is_dir()):
            tasks += [_local_task(path, limit, allow_code_execution) for path in _task_files(Path(name))]
        else:
            if benchmark is not None and benchmark.runs_code:
                _refuse_code(name, allow_code_execution)
            tasks.append(Task(name if benchmark is None else benchmark.task, benchmark, limit=limit))
    found = [task.name for task in tasks]
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"The tasks {repeated} are repeated in {list(names)}. Name each one once.")
    return tasks, left_out


def _task_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that define a task. Others there may be included by these."""
    if not path.exists():
        raise ValueError(f"There is no task file {path}. Pass the path of a .yaml file, or of a folder of them.")
    if path.is_file():
        return [path.resolve()]
    files = [file.resolve() for file in sorted(path.glob("*.y*ml")) if isinstance(_read(file).get("task"), str)]
    if not files:
        raise ValueError(f"No .yaml file in {path} defines a task. Each needs a line `task: name`.")
    return files


def _local_task(path: Path, limit: int | None, allow_code_execution: bool) -> Task:
    config = _read(path)
    group = isinstance(config.get("group"), str)
    name = config.get("group") if group else config.get("task")
    if not isinstance(name, str) or "," in name:
        raise ValueError(f"{path} defines no task, got {name!r}. Add a line `task: name` or `group: name`.")
    if config.get("unsafe_code"):
        _refuse_code(name, allow_code_execution)
    return Task(name, None, path, limit, needs_defaults=group)


def _refuse_code(name: str, allow_code_execution: bool) -> None:
    if not allow_code_execution:
        raise ValueError(
            f"{name} executes code that the model writes. Allow it with --allow-code-execution, best in a container, "
            "or leave the task out."
        )


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # yaml has no types
    """Reads task files, which are many. Does not resolve `!function module.name`, which would run the module."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"The task file {path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"The task file {path} must be a mapping, got {type(config).__name__}.")
    return config
