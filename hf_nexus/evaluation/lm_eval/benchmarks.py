"""The tasks that a model may be benchmarked on: the paper's suite, task files, whatever else lm-eval knows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["QUICK", "SUITE", "Benchmark", "Task", "select_tasks"]


@dataclass(frozen=True)
class Benchmark:
    """A task of the paper's suite.

    Args:
        task (`str`): lm-eval's name of it.
        name (`str`): The card's.
        dataset (`str`): Hub id of its data.
        metric (`str`): The headline figure among those that lm-eval reports, as `"metric,filter"`; a share of 1.
        shots (`int`, *optional*): Examples in the prompt, where the usual number is not the task's own.
        task_id (`str`, *optional*): The task under which the Hub has registered the dataset as a benchmark.
        runs_code (`bool`, *optional*, defaults to `False`): Whether what the model writes is executed.
    """

    task: str
    name: str
    dataset: str
    metric: str
    shots: int | None = None
    task_id: str | None = None
    runs_code: bool = False


SUITE = {
    "gsm8k": Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "exact_match,strict-match", task_id="gsm8k"),
    "math": Benchmark("minerva_math", "MATH", "EleutherAI/hendrycks_math", "math_verify,none"),
    "mmlu": Benchmark("mmlu", "MMLU", "cais/mmlu", "acc,none", shots=5),
    "bbh": Benchmark("bbh", "BBH", "SaylorTwift/bbh", "exact_match,get-answer"),
    "humaneval": Benchmark("humaneval", "HumanEval", "openai/openai_humaneval", "pass@1,create_test", runs_code=True),
    "mbpp": Benchmark("mbpp", "MBPP", "google-research-datasets/mbpp", "pass_at_1,none", runs_code=True),
    "gpqa": Benchmark("gpqa_main_zeroshot", "GPQA", "Idavidrein/gpqa", "acc,none"),
}
# Examples per task (per subject, where lm-eval has it in parts): 100 + 57 x 10 + 7 x 10.
QUICK = {"gsm8k": 100, "mmlu": 10, "math": 10}

_BY_TASK = {benchmark.task: benchmark for benchmark in SUITE.values()}


@dataclass(frozen=True)
class Task:
    """Something to run.

    Args:
        name (`str`): lm-eval's name of it.
        benchmark ([`Benchmark`], *optional*): Its entry in the suite.
        path (`Path`, *optional*): File that defines it; absolute.
        limit (`int`, *optional*): Only so many examples, of each part.
        needs_defaults (`bool`, *optional*, defaults to `True`): Whether lm-eval's own tasks must be known.
    """

    name: str
    benchmark: Benchmark | None = None
    path: Path | None = None
    limit: int | None = None
    needs_defaults: bool = True

    @property
    def file_stem(self) -> str:
        """Name for its files, different for the whole task and for a limited one."""
        stem = re.sub(r"[^\w.-]+", "-", self.name)
        return stem if self.limit is None else f"{stem}-first-{self.limit}"


def select_tasks(
    names: Sequence[str] = ("paper",), limit: int | None = None, allow_code_execution: bool = False
) -> tuple[list[Task], list[str]]:
    """
    What a list of names means.

    Args:
        names (`Sequence[str]`, *optional*, defaults to `("paper",)`):
            Each one a set (`"paper"`, `"quick"`), an entry of `SUITE`, a task file (`path/to/task.yaml`), a folder of
            them, or any other name that lm-eval knows.
        limit (`int`, *optional*):
            Only so many examples of each task or part of one; `QUICK`'s numbers in that set.
        allow_code_execution (`bool`, *optional*, defaults to `False`):
            Whether tasks may execute what the model writes.

    Returns:
        `tuple[list[Task], list[str]]`: the tasks, and the names of those that the sets had to leave out because they
        execute code.

    Raises:
        ValueError: a task that executes code is named without leave, a file defines no task, a name comes twice, or
            `limit` is not positive.

    Example:
        >>> from hf_nexus.evaluation.lm_eval.benchmarks import select_tasks
        >>> [task.name for task in select_tasks(["quick"])[0]]
        ['gsm8k', 'mmlu', 'minerva_math']
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 example: leave it out for all.")
    tasks, left_out = [], []
    for name in names:
        if name in ("paper", "quick"):
            for key in SUITE if name == "paper" else QUICK:
                if SUITE[key].runs_code and not allow_code_execution:
                    left_out.append(key)
                else:
                    own = QUICK[key] if name == "quick" else None
                    tasks.append(Task(SUITE[key].task, SUITE[key], limit=own if limit is None else limit))
        elif name.endswith((".yaml", ".yml")) or Path(name).is_dir():
            tasks += [_local_task(path, limit, allow_code_execution) for path in _task_files(Path(name))]
        else:
            benchmark = SUITE.get(name) or _BY_TASK.get(name)
            if benchmark is not None and benchmark.runs_code:
                _refuse_code(name, allow_code_execution)
            tasks.append(Task(name if benchmark is None else benchmark.task, benchmark, limit=limit))
    found = [task.name for task in tasks]
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"The tasks {repeated} are asked for twice in {list(names)}: name each one once.")
    return tasks, left_out


def _task_files(path: Path) -> list[Path]:
    """A file itself; of a folder those that define a task, which parts for inclusion need not."""
    if not path.exists():
        raise ValueError(f"There is no task file {path}: give a path to a .yaml file or a folder of them.")
    if path.is_file():
        return [path.resolve()]
    files = [file.resolve() for file in sorted(path.glob("*.y*ml")) if isinstance(_read(file).get("task"), str)]
    if not files:
        raise ValueError(f"No .yaml file in {path} defines a task: each needs a `task: name`.")
    return files


def _local_task(path: Path, limit: int | None, allow_code_execution: bool) -> Task:
    config = _read(path)
    group = isinstance(config.get("group"), str)
    name = config.get("group") if group else config.get("task")
    if not isinstance(name, str) or "," in name:
        raise ValueError(f"{path} defines no task: write `task: name` (or `group: name`) into it, got {name!r}.")
    if config.get("unsafe_code"):
        _refuse_code(name, allow_code_execution)
    return Task(name, None, path, limit, needs_defaults=group)


def _refuse_code(name: str, allow_code_execution: bool) -> None:
    if not allow_code_execution:
        raise ValueError(
            f"{name} executes code that the model writes: allow it with --allow-code-execution, inside a container "
            "or on a machine that holds nothing of value, or leave the task out."
        )


class _Loader(yaml.SafeLoader):
    """Reads task files, whose `!function module.name` is not looked up: that would run the module."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # derives from SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"The task file {path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"The task file {path} must hold `key: value` lines, got {type(config).__name__}.")
    return config
