"""Processes that are terminated or killed during training, and the checkpoints that others then see."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_nexus import NexusTrainer
from hf_nexus.trainer.checkpoints import MANIFEST_NAME, SENTINEL, STAGING_DIR, is_complete, last_checkpoint
from tests.support.faults import SAVING, Call, K, before, in_move, make, model, weights


class Terminate:
    """A SIGTERM. When the call returns, the Trainer's just-in-time checkpoint has noticed it."""

    def __init__(self, trainer: NexusTrainer, at: int):
        self.at, self.calls = at, 0
        callbacks = trainer.callback_handler.callbacks
        self.manager = next(cb for cb in callbacks if isinstance(cb, JITCheckpointCallback)).jit_manager
        self.manager.kill_wait = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls != self.at:
            return
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(200):  # a timer requests the checkpoint
            if self.manager.is_checkpoint_requested:
                return
            time.sleep(0.01)
        raise AssertionError("SIGTERM was not noticed.")


@contextmanager
def keeping_handler(number: int = signal.SIGTERM) -> Iterator[None]:
    """Restore the signal handler, which the Trainer restores only at the end of training."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, handler)


def unfinished(out: Path, ranks: int = 1) -> list[str]:
    """Visible checkpoints that are incomplete, and what they lack."""
    states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    found = []
    for folder in out.glob("checkpoint-*"):
        if (folder / SENTINEL).exists() and not (folder / MANIFEST_NAME).exists():
            continue  # marked by transformers
        if not is_complete(folder):
            found.append(f"{folder.name} is not complete")
        files = ["model.safetensors", "optimizer.pt", "scheduler.pt", "nexus.yaml", *states]
        found += [f"{folder.name} lacks {name}" for name in files if not (folder / name).exists()]
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError) as error:
            found.append(f"{folder.name}/trainer_state.json: {error}")
    return found


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def watch_files(out: Path, ranks: int = 1) -> list[list[str]]:
    """List `unfinished` each time that this process opens, moves or removes a file, until it ends."""
    found: list[list[str]] = []
    looking = [False]

    def look(event: str, args: tuple) -> None:
        if looking[0] or event not in FILE_EVENTS:
            return
        looking[0] = True
        with suppress(FileNotFoundError):
            found.append(unfinished(out, ranks))
        looking[0] = False

    sys.addaudithook(look)
    return found


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing_rename(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """Kill the process before a complete checkpoint gets its name."""

    def renamed(source: Path, target: Path) -> Path:
        if source.parent.name == STAGING_DIR:
            kill()
        return rename(source, target)

    return renamed


KILLS: dict[str, Callable[[NexusTrainer], AbstractContextManager]] = {
    # the third window, with gradients and half of the tensors moved
    "window": lambda trainer: in_move(trainer, Call(2 * K + 3, kill)),
    # the second checkpoint, which has only weights so far
    "checkpoint": lambda trainer: patch.object(
        trainer, "_save_optimizer_and_scheduler", before(trainer._save_optimizer_and_scheduler, Call(2, kill))
    ),
    # the second checkpoint, complete except for its name
    "rename": lambda trainer: patch.object(Path, "rename", before(Path.rename, Call(2, kill))),
    # the first checkpoint, after one of an earlier run was moved away
    "replace": lambda trainer: patch.object(Path, "rename", killing_rename(Path.rename)),
}


def train_until_killed(out: Path, place: str) -> None:
    """Run in another process."""
    trainer = make(out, **SAVING)
    with KILLS[place](trainer):
        trainer.train()


def train_watched(out: Path, found: Path) -> None:
    """Run in another process, because its audit hook cannot be removed. Write the list of `watch_files` to `found`."""
    trainer = make(out, **SAVING, save_total_limit=2)
    looks = watch_files(out)
    trainer.train()
    found.write_text(json.dumps({"seen": [lack for look in looks for lack in look], "looks": len(looks)}))


ROTATING = {**SAVING, "save_total_limit": 2, "metric_for_best_model": "loss", "eval_steps": 1, "max_steps": 8}


def train_until(out: Path, end: Path, events: int | None, seconds: float | None) -> None:
    """
    Run in another process: train, or resume if there is a checkpoint, and save the weights to `end`. The process is
    killed when it uses a file of `out` for the `events`-th time, or after some seconds.
    """
    resume = last_checkpoint(out) is not None
    trainer = make(out, model(seed=5 if resume else 0), **ROTATING)
    used = Call(events or 0, kill)

    def look(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and str(out) in str(args[0]):
            used()

    sys.addaudithook(look)
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles its signal, which therefore ends the process
    trainer.train(resume_from_checkpoint=resume)
    signal.setitimer(signal.ITIMER_REAL, 0)
    torch.save((weights(trainer), used.calls), end)


def in_a_process(function: Callable, *args: Any) -> int:
    """Run a function of this module in a new process and return its exit status. Only the first call imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=function, args=args)
    process.start()
    process.join(timeout=100)
    assert process.exitcode is not None, "The process did not end."
    return process.exitcode
