"""What of a run's files is published, and where in the repository."""

from collections.abc import Iterable
from pathlib import Path

from .queue import QUEUE_NAME

__all__ = ["STRATEGIES", "checkpoint_files", "files_below", "output_files"]

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
LAST_CHECKPOINT = "last-checkpoint"
# What only a resumed run needs; the root of the repository is for those who load the model.
_RESUME_ONLY = ("optimizer", "scheduler", "scaler", "rng_state", "pytorch_model_fsdp_", "global_step", "data_state")


def checkpoint_files(checkpoint: Path, strategy: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """
    What a `hub_strategy` other than `"end"` publishes of a checkpoint.

    Returns:
        `tuple[dict[str, Path], tuple[str, ...]]`: the files by path in the repository, and the folders of the
        repository that they renew (`""` is its root).
    """
    whole = files_below(checkpoint, "")
    files = {name: path for name, path in whole.items() if not name.startswith(_RESUME_ONLY)}
    if strategy == "every_save":
        return files, ("",)
    slot = LAST_CHECKPOINT if strategy == "checkpoint" else checkpoint.name
    return files | {f"{slot}/{name}": path for name, path in whole.items()}, ("", slot)


def output_files(folder: Path, skip: Iterable[str] = ()) -> dict[str, Path]:
    """The files of an output folder but for checkpoints, the queue, and names that start with `_` or are skipped."""
    left_out = {QUEUE_NAME, *skip}
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in left_out and not path.name.startswith(("_", "checkpoint-")):
            files |= files_below(path, path.name)
    return files


def files_below(path: Path, name: str) -> dict[str, Path]:
    """A file, or the files below a folder, by their paths under `name`."""
    if path.is_file():
        return {name: path}
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {Path(name, file.relative_to(path)).as_posix(): file for file in found}
