"""Checkpoints that are complete or absent, and the random states from which each is resumed."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files import checkpoints_of, printable, step_of
from ..lock import locked
from ..mixture.step_effects import StepEffects
from .config import SETTINGS_NAME
from .distributed import max_over_ranks
from .sharded import ShardedWriter

__all__ = [
    "LAST",
    "RandomStates",
    "StagedCheckpoints",
    "delete_checkpoint",
    "is_complete",
    "last_checkpoint",
    "recover",
    "resolve_checkpoint",
]

logger = logging.get_logger(__name__)

# Values of `resume_from_checkpoint` on a command line for the newest checkpoint.
LAST = ("last", "true")
# Pushes of an output folder leave out names that begin with an underscore.
STAGING_DIR = "_incomplete"
# The files of a checkpoint and their sizes in bytes. It is written last.
MANIFEST_NAME = "manifest.json"
# transformers puts this file into a checkpoint that it begins because of a SIGTERM, and removes it at the end. A
# checkpoint that has both files was complete before, and the new one of the same step is in the other folder.
SENTINEL = "checkpoint-is-incomplete.txt"
# Without one of each, the Trainer would start the optimizer, the learning rate or the random numbers again.
_STATES = ("optimizer*", "scheduler.pt", "rng_state*.pth")
# The Trainer looks for these itself, in any format: they may have been converted.
_WEIGHTS = ("model", "pytorch_model", "adapter_model")


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has all files of its manifest, in their size."""
    return _flaw(Path(checkpoint)) is None


def last_checkpoint(folder: str | Path) -> str | None:
    """
    The newest complete checkpoint of an output folder; `None` if there is none. A warning names those passed over.

    One of the Trainer has no manifest. It is complete if it has all that a run is resumed from.
    """
    for path in reversed(checkpoints_of(folder)):
        # With our settings and without a manifest, it is a part of one of ours.
        of_the_trainer = not (path / MANIFEST_NAME).exists() and not (path / SETTINGS_NAME).exists()
        flaw = (_unfinished(path) if of_the_trainer else _flaw(path)) or _lacking(path)
        if flaw is None:
            return str(path)
        logger.warning(f"{path} is passed over: {flaw}.")
    return None


def resolve_checkpoint(resume: str | bool | None, folder: str) -> str | None:
    """
    The checkpoint to resume from: a path, or for `True`, `"last"` and `"true"` the newest complete one.

    Raises:
        ValueError: there is no complete checkpoint, or the given one is not complete.
    """
    if not resume:
        return None
    wanted = str(resume)
    if wanted.lower() in LAST and not os.path.isdir(wanted):
        last = last_checkpoint(folder)
        if last is None:
            raise ValueError(
                f"No valid checkpoint found in output directory ({folder}). Train without resuming, or pass the path "
                "of a checkpoint."
            )
        return last
    path = Path(wanted)
    if found := checkpoints_of(path):
        raise ValueError(f"{wanted} is a folder of checkpoints. Resume from one of them, such as {found[-1]}.")
    has_manifest = (path / MANIFEST_NAME).exists()
    flaw = (_flaw(path, converted=True) if has_manifest else _unfinished(path)) or _lacking(path)
    if flaw is not None:
        changed = f" If you changed the folder yourself, delete its {MANIFEST_NAME}." if has_manifest else ""
        raise ValueError(
            f"Can't find a valid checkpoint at {wanted}: {flaw}. Resume from an earlier one, or from the newest that "
            f"is complete (resume_from_checkpoint=True, or --resume_from_checkpoint last).{changed}"
        )
    return wanted


def _unfinished(checkpoint: Path) -> str | None:
    """Why a checkpoint was not written to its end, as far as it can be seen without a manifest."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    if (checkpoint / SENTINEL).exists() and not (checkpoint / MANIFEST_NAME).exists():
        return f"it was not written to its end, as {SENTINEL} shows"
    state = checkpoint / TRAINER_STATE_NAME
    return None if state.is_file() and state.stat().st_size else f"{TRAINER_STATE_NAME} is missing or empty"


def _flaw(checkpoint: Path, converted: bool = False) -> str | None:
    """Why a checkpoint is not complete. It may have `converted` weights in place of those that were saved."""
    unfinished = _unfinished(checkpoint)
    if unfinished is not None:
        return unfinished
    manifest = _read_manifest(checkpoint)
    if manifest is None:
        return f"{MANIFEST_NAME} is missing or damaged"
    sizes = _sizes(checkpoint)
    for name, size in manifest.items():
        if name not in sizes and not (converted and name.startswith(_WEIGHTS)):
            return f"{name} is missing"
        if sizes.get(name, size) != size:
            return f"{name} has {sizes[name]} bytes, and {size} were written"
    return None


def _lacking(checkpoint: Path) -> str | None:
    """What a run cannot be resumed without. DeepSpeed (`latest`) has its own files."""
    if _read(checkpoint / TRAINER_STATE_NAME, "global_step") is None:
        return f"{TRAINER_STATE_NAME} is damaged"
    missing = [p for p in _STATES if not (found := [*checkpoint.glob(p)]) or not all(map(_has_data, found))]
    if not missing or (checkpoint / "latest").exists():
        return None
    return (
        f"{missing[0]} is missing or empty, without which the run cannot be resumed (was it saved with "
        "save_only_model?)"
    )


def _has_data(path: Path) -> bool:
    """
    Whether a file, or each in a folder, begins with data. After a power failure, a disk can hold zeros in its place.
    In a folder, the file of a rank that had nothing to write is empty.
    """
    if path.is_dir():
        return all(_has_data(file) for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    with path.open("rb") as file:
        return any(file.read(64))


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / MANIFEST_NAME)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def _read_manifest(checkpoint: Path) -> dict[str, int] | None:
    return _read(checkpoint / MANIFEST_NAME, TRAINER_STATE_NAME)


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """The object in a JSON file; `None` if it cannot be read, or lacks a key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and key in found else None


# ---- Changes on the disk that a crash cannot leave half done ----


def _seal(checkpoint: Path) -> None:
    """Force the files of a checkpoint to the disk, and write its manifest."""
    _force_all(checkpoint)  # it opens them: a network file system then knows the sizes of what other machines wrote
    scratch = checkpoint / f"{MANIFEST_NAME}.tmp"
    scratch.write_text(json.dumps(_sizes(checkpoint), indent=1), encoding="utf-8")
    _force(scratch)
    scratch.replace(checkpoint / MANIFEST_NAME)
    _force(checkpoint)


def _publish(staged: Path) -> None:
    """Give a checkpoint with a manifest its name."""
    run_dir = staged.parent.parent
    _set_aside(run_dir / staged.name)  # of an earlier run, or the folder that transformers has marked for a SIGTERM
    staged.rename(run_dir / staged.name)
    _force(run_dir)


def _finish(staged: Path) -> None:
    _seal(staged)
    _publish(staged)
    _clear(staged.parent.parent)


def recover(run_dir: str | Path) -> None:
    """Give a checkpoint its name that a killed process has completed, and delete what else it left."""
    for staged in checkpoints_of(_staging(Path(run_dir))):
        if is_complete(staged) and not is_complete(Path(run_dir, staged.name)):
            _publish(staged)
    for checkpoint in checkpoints_of(run_dir):  # a mark that stays would look like a SIGTERM in this run
        if (checkpoint / MANIFEST_NAME).exists():
            (checkpoint / SENTINEL).unlink(missing_ok=True)
        elif [path.name for path in checkpoint.glob("*")] == [SENTINEL]:
            shutil.rmtree(checkpoint)
    _clear(Path(run_dir))


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, which disappears at once and not file by file."""
    _set_aside(checkpoint)
    _clear(checkpoint.parent)


def _set_aside(checkpoint: Path) -> None:
    if checkpoint.exists():
        aside = _staging(checkpoint.parent) / "deleted" / checkpoint.name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.rename(aside)


def _clear(run_dir: Path) -> None:
    shutil.rmtree(_staging(run_dir), ignore_errors=True)


def _staging(run_dir: Path) -> Path:
    """The folder of incomplete checkpoints. A link would lead to files that no run has written here."""
    staging = run_dir / STAGING_DIR
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    return staging


def _force_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _force(path)


def _force(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # a temporary file of another rank; a folder on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not possible here
            raise
    finally:
        os.close(descriptor)


def _reason(error: BaseException | None) -> str:
    if isinstance(error, CheckpointException):  # of all ranks, with their tracebacks
        error = next(iter(error.failures.values()))[0]
    return "another rank failed, see its message" if error is None else printable(error)


class StagedCheckpoints:
    """
    Writes each checkpoint to `_incomplete/` in the run's folder and renames it after every rank has finished. A
    visible folder `checkpoint-<step>` is complete. With `checkpoint_async`, model and optimizer are written, and the
    folder is renamed, while training goes on.

    Once a checkpoint is complete, `completed` is called with its path on each rank, in the thread that trains.
    """

    def __init__(self, args: Any, completed: Callable[[str], None]):
        self._args = args
        self._completed = completed
        self._writer = ShardedWriter()
        self._writes: list[Future] = []  # of the checkpoint that is staged
        self._pending: tuple[str, Future] | None = None  # the checkpoint that is written while training goes on
        self._reported = False  # whether it was given to `completed`
        self._resumed: str | None = None
        self._recorded_best: str | None = None  # the best checkpoint, as the resumed one has recorded it
        self._saved: str | None = None  # the last checkpoint of this run
        self._new: Path | None = None
        self.staging = False  # whether the Trainer writes a checkpoint now
        self.stopped_by_sigterm = False  # whether the Trainer's `enable_jit_checkpoint` has ended training

    @contextmanager
    def in_folder(self, run_dir: str, resume: str | bool | None) -> Iterator[str | None]:
        """
        Lock the folder of a run inside the context, which gives the checkpoint to resume from. For all ranks.

        Raises:
            ValueError: on all ranks, if another process trains in the folder, or a rank has no complete checkpoint, or
                another one than the others.
        """
        self._resumed, self._saved, self.stopped_by_sigterm = None, None, False
        with ExitStack() as stack:
            with self._together():
                if self._args.process_index == 0:
                    stack.enter_context(locked(run_dir))
                if self._args.should_save:
                    recover(run_dir)
            with self._together():
                self._resumed = resolve_checkpoint(resume, self._args.output_dir)
            earlier = checkpoints_of(run_dir)
            if self._resumed is None and earlier and self._args.should_save:
                logger.warning(
                    f"{run_dir} holds checkpoints of an earlier run, up to {earlier[-1].name}. Delete them, or choose "
                    'another output_dir: "last" and True resume from the highest step, whichever run has saved it.'
                )
            try:
                yield self._resumed
            finally:
                self._end()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Raise the error of one rank on all ranks, and one if they would resume from different steps."""
        error, step = None, -1
        try:
            yield
            if self._resumed is not None:
                state = TrainerState.load_from_json(os.path.join(self._resumed, TRAINER_STATE_NAME))
                step, self._recorded_best = state.global_step, state.best_model_checkpoint
        except ValueError as refusal:
            error = refusal
        if self._args.world_size > 1:
            facts = torch.tensor([error is not None, step, -step], device=self._args.device)
            failed, last, first = max_over_ranks(facts).tolist()
            if failed:
                raise error or ValueError("Another rank cannot start to train: see its message.")
            if last != -first:
                raise ValueError(
                    f"The ranks would resume from different steps, {-first} and {last}. Copy the newest complete "
                    "checkpoint to every machine, or pass the path of one that every machine has."
                )
        elif error is not None:
            raise error

    def find_best(self, state: TrainerState) -> None:
        """Look for the best checkpoint of a resumed run where the run is now, which may have been moved."""
        if self._resumed is None or self._recorded_best is None:
            return
        for resumed in (Path(self._resumed), Path(self._resumed).resolve()):
            best = resumed.with_name(Path(self._recorded_best).name)
            if best.is_dir():
                if str(best) != state.best_model_checkpoint:
                    logger.warning(f"The best checkpoint so far is {best}.")
                state.best_model_checkpoint = str(best)
                return

    def folder(self, run_dir: str) -> str:
        """The folder into which the Trainer writes: the run's, or `_incomplete` in it while one is written."""
        return os.path.join(run_dir, STAGING_DIR) if self.staging else run_dir

    @contextmanager
    def stage(self, run_dir: str, state: TrainerState) -> Iterator[Path]:
        """
        Write one checkpoint inside the context, which all ranks must enter, into the folder that it gives. The path of
        the best checkpoint in `state` is corrected.

        Raises:
            OSError: on all ranks, if the checkpoint before was not written.
        """
        self.wait()
        processes = PartialState()
        staged = Path(run_dir, STAGING_DIR, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        final = os.path.join(run_dir, staged.name)
        if self._args.enable_jit_checkpoint and os.path.exists(os.path.join(final, SENTINEL)):
            self.stopped_by_sigterm = True
        if self._args.should_save:
            shutil.rmtree(staged, ignore_errors=True)  # of an earlier attempt
        processes.wait_for_everyone()
        self.staging, self._writes = True, []
        try:
            yield staged
        finally:
            self.staging = False
        written = state.best_model_checkpoint
        self._follow_best(state, final)
        if state.best_model_checkpoint != written and self._args.should_save:
            state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if not self._args.should_save and not self._writes:  # the others do so with the manifest
            _force_all(staged)
        processes.wait_for_everyone()
        if self._writes:
            thread = ThreadPoolExecutor(1)
            self._reported, self._pending = False, (final, thread.submit(self._finish_later, staged, self._writes))
            thread.shutdown(wait=False)
            if self.stopped_by_sigterm:  # the Trainer ends its mark of a checkpoint that is not complete
                self.wait()
            return
        # On a node that does not share the disk. A network file system may show a folder after it was renamed.
        alone = processes.is_local_main_process and staged.exists() and not (staged / TRAINER_STATE_NAME).exists()
        processes.wait_for_everyone()
        if self._args.should_save:
            self._new = Path(final)
        if self._args.should_save or alone:
            _finish(staged)
        processes.wait_for_everyone()
        self._completed(final)

    def write_later(self, staged: Path, model: nn.Module, optimizer: Any) -> None:
        """
        Begin to write the model and the optimizer, if it is not `None`, of the checkpoint that is staged, after all
        its other files. All ranks must call it.
        """
        if not self._args.should_save:
            _force_all(staged)
        self._writes = self._writer.begin(staged, model, optimizer)

    def _finish_later(self, staged: Path, writes: list[Future]) -> None:
        for write in writes:
            write.result()
        if self._args.should_save:
            _finish(staged)

    def report_completed(self) -> None:
        """Report a checkpoint that was completed while training went on, once."""
        if self._pending is not None and not self._reported:
            final, written = self._pending
            if written.done() and written.exception() is None:
                self._reported = True
                self._completed(final)

    def wait(self) -> None:
        """
        Wait until the last checkpoint is complete. All ranks must call it.

        Raises:
            OSError: on all ranks, if it was not written.
        """
        if self._pending is None:
            return
        error = self._pending[1].exception()
        if max_over_ranks(torch.tensor(int(error is not None), device=self._args.device)).item():
            final, self._pending = self._pending[0], None
            raise OSError(
                f"{final} was not written: {_reason(error)}. Mend the cause, then resume from the last checkpoint."
            ) from error
        self.report_completed()
        self._pending = None

    def _end(self) -> None:
        """Wait on this rank, after an interruption."""
        if self._pending is not None and (error := self._pending[1].exception()) is not None:
            logger.error(f"{self._pending[0]} was not written: {_reason(error)}.")
        self.report_completed()
        self._pending = None

    def _follow_best(self, state: TrainerState, new: str) -> None:
        """
        Point to the checkpoint of the best step, which may be the last one, evaluated since. The Trainer looks for it
        where `new` is written, and finds none of an earlier step. A folder of that name may be of an earlier run.
        """
        saved = {Path(path).name: path for path in (state.best_model_checkpoint, self._saved, new) if path}
        best = saved.get(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best is not None and (best == new or os.path.isdir(best)):
            state.best_model_checkpoint = best
        elif state.best_global_step and self._args.load_best_model_at_end:
            logger.warning(
                f"The best model so far, of step {state.best_global_step}, was not saved and cannot be loaded at the "
                "end. Save at each evaluation (save_steps, eval_steps)."
            )
        self._saved = new

    def has_saved(self, step: int) -> bool:
        """Whether the last checkpoint that this run has saved is that of a step."""
        return self._saved is not None and step_of(Path(self._saved)) == step

    def seal_again(self) -> None:
        """Renew the manifest of a new checkpoint that a callback has changed in `on_save`."""
        new, self._new = self._new, None
        if new is not None and new.is_dir() and _sizes(new) != _read_manifest(new):
            _seal(new)

    def rotate(self, checkpoint: str, best: str | None) -> None:
        """
        Delete the oldest checkpoints beyond `save_total_limit`, but neither the new one nor the best. The steps of a
        run increase, so those of later steps are of an earlier run. The times of files follow a clock that may be
        set back.
        """
        limit, found = self._args.save_total_limit or 0, checkpoints_of(os.path.dirname(checkpoint))
        if not self._args.should_save or limit <= 0:
            return
        kept = {Path(path).resolve() for path in (checkpoint, best) if path is not None}
        complete = [path for path in found if is_complete(path)]
        spare = [path for path in complete if path.resolve() not in kept]
        spare.sort(key=lambda path: step_of(path) < step_of(Path(checkpoint)))
        surplus = spare[: max(0, len(complete) - max(limit, len(kept)))]
        if len(complete) >= limit:  # enough without those that are not complete
            surplus += [path for path in found if path not in complete and path.resolve() not in kept]
        for path in surplus:
            try:
                delete_checkpoint(path)
            except OSError as error:  # an old checkpoint must not cost a run
                logger.warning(f"{path} could not be deleted: {error}")


class RandomStates:
    """
    The random states that a checkpoint saves.

    A checkpoint that is saved during a window (the Trainer saves in `on_pre_optimizer_step` after a SIGTERM) is
    resumed at the window's start, so it holds the states of that moment.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Discard an interrupted window, before training."""
        self._effects = StepEffects()
        self._forget()

    def _forget(self) -> None:
        self._epoch: tuple | None = None  # the states at the start of an epoch whose first window was not stepped on
        self._window: tuple | None = None  # those at the start of the window

    def begin_epoch(self, step: int, epoch: float | None) -> None:
        """Note the states at an epoch's start, where the Trainer resumes before the data loader draws its seed."""
        self._effects.apply(step)
        self._epoch = _random_states() if float(epoch or 0).is_integer() else None

    def loaded(self) -> None:
        """Note the states again. In a resumed epoch, the Trainer loads them after its start."""
        if self._epoch is not None:
            self._epoch = _random_states()

    def begin_window(self, step: int) -> None:
        """Note the states before the first micro-batch of an outer step."""
        self._effects.begin(step)
        self._window = self._epoch or _random_states()
        self._effects.add(self._forget)

    @contextmanager
    def to_save(self, step: int) -> Iterator[None]:
        """The states from which a checkpoint of an outer step is resumed, inside the context."""
        self._effects.apply(step)
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
