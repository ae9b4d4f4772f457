"""Memory that torch allocates for a training run, in bytes, on a CPU or a GPU."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler logs each start and stop otherwise

import torch
import torch.distributed as dist
from arms import CUDA, Case
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

__all__ = ["AfterLastStep", "allocated", "measure_memory"]


class AfterLastStep(TrainerCallback):
    """Call a function at the end of the last outer step, while its micro-batches are still in memory."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps:
            self.call()


def measure_memory(case: Case, arm: str) -> tuple[int, int | None]:
    """Bytes held after two outer steps, and the peak (None for several CPU processes)."""
    case = replace(case, k=min(case.k, 2))  # memory does not change after the second micro-batch
    sources = case.sources(3)

    def train_twice(call: Callable[[], None]) -> None:
        trainer = case.trainer(arm, sources, steps=2)
        trainer.add_callback(AfterLastStep(call))
        trainer.train()

    return _held_by_tensors(train_twice) if dist.is_torchelastic_launched() and not CUDA else allocated(train_twice)


def allocated(train: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Bytes that `train(at_the_end)` holds when it calls `at_the_end`, and the peak, in one process."""
    gc.collect()
    return _allocated_on_gpu(train) if CUDA else _allocated_on_cpu(train)


def _held_by_tensors(train: Callable[[Callable[[], None]], None]) -> tuple[int, None]:
    # gloo releases memory in its own threads, which the profiler does not see.
    gc.collect()
    held: list[int] = []

    def count() -> None:
        gc.collect()
        # `isinstance` would call `__class__` of proxy objects.
        tensors = [
            o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), DTensor)
        ]
        storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
        held.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))

    train(count)
    return held[0], None


def _allocated_on_cpu(train: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    profiler.start()
    train(profiler.stop)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return live, peak


def _allocated_on_gpu(train: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    train(lambda: None)  # allocates the workspaces of the libraries
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, held = torch.cuda.memory_allocated(), []
    train(lambda: held.append(torch.cuda.memory_allocated() - before))
    return held[0], torch.cuda.max_memory_allocated() - before
