"""
Time for which training stops at a save, with and without `checkpoint_async`.

    python benchmarks/checkpoint_stop.py                                 # 15M parameters, 3 minutes on two cores
    python benchmarks/checkpoint_stop.py --steps 64 --save_steps 32

A round trains twice, in random order: with checkpoints for which training waits, and with checkpoints that are written
while it goes on. `stop` is the mean time of a save in the thread that trains. It includes the wait for the write
before, if that has not ended. `CPU` is the part of it that the thread computes, which other programs disturb less, but
which leaves out the waits for the disk. `loop` is the time from the first step to the end of training, when all
checkpoints are complete. Ratios are taken within a round. A short first round warms up.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from arms import CUDA, NEXUS, Case
from quartiles import quartiles
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_nexus import NexusConfig, NexusTrainer


class FirstStep(TrainerCallback):
    """The time at which training began."""

    began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = self.began or time.perf_counter()


def train(folder: str, later: bool, options: argparse.Namespace, steps: int) -> tuple[float, float, float]:
    """Seconds of a stop, of its part on the CPU, and of the loop."""
    case = Case(options.model, options.tokens, 4)
    args = NexusConfig(
        output_dir=folder,
        checkpoint_async=later,
        per_device_train_batch_size=case.rows,
        gradient_accumulation_steps=case.k,
        max_steps=steps,
        save_steps=min(options.save_steps, steps),
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not CUDA,
        bf16=CUDA,
    )
    trainer = NexusTrainer(case.build_model(NEXUS, "cuda" if CUDA else "cpu"), args, train_dataset=case.sources(steps))
    trainer.remove_callback(PrinterCallback)
    clock, stops, save = FirstStep(), [], trainer._save_checkpoint
    trainer.add_callback(clock)

    def timed(*given: Any) -> None:
        began = time.perf_counter(), time.thread_time()
        save(*given)
        stops.append((time.perf_counter() - began[0], time.thread_time() - began[1]))

    trainer._save_checkpoint = timed
    trainer.train()
    wall, cpu = (sum(seconds) / len(stops) for seconds in zip(*stops, strict=True))
    return wall, cpu, time.perf_counter() - clock.began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="15M", help="a model of arms.py (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per micro-batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="outer steps of each run (default: %(default)s)")
    parser.add_argument("--save_steps", type=int, default=6, help="steps between two saves (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds after the first (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scratch = Path("build")  # a temporary folder may be in memory
    scratch.mkdir(exist_ok=True)
    order, rounds = random.Random(0), []
    for number in range(options.rounds + 1):
        pair = {}
        for later in order.sample([False, True], 2):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                pair[later] = train(folder, later, options, options.steps if number else options.save_steps)
        stops = " and ".join(f"{pair[later][0]:.3f} s ({pair[later][1]:.3f} s CPU)" for later in (False, True))
        print(f"round {number}: {stops} with checkpoint_async", flush=True)
        rounds.append(pair)
    print("| | stop at a save, s | CPU, s | loop, s |\n|---|---|---|---|")
    measured = rounds[1:]
    for later, name in ((False, "training waits"), (True, "`checkpoint_async`")):
        print(f"| {name} | {' | '.join(quartiles([pair[later][i] for pair in measured]) for i in range(3))} |")
    ratios = (quartiles([pair[True][i] / pair[False][i] for pair in measured]) for i in range(3))
    print(f"| ratio | {' | '.join(ratios)} |")
    print(f"{options.model}, {options.save_steps} steps between saves, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
