"""Settings and fixtures of all tests: CPU, offline, one thread."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a few bounds depend on rounding, which depends on the threads

import pytest
import torch
from hypothesis import settings

from tests.support.garbage import freeze
from tests.support.tiny import Rows, tiny_llama

settings.register_profile("no deadline", deadline=None)  # the first call may take long
settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="module")
def _freeze_modules() -> None:
    freeze()


@pytest.fixture
def sources() -> dict[str, Rows]:
    """Three training sources of different sizes."""
    return {"text": Rows(40, 0), "code": Rows(32, 1), "math": Rows(24, 2)}


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """`make_trainer(train_dataset, model=..., trainer_kwargs=..., **config)` builds a quiet NexusTrainer on CPU."""

    def make(
        train_dataset: Any,
        model: torch.nn.Module | None = None,
        trainer_kwargs: dict[str, Any] | None = None,
        trainer_class: type | None = None,
        **config: Any,
    ) -> Any:
        from hf_nexus import NexusConfig, NexusTrainer

        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = NexusConfig(**{**defaults, **config})
        return (trainer_class or NexusTrainer)(
            model=model if model is not None else tiny_llama(),
            args=args,
            train_dataset=train_dataset,
            **(trainer_kwargs or {}),
        )

    return make


_HOLD = """
import os, shutil, sys, time
from hf_nexus.lock import locked
with locked(sys.argv[1]):
    if "fork" in sys.argv and os.fork() == 0:  # like the worker of a data loader
        time.sleep(60)
    if "copy" in sys.argv:  # like a callback that keeps copies of checkpoints
        shutil.copytree(sys.argv[1], sys.argv[1] + ".copy")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a process that holds a folder, in a new process group."""
    started = []

    def start(folder: Path, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-c", _HOLD, str(folder), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
