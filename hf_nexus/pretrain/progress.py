"""The progress of training: a live bar on a terminal, lines elsewhere, and what Ctrl-C does."""

import itertools
import math
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch.distributed.distributed_c10d import _get_default_store
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length

from ..terminal import is_live
from .console import say

__all__ = ["SaveOnSignal", "TrainingProgress"]

_REFRESH_SECONDS = 0.2
_RUNS = itertools.count()  # of this process: equal on all of them


class TrainingProgress(ProgressCallback):
    """
    Shows the step, the loss of each source, the path cosine, the speed and the remaining time, in place of the
    Trainer's bars and dictionaries, which are hard to read with many sources.

    On a terminal, a bar is updated in place, and held-out losses are lines above it. Elsewhere, each log entry is a
    line.
    """

    def __init__(self, console: Console, bar: bool = True):
        super().__init__()
        self.console = console
        self._state: Any = None
        self._parts: dict[str, str] = {}  # of the last log entry
        self._losses: dict[str, float] = {}  # the last known ones of each source
        self._evaluated = 0  # batches of the set that is evaluated now
        self._batches = 0
        self._pace = _Pace()
        self._drawn = time.monotonic()
        # Without the thread of automatic refreshes: workers of data loaders would inherit its locks.
        self._live = Live(get_renderable=self._view, console=console, auto_refresh=False, transient=True)
        self._on = bar and is_live(console) and not console.quiet

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar inside the context, also in an evaluation after training. It leaves no trace."""
        try:
            if self._on:
                self._live.start()
            yield
        finally:
            self._live.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the run."""
        self._state, self._pace = state, _Pace()
        self._draw()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self._pace.count("step", args, state)
        self._draw()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count a batch of an evaluation."""
        self._evaluated += 1
        self._batches = len(eval_dataloader) if has_length(eval_dataloader) else 0
        self._draw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar, for an evaluation after training."""

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Begin the next set of an evaluation."""
        self._evaluated = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an evaluation."""
        self._evaluated = 0
        self._pace.count("evaluation", args, state)
        self._draw()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a checkpoint."""
        self._pace.count("checkpoint", args, state)
        self._draw()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Print an evaluation, and without a bar a training log."""
        logs = logs or {}
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            text = f"{step}   held-out loss   {logs['eval_loss']:.3f}"
            if "eval_ood_loss" in logs:
                text = f"{step}   held-out loss   sources {logs['eval_loss']:.3f}   OOD {logs['eval_ood_loss']:.3f}"
            self.console.print(text, style="bold", highlight=False, soft_wrap=True)
        elif "loss" in logs:
            prefix = "loss/"
            self._losses |= {key.removeprefix(prefix): logs[key] for key in logs if key.startswith(prefix)}
            self._parts = {"loss": f"loss {logs['loss']:.3f}"}
            if "path_cosine" in logs:
                self._parts["cosine"] = f"path cosine {logs['path_cosine']:+.3f}"
            if "tokens_per_second" in logs:
                self._parts["speed"] = f"{logs['tokens_per_second']:,.0f} tokens/s"
            if not self._live.is_started:
                columns = [step, self._parts["loss"], *self._sources(), *self._numbers()]
                say(self.console, "   ".join(filter(None, columns)))
            self._draw()

    def _numbers(self) -> list[str]:
        """What is known of the last log entry next to the losses, and the time left."""
        return [text for name, text in self._parts.items() if name != "loss"] + [self._pace.left()]

    def _sources(self) -> list[str]:
        return [f"{name} {loss:.3f}" for name, loss in self._losses.items()] if len(self._losses) > 1 else []

    def _draw(self) -> None:
        now = time.monotonic()
        if self._live.is_started and now - self._drawn >= _REFRESH_SECONDS:
            self._live.refresh()
            self._drawn = now

    def _view(self) -> Group:
        rows: list[Table | Columns] = []
        state = self._state
        if state is not None and state.max_steps:
            step = f"step {state.global_step}/{state.max_steps}"
            rows = [_row(step, state.global_step, state.max_steps, "   ".join(self._numbers()))]
        if self._parts:
            losses = [Text(text, no_wrap=True) for text in (self._parts["loss"], *self._sources())]
            rows.append(Columns(losses, padding=(0, 3)))
        if self._evaluated:
            count = f"batch {self._evaluated}" + f"/{self._batches}" * bool(self._batches)
            rows.append(_row("evaluation", self._evaluated, self._batches or self._evaluated, count))
        return Group(*rows)


def _row(name: str, done: int, total: int, text: str) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_column(no_wrap=True)
    row.add_column(max_width=24)  # a narrow terminal takes from the bar, and not from the numbers
    row.add_column(no_wrap=True)
    row.add_row(name, ProgressBar(total=total, completed=done), Text(text))
    return row


class _Pace:
    """
    The time left: the mean times of steps, evaluations and checkpoints, and how many of each are due. The first step,
    which starts workers and may compile, does not count.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._number: dict[str, int] = defaultdict(int)
        self._last: dict[str, int] = {}  # the step of the last one of each
        self._since = time.monotonic()
        self._end: float | None = None
        self._more = False

    def count(self, kind: str, args: Any, state: Any) -> None:
        """Count a step, an evaluation or a checkpoint, which began when the last of them ended."""
        now = time.monotonic()
        if kind != "step" or kind in self._last:
            self._seconds[kind] += now - self._since
            self._number[kind] += 1
        self._since, self._last[kind] = now, state.global_step
        due = {
            "step": state.max_steps - state.global_step,
            "evaluation": self._due("evaluation", args.eval_strategy, state.eval_steps, state),
            "checkpoint": self._due("checkpoint", args.save_strategy, state.save_steps, state),
        }
        if "step" in self._number:
            known = {kind: self._seconds[kind] / number for kind, number in self._number.items()}
            self._end = now + sum(due[kind] * seconds for kind, seconds in known.items())
            self._more = any(due[kind] and kind not in known for kind in due)

    def left(self) -> str:
        """The time left in words. Empty before the second step."""
        if self._end is None:
            return ""
        seconds = round(max(0, self._end - time.monotonic()))
        return f"{'> ' * self._more}{timedelta(seconds=seconds)} left"

    def _due(self, kind: str, strategy: str, steps: int, state: Any) -> int:
        """How many come in this run: each after so many steps or an epoch, and one after the last step."""
        if strategy == "steps":
            place, whole = (state.global_step / steps, state.max_steps / steps) if steps > 0 else (0, 1)
        elif strategy == "epoch":
            place, whole = state.epoch or 0, state.num_train_epochs
        else:
            return 0
        if self._last.get(kind) == state.max_steps:
            return 0
        comes_now = place >= 1 and place == int(place) and self._last.get(kind) != state.global_step
        return max(0, math.ceil(whole) - int(place)) + comes_now


class SaveOnSignal(TrainerCallback):
    """
    The first Ctrl-C (SIGINT) saves a checkpoint at the end of the outer step and ends training. A second one ends at
    once. SIGTERM does the same if it is listened to. On several processes, all save after the same step: the one after
    the step in which the first of them was asked.
    """

    def __init__(self, console: Console):
        self.console = console
        self.requested: int | None = None  # the signal that a process got
        self._saved_after = "step"
        self._saved: int | None = None  # the step of the last checkpoint
        self._process = os.getpid()
        self._key = f"hf_nexus/last_step/{next(_RUNS)}"  # in the store of all processes

    @contextmanager
    def listening(self, sigterm: bool = False) -> Iterator[None]:
        """Handle signals inside the context, but not Ctrl-C if the process has its own way to handle it."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)[: 1 + sigterm]}
        if before[signal.SIGINT] is not signal.default_int_handler:
            del before[signal.SIGINT]
        if threading.current_thread() is not threading.main_thread():
            before = {}
        for number in before:
            signal.signal(number, self._request)
        try:
            yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) == self._request:  # the Trainer may have restored one that was before it
                    signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker of a data loader, which ends with its parent
            return
        if self.requested is None:
            hint = " Press Ctrl-C again to quit at once." if number == signal.SIGINT else ""
            self.console.print(f"Saving a checkpoint once the {self._saved_after} is complete.{hint}")
        self.requested = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopped(self, state: Any) -> int | None:
        """The signal that has ended training. Without a checkpoint of its last step, a complete run shall go on."""
        return self.requested if state.global_step < state.max_steps or state.global_step == self._saved else None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        self._saved = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop after this step, or on several processes after the one on which they agree."""
        if state.global_step >= self._last_step(state.global_step, args.world_size):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know that an evaluation runs."""
        self._saved_after = "evaluation" if self._saves_after_evaluation(args, state) else "step"

    def _saves_after_evaluation(self, args: Any, state: Any) -> bool:
        return state.global_step > 0 and args.world_size == 1

    def _last_step(self, step: int, processes: int) -> float:
        if processes == 1:
            return math.inf if self.requested is None else step
        # No process ends the next step without the others, so all of them see before its end what is stored now.
        store = _get_default_store()
        if self.requested is not None:
            store.compare_set(self._key, "", f"{step + 1} {self.requested}")
        if not store.check([self._key]):
            return math.inf
        last, self.requested = map(int, store.get(self._key).split())
        return last

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop after this evaluation, unless it is before the first step."""
        self._saved_after = "step"
        if self.requested is not None and self._saves_after_evaluation(args, state):
            control.should_save = control.should_training_stop = True
