"""The output folder of a run: checkpoints of an earlier run, and the saved configuration."""

import os
from pathlib import Path

import yaml
from rich.console import Console

from ..files import checkpoints_of, write_atomic
from ..hub.facts import installed_versions
from ..strict import dump_yaml
from ..trainer.checkpoints import delete_checkpoint, last_checkpoint, resolve_checkpoint
from .fields import PretrainArguments
from .sections import CONFIG_NAME, load_config

__all__ = ["claim_folder", "find_checkpoint"]


def find_checkpoint(arguments: PretrainArguments) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` names: a path, or the newest of the folder for `last` and `true`.
    `None` for a new run. If torchrun has restarted the run after a failure, the newest of the folder in any case.

    Raises:
        ValueError: nothing to resume from, or a new run in a folder with checkpoints that may not be deleted.
    """
    args, folder = arguments.training, arguments.folder
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        # A start that was refused, because an earlier run has the folder, is restarted as well.
        saved = folder / CONFIG_NAME  # on the disk of the first node only
        ours = not saved.exists() or yaml.safe_load(saved.read_text(encoding="utf-8")) == arguments.resolved
        if ours and (last := last_checkpoint(folder)):
            return last
    if (args.resume_from_checkpoint or "false").lower() != "false":
        return resolve_checkpoint(args.resume_from_checkpoint, str(folder))
    if not checkpoints_of(folder):
        return None
    demo = Path(load_config("demo")["training"]["output_dir"])
    overwrite = args.overwrite_output_dir and folder.resolve() == demo.resolve()
    if not overwrite:
        raise ValueError(
            f"{folder} already holds checkpoints of an earlier run. Continue it with --resume_from_checkpoint last, "
            f"choose another --output_dir, or delete its checkpoint-* folders (--overwrite_output_dir only does so in "
            f"{demo})."
        )
    return None


def claim_folder(arguments: PretrainArguments, checkpoint: str | None, console: Console) -> None:
    """Delete the checkpoints of an earlier run, unless it is resumed, and save the configuration of this run."""
    if checkpoint is None:
        for old in checkpoints_of(arguments.folder):
            console.print(f"Deleting {old}, of an earlier run.")
            delete_checkpoint(old)
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    header = "# The resolved configuration. `--config` with the path of this file repeats the run, if launched alike."
    write_atomic(arguments.folder / CONFIG_NAME, f"{header}\n# {versions}\n{dump_yaml(arguments.resolved)}")
