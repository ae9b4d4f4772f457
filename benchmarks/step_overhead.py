"""
What the Nexus update costs per outer step, beside plain gradient accumulation of the same micro-batches.

    python benchmarks/step_overhead.py                                            # 5 minutes on one CPU core
    python benchmarks/step_overhead.py --models 15M --tokens 2048 --k 8 --repeats 20

Time. Every arm is a real `train()` of its own copy of the model: the stock `Trainer` for plain accumulation, else
`NexusTrainer`. All run in this process, each in a thread that is let go for one outer step while the others wait. A
round is one outer step of each arm in random order, and ratios are taken within a round, so that a drifting machine
cancels. An outer step is everything from one `on_step_end` to the next: data, k forward and backward passes, clipping,
AdamW, counting. (Switching `args.nexus` within one run would be simpler, but off it still counts tokens per source,
which the stock Trainer does not.) On a CPU the ratio is also given in CPU time, which other processes disturb less.
`extra` is the difference to plain accumulation. It hardly depends on the number of tokens, and is measured best where
little else happens: hence the 16 tokens, and the control arms there.

Memory. Each arm runs alone for two outer steps. Counted is every byte that torch allocates from before the model is
built: on CUDA by the allocator's statistics, on a CPU from each allocation and release in the profiler's trace. `held`
is what lives between outer steps (parameters, optimizer state, snapshot), `peak` the most that ever lived at once
(gradients and activations as well); both as differences to plain accumulation in bytes per trainable parameter.
"""

import argparse
import gc
import os
import platform
import random
import re
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from allocations import measure_memory
from arms import ARMS, CUDA, LENGTH, MODELS, NEXUS, PLAIN, Case
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback

MAX_ROUNDS = 60
Seconds = tuple[float, float]  # by the clock, and of the CPU

# ---- Time ----


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
    started = time.perf_counter()
    while len(rounds) < most and (repeats or len(rounds) < 5 or time.perf_counter() - started < limit):
        rounds.append({arm: runs[arm].step() for arm in random.sample(arms, len(arms))})
    for run in runs.values():
        run.stop()
    return rounds


# ---- The table ----


def add_rows(table: Table, case: Case, arms: list[str], repeats: int | None, limit: float, threads: int) -> None:
    """Measure the arms of one case; one row each."""
    memory = {arm: measure_memory(case, arm) for arm in arms}
    gc.collect()
    rounds = measure_time(case, arms, repeats, limit, threads)
    parameters = sum(p.numel() for p in case.build_model().parameters())
    for arm in arms:
        typical = statistics.median(times[arm][0] for times in rounds)
        head = f"{parameters / 1e6:.1f}M", str(case.tokens), arm, f"{typical * 1e3:,.0f} ms"
        if arm == PLAIN:
            table.add_row(*head, "", *["1"] * (1 if CUDA else 2), "", "", str(len(rounds)))
            continue
        extra = statistics.median(times[arm][0] - times[PLAIN][0] for times in rounds)
        ratios = [quartiles([times[arm][i] / times[PLAIN][i] for times in rounds]) for i in range(1 if CUDA else 2)]
        held, peak = (f"{(a - b) / parameters:+.3f}" for a, b in zip(memory[arm], memory[PLAIN], strict=True))
        table.add_row(*head, f"{extra * 1e3:+,.0f} ms", *ratios, held, peak, str(len(rounds)))


def quartiles(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def describe_machine(threads: int) -> str:
    if CUDA:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16 autocast over fp32 weights"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return (
        f"{(names or [platform.processor()])[0]}, {threads} of {os.cpu_count()} cores, torch {torch.__version__}, fp32"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = list(MODELS) if CUDA else ["1M", "15M"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=sizes)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 512, 2048], help="per micro-batch")
    parser.add_argument("--k", type=int, default=4, help="micro-batches per outer step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds of each case, instead of --minutes")
    parser.add_argument("--minutes", type=float, default=2.5, help="for all timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    options = parser.parse_args()
    if any(tokens < 2 or (tokens > LENGTH and tokens % LENGTH) for tokens in options.tokens):
        parser.error(f"--tokens {options.tokens}: use 2 to {LENGTH} (one row), or a multiple of {LENGTH}")
    torch.set_num_threads(options.threads)

    cases = [Case(model, tokens, options.k) for model in options.models for tokens in options.tokens]
    # A longer step gets more time for its rounds, though not in proportion.
    shares = [(MODELS[case.model]["hidden_size"] ** 2 * case.tokens) ** 0.5 for case in cases]
    times = ["time / plain"] if CUDA else ["time / plain", "CPU time / plain"]
    columns = [
        "parameters",
        "tokens",
        "arm",
        "outer step",
        "extra",
        *times,
        "held, B/param",
        "peak, B/param",
        "rounds",
    ]
    table = Table(*columns, box=box.MARKDOWN)
    for case, share in zip(cases, shares, strict=True):
        print(f"{case.model}, {case.tokens} tokens per micro-batch ...", file=sys.stderr)
        arms = list(ARMS) if case.tokens == min(options.tokens) else [PLAIN, NEXUS]
        add_rows(table, case, arms, options.repeats, 60 * options.minutes * share / sum(shares), options.threads)
        gc.collect()
    print(f"{describe_machine(options.threads)}; k = {options.k}; median (quartiles) of paired ratios")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
