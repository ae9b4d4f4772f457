"""
Cost of pushing to a healthy Hub for a training loop.

    python benchmarks/push_overhead.py                                        # 15 minutes on two CPU cores
    python benchmarks/push_overhead.py --rounds 3 --steps 40 --save_steps 20

A round trains twice, in random order: with `push_to_hub` (`hub_strategy="checkpoint"`, which uploads the model and
the training state at every save) and without. Both runs save the same checkpoints. The time counts from the first step
to the end of the last save. The Hub is the server of the tests, in another process on the same machine. It and the
uploader share the cores with the training, which uses one thread. A short first round warms up. The cost of a save
does not depend on the number of steps between saves: for the overhead of your runs, set their `--save_steps`.

Two runs of the same training differ by a few percent on a shared machine. The last line of the output does not depend
on that: it is the fraction of the loop that the training thread spends in the calls that push.
"""

import argparse
import functools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quartiles import quartiles

ROOT = Path(__file__).parents[1]


def start_hub(folder: Path) -> "subprocess.Popen[str]":
    """Start the server of the tests, and point the environment of this process to it."""
    command = [sys.executable, "-m", "tests.support.hub.server", "--root", str(folder / "hub"), "--port", "0"]
    hub = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert hub.stdout is not None
    variables = dict(assignment.split("=", 1) for assignment in hub.stdout.readline().split())
    os.environ |= variables | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    return hub


class Stopwatch:
    """Sum of the seconds spent in wrapped functions. Nested calls count once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self.seconds += 0.0 if self._depth else time.perf_counter() - began

        return timed


def train(folder: Path, pushes: bool, options: argparse.Namespace, steps: int) -> tuple[float, float, float]:
    """Seconds of one training loop: wall time, CPU time of this process, and time in the calls that push."""
    import torch
    from arms import CUDA, Case
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from hf_nexus import NexusConfig, NexusTrainer

    class Clock(TrainerCallback):
        began = ended = (0.0, 0.0)

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            self.ended = time.perf_counter(), time.process_time()

        on_save = on_step_end  # the loop ends with the last save

    torch.manual_seed(0)
    case = Case(options.model, options.tokens, 4)
    model = case.build_model("plain accumulation", "cuda" if CUDA else "cpu")
    args = NexusConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=case.rows,
        gradient_accumulation_steps=4,
        max_steps=steps,
        save_steps=min(options.save_steps, steps),
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not CUDA,
        bf16=CUDA,
        push_to_hub=pushes,
        hub_model_id="alice/model",
        hub_strategy="checkpoint",
    )
    trainer = NexusTrainer(model, args, train_dataset=case.sources(steps))
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    stopwatch = Stopwatch()
    if trainer.publisher is not None:  # all that the training thread does to push
        trainer._push_from_checkpoint = stopwatch(trainer._push_from_checkpoint)
        trainer.publisher.status = stopwatch(trainer.publisher.status)
    trainer.train()
    if trainer.publisher is not None:
        status = trainer.publisher.status()
        assert status.pushed_step == steps and status.complete, status
    return clock.ended[0] - clock.began[0], clock.ended[1] - clock.began[1], stopwatch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1M", help="a model of arms.py (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per micro-batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="outer steps of each run (default: %(default)s)")
    parser.add_argument("--save_steps", type=int, default=40, help="steps between two saves (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds after the first (default: %(default)s)")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    order, rounds = random.Random(0), []
    with tempfile.TemporaryDirectory() as scratch:
        hub = start_hub(Path(scratch))
        try:
            for number in range(options.rounds + 1):
                pair = {}
                for pushes in order.sample([False, True], 2):
                    with tempfile.TemporaryDirectory(dir=scratch) as folder:
                        pair[pushes] = train(Path(folder), pushes, options, options.steps if number else 2)
                print(f"round {number}: {pair[False][0]:.2f} s without, {pair[True][0]:.2f} s with", flush=True)
                rounds.append(pair)
        finally:
            hub.kill()
            hub.wait()
    measured = rounds[1:]
    saves = options.steps // options.save_steps
    extra = statistics.median(pair[True][0] - pair[False][0] for pair in measured) / saves
    fractions = [pair[True][2] / pair[True][0] for pair in measured]
    print(f"time with / without: {quartiles([pair[True][0] / pair[False][0] for pair in measured], 4)}")
    print(f"CPU time with / without: {quartiles([pair[True][1] / pair[False][1] for pair in measured], 4)}")
    print(f"{extra:+.2f} s for each of {saves} saves, {len(measured)} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"in the calls that push: {quartiles(fractions, 4)} of the loop")


if __name__ == "__main__":
    main()
