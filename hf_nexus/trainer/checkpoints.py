"""Checkpoints that are whole or absent, and that repeat the window in progress when they are resumed."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

__all__ = ["LAST", "CheckpointMixin", "is_complete", "last_checkpoint"]

# What `resume_from_checkpoint` may be instead of a path, in lower case.
LAST = ("last", "true")
# Beside the checkpoints. Pushes of an output folder leave out names that begin with an underscore.
STAGING_DIR = "_incomplete"
# transformers puts it into a checkpoint that it begins because of a SIGTERM, and removes it at the end.
SENTINEL = "checkpoint-is-incomplete.txt"

# What the mixins are mixed into has the Trainer's attributes; this tells type checkers not to look for them.
Base: Any = object


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return Path(checkpoint, TRAINER_STATE_NAME).is_file() and not Path(checkpoint, SENTINEL).exists()


def last_checkpoint(folder: str | Path) -> str | None:
    """
    The newest complete checkpoint of an output folder, `None` if there is none. Like transformers'
    `get_last_checkpoint`, which takes incomplete ones too.

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


def _recover(run_dir: Path) -> None:
    """Put back a checkpoint that was moved aside for another of the same step, which then never came."""
    for replaced in (run_dir / STAGING_DIR / "replaced").glob("*"):
        if not is_complete(run_dir / replaced.name):
            with suppress(OSError):  # another rank was faster
                replaced.rename(run_dir / replaced.name)


class CheckpointMixin(Base):
    """
    Writes each checkpoint to `_incomplete/` in the run's folder and renames it when every rank is done, so that a
    folder `checkpoint-<step>` is complete whenever it can be seen.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.stopped_by_sigterm = False  # whether Trainer's `enable_jit_checkpoint` has ended training
        self._staging = False
        self._random_states = RandomStates()
        super().__init__(*args, **kwargs)
        self.add_callback(self._random_states)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as the base class does; `resume_from_checkpoint=True` takes the newest complete checkpoint, and so do the
        words `"last"` and `"true"`, as which a script's command line has it.

        Raises:
            ValueError: there is no complete checkpoint, or the given one is not.
        """
        folder = Path(self.args.output_dir)
        self.stopped_by_sigterm = False
        if resume_from_checkpoint and not is_complete(wanted := str(resume_from_checkpoint)):
            if wanted.lower() not in LAST:
                raise ValueError(
                    f"The checkpoint {wanted!r} does not exist or was not written to its end. Resume from an earlier "
                    "one, or with resume_from_checkpoint=True from the newest that is complete."
                )
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"No complete checkpoint was found in {str(folder)!r}; train without resuming.")
        _recover(folder)
        if self.args.should_save:
            shutil.rmtree(folder / STAGING_DIR, ignore_errors=True)  # of a run that was killed
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_DIR) if self._staging else run_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        staged = run_dir / STAGING_DIR / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = run_dir / staged.name
        if self.args.enable_jit_checkpoint and (final / SENTINEL).exists():
            self.stopped_by_sigterm = True
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)  # of an earlier attempt
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _publish(staged, final)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and staged.exists():  # on a node with a disk of its own
            _publish(staged, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # it is pushed once it is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._random_states.loaded()

    def _save_rng_state(self, output_dir: str) -> None:
        with self._random_states.of_resumption():
            super()._save_rng_state(output_dir)


def _publish(staged: Path, final: Path) -> None:
    if final.exists():  # an earlier run's, or the place that transformers has marked for a SIGTERM
        replaced = staged.parent / "replaced" / final.name
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.parent.mkdir(exist_ok=True)
        final.rename(replaced)
    staged.rename(final)
    shutil.rmtree(staged.parent, ignore_errors=True)


class RandomStates(TrainerCallback):
    """
    Which random states a checkpoint has to hold. One that is saved while a window is in progress (Trainer saves in
    `on_pre_optimizer_step` after a SIGTERM) is resumed at the window's start, so it holds the states of that moment.
    """

    def __init__(self) -> None:
        self._epoch: Any = None
        self._window: Any = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Forget a window that was broken off."""
        self._epoch = self._window = None

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Note the states: where an epoch starts, Trainer resumes before the data loader draws its seed."""
        self._epoch = _random_states() if float(state.epoch or 0).is_integer() else None

    def loaded(self) -> None:
        """Note the states anew: where a resumed run begins with an epoch, Trainer loads them after that event."""
        if self._epoch is not None:
            self._epoch = _random_states()

    def begin_window(self) -> None:
        """Note the states before the first micro-batch."""
        self._window = self._epoch or _random_states()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """The window is done: from here on the states are those of the moment."""
        self._epoch = self._window = None

    @contextmanager
    def of_resumption(self) -> Iterator[None]:
        """The states that resuming now would have to start from, for as long as the context lasts."""
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
