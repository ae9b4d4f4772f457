"""The output folder of a run: what may be resumed from it, what an earlier run left in it, what it was told."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.environment import installed_versions
from ..trainer.checkpoints import LAST, last_checkpoint
from .fields import PretrainArguments

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CONFIG_NAME", "claim_folder", "find_checkpoint"]

CONFIG_NAME = "pretrain.yaml"


def find_checkpoint(arguments: PretrainArguments) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` means: a path, or with `last` (or `true`) the folder's newest.

    Returns:
        `str`, *optional*: its path; `None` for a new run.

    Raises:
        ValueError: nothing to resume from; or a new run in a folder that holds checkpoints, unless
            `overwrite_output_dir`.
    """
    args, folder = arguments.training, arguments.folder
    resume = args.resume_from_checkpoint
    if resume is None or resume.lower() == "false":
        if _checkpoints(folder) and not args.overwrite_output_dir:
            raise ValueError(
                f"{folder} already holds checkpoints of an earlier run. Continue it with --resume_from_checkpoint "
                "last, start anew with --overwrite_output_dir (they are deleted), or choose another --output_dir."
            )
        return None
    if resume.lower() not in LAST:
        if not Path(resume).is_dir():
            raise ValueError(
                f"--resume_from_checkpoint {resume} is not a folder; give a checkpoint's path, or 'last'."
            )
        return resume
    last = last_checkpoint(folder)
    if last is None:
        raise ValueError(
            f"{folder} holds no complete checkpoint to resume from; leave out --resume_from_checkpoint to start."
        )
    return last


def claim_folder(arguments: PretrainArguments, checkpoint: str | None, console: "Console") -> None:
    """Delete the checkpoints of an earlier run, unless it is resumed, and save what this one was told."""
    folder = arguments.folder
    if checkpoint is None:
        for old in _checkpoints(folder):
            console.print(f"Deleting {old}, of an earlier run.")
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    header = (
        f"# The resolved configuration of a run, which `--config` with the path of this file repeats.\n# {versions}\n"
    )
    text = yaml.safe_dump(arguments.resolved, sort_keys=False, allow_unicode=True)
    (folder / CONFIG_NAME).write_text(header + text, encoding="utf-8")


def _checkpoints(folder: Path) -> list[Path]:
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    return [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []
