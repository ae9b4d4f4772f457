"""What is found wrong with a comparison before anything runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..pretrain.fields import PretrainArguments
from ..pretrain.parsing import parse_arguments
from .config import ComparisonConfig

__all__ = ["check_settings", "keep_declared"]

_DECLARED_NAME = "declared.json"


def check_settings(config: ComparisonConfig, folder: Path) -> PretrainArguments:
    """
    Read the configuration of every arm and trial.

    Args:
        config ([`ComparisonConfig`]):
            The comparison.
        folder (`Path`):
            Its folder, which gets these configurations.

    Returns:
        [`PretrainArguments`]: of one of them; model and data are the same in all.

    Raises:
        ValueError: one that is not valid, or arms that do not train on as many rows.
    """
    rows: dict[str, float] = {}
    for arm in config.arms:
        for number, trial in enumerate(list(config.trials(arm)) or [{}]):
            settings = {**config.settings(arm), **trial, "output_dir": str(folder)}
            path = folder / "configs" / f"{arm}-{number}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(config.run_config(settings), sort_keys=False, allow_unicode=True)
            path.write_text(text, encoding="utf-8")
            try:
                arguments = parse_arguments(["--config", str(path)])
            except ValueError as error:  # the file is ours; the user wrote the comparison's
                what = f"arms.{arm}" + f" with {trial}" * bool(trial)
                raise ValueError(f"{what}: {str(error).removeprefix(f'{path}: ')}") from error
            t = arguments.training
            length = t.max_steps if t.max_steps > 0 else t.num_train_epochs
            rows[f"{arm} {trial or ''}".strip()] = (
                length * t.per_device_train_batch_size * t.gradient_accumulation_steps
            )
    if len(set(rows.values())) > 1:
        raise ValueError(f"arms: not all train on as many rows, which a comparison needs: {rows}.")
    return arguments


def keep_declared(config: ComparisonConfig, folder: Path) -> None:
    """
    Note what the first call declared as primary.

    Raises:
        ValueError: it was something else.
    """
    path = folder / _DECLARED_NAME
    declared: dict[str, Any] = {"baseline": config.baseline, **asdict(config.primary)}
    if not path.exists():
        path.write_text(json.dumps(declared) + "\n", encoding="utf-8")
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != declared:
        raise ValueError(
            f"primary: {folder} was begun with {before}, and what is declared after seeing results decides nothing. "
            "Put it back, or begin another output_dir."
        )
