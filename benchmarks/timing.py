"""
Times of outer steps of several training runs that take turns.

Each arm is a real `train()` of a separate model. All arms run in this process, each in a thread that advances by one
outer step while the others wait.
"""

import random
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from arms import CUDA, Case
from transformers import Trainer, TrainerCallback

__all__ = ["Seconds", "measure_time"]

MAX_ROUNDS = 60
Seconds = tuple[float, float]  # wall time, CPU time


class StepByStep(TrainerCallback):
    """A training run in a thread, which advances by one outer step per call of `step`."""

    def __init__(self, trainer: Trainer, threads: int):
        self.trainer, self.threads = trainer, threads
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.resumed = self.seconds = (0.0, 0.0)
        self.error: BaseException | None = None
        self.stopping = False
        trainer.add_callback(self)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        self._await_pause()

    def _train(self) -> None:
        torch.set_num_threads(self.threads)  # applies to the calling thread
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error  # raised in the main thread
        self.paused.release()

    def _pause(self) -> None:
        self.paused.release()
        self.go.acquire()
        self.resumed = read_clocks()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pause()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = read_clocks()
        self.seconds = (now[0] - self.resumed[0], now[1] - self.resumed[1])
        self._pause()
        control.should_training_stop = self.stopping

    def _await_pause(self) -> None:
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def step(self) -> Seconds:
        """Run the next outer step and return its time."""
        self.go.release()
        self._await_pause()
        return self.seconds

    def stop(self) -> None:
        self.stopping = True
        self.go.release()
        self.thread.join()


def read_clocks() -> Seconds:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def measure_time(
    case: Case, arms: list[str], repeats: int | None, limit: float, threads: int
) -> list[dict[str, Seconds]]:
    """
    Time rounds of one outer step of each arm in random order.

    Args:
        repeats (`int`, *optional*):
            Number of rounds. Defaults to as many as fit into `limit` seconds, at least 5.

    Returns:
        `list[dict[str, Seconds]]`: `{arm: time of one outer step}` for each round.
    """
    max_rounds = repeats or MAX_ROUNDS
    steps = max_rounds + 3  # one to warm up, and the loader reads ahead
    sources = case.sources(steps)
    runs = {arm: StepByStep(case.trainer(arm, sources, steps), threads) for arm in arms}
    first = [next(iter(run.trainer.get_train_dataloader()))["input_ids"] for run in runs.values()]
    assert all(torch.equal(first[0], ids) for ids in first), "the arms read different micro-batches"
    for run in runs.values():
        run.step()  # allocates the optimizer state and the snapshot
    rounds: list[dict[str, Seconds]] = []
    order = random.Random(0)  # the same on all ranks
    started = time.perf_counter()
    while _agreed(
        len(rounds) < max_rounds and bool(repeats or len(rounds) < 5 or time.perf_counter() - started < limit)
    ):
        rounds.append({arm: runs[arm].step() for arm in order.sample(arms, len(arms))})
    for run in runs.values():
        run.stop()
    return rounds


def _agreed(decision: bool) -> bool:
    """The decision of the first rank."""
    decisions = [decision]
    if dist.is_initialized():
        dist.broadcast_object_list(decisions)
    return decisions[0]
