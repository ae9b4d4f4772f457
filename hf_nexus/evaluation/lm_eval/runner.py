"""Runs tasks of lm-eval, each in a child process: a crash, a hang or a lack of memory costs only that task."""

import importlib.util
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

from ...files import printable
from .scores import BenchmarkScore, read_scores
from .tasks import Task

__all__ = ["LOG_FOLDER", "RAW_FOLDER", "TaskResult", "require_lm_eval", "run_tasks"]

RAW_FOLDER = "benchmarks"
# Names with a leading `_` are not uploaded: logs contain local paths.
LOG_FOLDER = "_benchmark_logs"

_CHILD = Path(__file__).with_name("child.py")
# Variables of distributed launchers. With them, the child would wait for other ranks.
_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|ROLE_NAME|(ACCELERATE|FSDP|TORCHELASTIC)_.*"
)


@dataclass(frozen=True)
class TaskResult:
    """Result of a task."""

    task: Task
    scores: tuple[BenchmarkScore, ...]  # empty if it failed
    seconds: float  # including the start of lm-eval and the loading of the model
    log: Path  # file with all output
    error: str | None = None  # reason of a failure, in one line that names the log


def require_lm_eval() -> None:
    """Check that lm-eval is installed, without importing it, which takes seconds."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("Benchmarks need lm-eval: pip install 'lm-eval[math]'")


def run_tasks(
    model_args: dict[str, Any],
    tasks: Sequence[Task],
    folder: str | os.PathLike[str],
    *,
    batch_size: int | str = 8,
    device: str | None = None,
    timeout: float = 4 * 3600,
    allow_code_execution: bool = False,
) -> Iterator[TaskResult]:
    """
    Run tasks one after another, each in a child process, and yield the result of each as soon as it has ended.

    Raw results go to `benchmarks/` in `folder`, logs to `_benchmark_logs/`. Starting lm-eval and loading the model
    takes half a minute per task, more for a large model. After `timeout` seconds a task is killed, with all processes
    that it started.
    """
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
        scores: list[BenchmarkScore] = []
        try:
            if error is None:
                scores = read_scores(task, json.loads(new.read_text(encoding="utf-8")))
                new.replace(new.with_suffix(""))
        except (OSError, ValueError, KeyError) as problem:  # a JSONDecodeError is a ValueError
            error = f"left no results that can be read in {new} ({problem!r})"
        else:
            new.unlink(missing_ok=True)
        message = None if error is None else f"{task.name} {error}. See its output: {log}"
        yield TaskResult(task, tuple(scores), time.monotonic() - started, log, message)


def _run(settings: dict[str, Any], log: Path, timeout: float) -> str | None:
    """Run the child to its end or its timeout. Returns the reason of a failure."""
    environment = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
    environment.pop("HF_ALLOW_CODE_EVAL", None)  # permission comes only from `allow_code_execution`
    if settings["allow_code_execution"]:
        environment["HF_ALLOW_CODE_EVAL"] = "1"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            # Without -P, modules of this folder would hide those of the standard library.
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a process group that can be killed as a whole
        )
        try:
            process.communicate(json.dumps(settings).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"took more than {timeout:g} s and was killed: raise --timeout, or set --limit"
        finally:  # after Ctrl-C too
            if sys.platform == "win32":
                process.kill()
            else:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = process.returncode
    if status == 0:
        return None
    if status < 0:
        return f"was killed by signal {-status}" + " (out of memory?)" * (status == -9)
    return f"failed with exit status {status}: {_reason(log)}"


def _reason(log: Path) -> str:
    """First line of the last exception in a log, or the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "confirm_run_unsafe_code" in text or "HF_ALLOW_CODE_EVAL" in text:
        return "it executes code that the model writes, which needs --allow-code-execution"
    lines = [line.strip() for line in text.split("\n") if line.strip()] or ["it printed nothing"]
    exceptions = re.findall(r"^[\w.]+(?:Error|Exception): .+", text, flags=re.MULTILINE)
    return printable([*lines, *exceptions][-1])[:400].rstrip(".")
