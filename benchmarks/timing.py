"""
Times of the outer steps of several training runs, taken in turn.

Every arm is a real `train()` of its own copy of the model. All run in this process, each in a thread that is let go
for one outer step while the others wait. (Switching `args.nexus` within one run would be simpler, but off it still
counts tokens per source, which the stock Trainer does not.)
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
Seconds = tuple[float, float]  # by the clock, and of the CPU


class StepByStep(TrainerCallback):
    """A training run in a thread of its own, which advances by one outer step when told to."""

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
        torch.set_num_threads(self.threads)  # a setting of the calling thread
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
        """Time of one more outer step."""
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
    """Rounds of `{arm: time of one outer step}`: `repeats`, or as many as fit into `limit` seconds, at least 5."""
    most = repeats or MAX_ROUNDS
    steps = most + 3  # one to warm up, and the loader reads ahead
    sources = case.sources(steps)
    runs = {arm: StepByStep(case.trainer(arm, sources, steps), threads) for arm in arms}
    first = [next(iter(run.trainer.get_train_dataloader()))["input_ids"] for run in runs.values()]
    assert all(torch.equal(first[0], ids) for ids in first), "the arms read different micro-batches"
    for run in runs.values():
        run.step()  # allocates the optimizer's state and the snapshot
    rounds: list[dict[str, Seconds]] = []
    order = random.Random(0)  # the same on all ranks
    started = time.perf_counter()
    while _agreed(len(rounds) < most and bool(repeats or len(rounds) < 5 or time.perf_counter() - started < limit)):
        rounds.append({arm: runs[arm].step() for arm in order.sample(arms, len(arms))})
    for run in runs.values():
        run.stop()
    return rounds


def _agreed(decision: bool) -> bool:
    """What the first rank decides."""
    decisions = [decision]
    if dist.is_initialized():
        dist.broadcast_object_list(decisions)
    return decisions[0]
