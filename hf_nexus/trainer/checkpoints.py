"""Checkpoints that are complete or absent, and the random states from which each is resumed."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

__all__ = ["LAST", "RandomStates", "StagedCheckpoints", "is_complete", "last_checkpoint", "resolve_checkpoint"]

# Values of `resume_from_checkpoint` on a command line for the newest checkpoint.
LAST = ("last", "true")
# Pushes of an output folder leave out names that begin with an underscore.
STAGING_DIR = "_incomplete"
# transformers puts this file into a checkpoint that it begins because of a SIGTERM, and removes it at the end.
SENTINEL = "checkpoint-is-incomplete.txt"


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is complete."""
    return Path(checkpoint, TRAINER_STATE_NAME).is_file() and not Path(checkpoint, SENTINEL).exists()


def last_checkpoint(folder: str | Path) -> str | None:
    """
    The newest complete checkpoint of an output folder; `None` if there is none. transformers' `get_last_checkpoint`
    returns incomplete ones, too.

    Example:
        >>> from hf_nexus.trainer.checkpoints import last_checkpoint
        >>> last_checkpoint("no/such/folder") is None
        True
    """
    folder = Path(folder)
    _recover(folder)
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdecimal()]
    found = [path for path in found if is_complete(path)]
    return str(max(found, key=lambda path: int(path.name.split("-")[-1]))) if found else None


def resolve_checkpoint(resume: str | bool | None, folder: str) -> str | None:
    """
    The checkpoint to resume from: a path, or for `True`, `"last"` and `"true"` the newest complete one.

    Raises:
        ValueError: there is no complete checkpoint, or the given one is not complete.
    """
    if not resume:
        return None
    wanted = str(resume)
    if is_complete(wanted):
        return wanted
    if wanted.lower() not in LAST:
        raise ValueError(
            f"The checkpoint {wanted!r} does not exist or was not written to its end. Resume from an earlier "
            "one, or with resume_from_checkpoint=True from the newest that is complete."
        )
    last = last_checkpoint(folder)
    if last is None:
        raise ValueError(f"No complete checkpoint was found in {folder!r}; train without resuming.")
    return last


def _recover(run_dir: Path) -> None:
    """Restore a checkpoint that was moved for a new one of the same step, if the new one is incomplete."""
    for replaced in (run_dir / STAGING_DIR / "replaced").glob("*"):
        if not is_complete(run_dir / replaced.name):
            with suppress(OSError):  # another rank was faster
                replaced.rename(run_dir / replaced.name)


class StagedCheckpoints:
    """
    Writes each checkpoint to `_incomplete/` in the run's folder and renames it after every rank has finished. A
    visible folder `checkpoint-<step>` is complete.

    Attributes:
        staging (`bool`): Whether a checkpoint is being written.
        stopped_by_sigterm (`bool`): Whether the Trainer's `enable_jit_checkpoint` has ended training.
    """

    def __init__(self, args: Any):
        self._args = args
        self.staging = False
        self.stopped_by_sigterm = False

    def begin(self) -> None:
        """Delete what a killed run left, before training."""
        folder = Path(self._args.output_dir)
        self.stopped_by_sigterm = False
        _recover(folder)
        if self._args.should_save:
            shutil.rmtree(folder / STAGING_DIR, ignore_errors=True)

    def folder(self, run_dir: str) -> str:
        """The folder into which the Trainer writes: the run's, or `_incomplete` in it while one is written."""
        return os.path.join(run_dir, STAGING_DIR) if self.staging else run_dir

    @contextmanager
    def stage(self, run_dir: str, state: TrainerState) -> Iterator[Path]:
        """
        Write one checkpoint inside the context, which gives its final path. All ranks must enter it. The path of the
        best checkpoint in `state` is corrected.
        """
        processes = PartialState()
        staged = Path(run_dir, STAGING_DIR, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        final = Path(run_dir, staged.name)
        if self._args.enable_jit_checkpoint and (final / SENTINEL).exists():
            self.stopped_by_sigterm = True
        if self._args.should_save:
            shutil.rmtree(staged, ignore_errors=True)  # of an earlier attempt
        processes.wait_for_everyone()
        self.staging = True
        try:
            yield final
        finally:
            self.staging = False
        if state.best_model_checkpoint == str(staged):
            state.best_model_checkpoint = str(final)
            if self._args.should_save:
                state.save_to_json(str(staged / TRAINER_STATE_NAME))
        processes.wait_for_everyone()
        if self._args.should_save:
            _move(staged, final)
        processes.wait_for_everyone()
        if processes.is_local_main_process and staged.exists():  # on a node that does not share the disk
            _move(staged, final)

    def rotate(self, run_dir: str, best: str | None) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`, but not the best."""
        if self._args.should_save:
            rotate_checkpoints(run_dir, self._args.save_total_limit, best, use_mtime=True)


def _move(staged: Path, final: Path) -> None:
    if final.exists():  # an earlier run's, or the folder that transformers has marked for a SIGTERM
        replaced = staged.parent / "replaced" / final.name
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.parent.mkdir(exist_ok=True)
        final.rename(replaced)
    staged.rename(final)
    shutil.rmtree(staged.parent, ignore_errors=True)


class RandomStates:
    """
    The random states that a checkpoint saves.

    A checkpoint that is saved during a window (the Trainer saves in `on_pre_optimizer_step` after a SIGTERM) is
    resumed at the window's start, so it holds the states of that moment. A window is in progress until the number of
    the outer step has changed.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Discard an interrupted window, before training."""
        self._epoch: tuple | None = None
        self._window: tuple | None = None
        self._step = 0

    def begin_epoch(self, step: int, epoch: float | None) -> None:
        """Note the states at an epoch's start, where the Trainer resumes before the data loader draws its seed."""
        self._forget(step)
        self._epoch = _random_states() if float(epoch or 0).is_integer() else None

    def loaded(self) -> None:
        """Note the states again. In a resumed epoch, the Trainer loads them after its start."""
        if self._epoch is not None:
            self._epoch = _random_states()

    def begin_window(self, step: int) -> None:
        """Note the states before the first micro-batch of an outer step."""
        self._forget(step)
        self._window, self._step = self._epoch or _random_states(), step

    def _forget(self, step: int) -> None:
        if self._window is not None and self._step < step:
            self._epoch = self._window = None

    @contextmanager
    def to_save(self, step: int) -> Iterator[None]:
        """The states from which a checkpoint of an outer step is resumed, inside the context."""
        self._forget(step)
        start, now = self._window or self._epoch, _random_states()
        if start is not None:
            _set_random_states(start)
        try:
            yield
        finally:
            _set_random_states(now)


def _random_states() -> tuple:
    device = torch.accelerator.current_accelerator(check_available=True)
    module = None if device is None else torch.get_device_module(device)
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), module, module and module.get_rng_state()


def _set_random_states(states: tuple) -> None:
    python, numpy, cpu, module, device = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if module is not None:
        module.set_rng_state(device)
