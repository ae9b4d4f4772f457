"""Runs benchmarks, each one in a process of its own that may crash, hang or eat memory without harm to this one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .benchmarks import Task
from .scores import Score, read_scores

__all__ = ["LOG_FOLDER", "RAW_FOLDER", "Outcome", "run_tasks"]

RAW_FOLDER = "benchmarks"
# A publisher leaves out what starts with `_`: logs hold paths of this machine.
LOG_FOLDER = "_benchmark_logs"

_CHILD = Path(__file__).with_name("process.py")
# Of a distributed launcher: the child would take itself for a rank and wait for the others for ever.
_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|ROLE_NAME|(ACCELERATE|FSDP|TORCHELASTIC)_.*"
)


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Args:
        task ([`Task`]): The task.
        scores (`tuple[Score, ...]`): Empty if it failed.
        seconds (`float`): Time it took, starting lm-eval and loading the model included.
        log (`Path`): Everything that was printed.
        error (`str`, *optional*): What went wrong, in one line that names the log.
    """

    task: Task
    scores: tuple[Score, ...]
    seconds: float
    log: Path
    error: str | None = None


def run_tasks(
    model_args: dict[str, Any],
    tasks: Sequence[Task],
    folder: str | os.PathLike[str],
    *,
    batch_size: int | str = 8,
    device: str | None = None,
    timeout: float = 4 * 3600,
    allow_code_execution: bool = False,
) -> Iterator[Outcome]:
    """
    Run tasks one after another, each one in a process of its own.

    A crash, a hang or a lack of memory costs that task alone. The price is that lm-eval is started and the model
    loaded once for each task: half a minute each, more for a large model.

    Args:
        model_args (`dict[str, Any]`):
            From [`model_arguments`].
        tasks (`Sequence[Task]`):
            From [`select_tasks`].
        folder (`str` or `os.PathLike`):
            Where to keep raw results (`benchmarks/`) and logs (`_benchmark_logs/`).
        batch_size (`int` or `str`, *optional*, defaults to 8):
            Of the model's calls; lm-eval's `"auto"` tries what fits.
        device (`str`, *optional*):
            `"cuda:1"`, `"cpu"`, ...; the first accelerator by default, or the CPU.
        timeout (`float`, *optional*, defaults to 14400):
            Seconds after which a task is ended, with every process that it started.
        allow_code_execution (`bool`, *optional*, defaults to `False`):
            Whether code that the model writes may be executed.

    Yields:
        [`Outcome`]: of each task, once it has ended.

    Raises:
        ValueError: `timeout` is not positive.
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout} must be a positive number of seconds.")
    raw, logs = Path(folder, RAW_FOLDER).resolve(), Path(folder, LOG_FOLDER).resolve()
    raw.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        log, new = logs / f"{task.file_stem}.log", raw / f"{task.file_stem}.json.new"
        new.unlink(missing_ok=True)
        settings = {
            "task": task.name if task.path is None else str(task.path),
            "folder": None if task.path is None else str(task.path.parent),
            "defaults": task.needs_defaults,
            "model_args": model_args,
            "limit": task.limit,
            "num_fewshot": None if task.benchmark is None else task.benchmark.shots,
            "batch_size": batch_size,
            "device": device,
            "allow_code_execution": allow_code_execution,
            "results": str(new),
        }
        started = time.monotonic()
        error = _run(settings, log, timeout)
        scores: list[Score] = []
        try:
            if error is None:
                scores = read_scores(task, json.loads(new.read_text(encoding="utf-8")))
                new.replace(new.with_suffix(""))
        except (OSError, ValueError, KeyError) as problem:  # a JSONDecodeError is a ValueError
            error = f"left no results that can be read ({problem!r})"
        new.unlink(missing_ok=True)
        message = None if error is None else f"{task.name} {error}. Its output: {log}"
        yield Outcome(task, tuple(scores), time.monotonic() - started, log, message)


def _run(settings: dict[str, Any], log: Path, timeout: float) -> str | None:
    """Run the child to its end, or to that of its time. What went wrong, if anything."""
    allowed = settings["allow_code_execution"]
    environment = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
    environment.pop("HF_ALLOW_CODE_EVAL", None)  # leave is given here, or not at all
    environment |= {"HF_ALLOW_CODE_EVAL": "1"} if allowed else {}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            # Without -P this folder would come first on the path, and its modules hide those of the standard library.
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a group of its own, so that everything it starts can be ended with it
        )
        try:
            process.communicate(json.dumps(settings).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"took more than {timeout:g} s and was ended: raise --timeout, or set --limit"
        finally:  # Ctrl-C too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = process.returncode
    if status == 0:
        return None
    if status < 0:
        return f"was killed by signal {-status}" + " (out of memory?)" * (status == -signal.SIGKILL)
    return f"failed with exit status {status}: {_reason(log)}"


def _reason(log: Path) -> str:
    """Why a child failed: the first line of its last exception, but for what lm-eval says of its own switches."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "confirm_run_unsafe_code" in text or "HF_ALLOW_CODE_EVAL" in text:
        return "it executes code that the model writes, which needs --allow-code-execution"
    lines = [line.strip() for line in text.split("\n") if line.strip()] or ["it printed nothing"]
    exceptions = re.findall(r"^[\w.]+(?:Error|Exception): .+", text, flags=re.MULTILINE)
    return [*lines, *exceptions][-1][:400].rstrip(".")
