"""The command line of a pretraining run: a YAML file by name or path, with flags applied on top of it."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..files import hide_token
from ..mixture.config import MixtureConfig
from ..mixture.stages import normalized, weight_stages
from ..strict import check, field_types
from .checks import check_run
from .fields import SECTIONS, SHAPE, HardwareArguments, ModelArguments, PretrainArguments, PretrainConfig
from .flags import RUN, read_flags
from .model import shape_fields
from .sections import DEFAULT_CONFIG, check_values, load_config, naming

__all__ = ["check_section", "parse_arguments"]

# Never written to disk: the first would make a saved run resume itself, the second is a secret.
_NOT_SAVED = ("resume_from_checkpoint", "hub_token")


def check_section(section: str, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """
    The values of a section, or of some of its fields, by their types: a float in place of a whole number, for example.

    Raises:
        ValueError: an unknown key or a value of the wrong type. The message starts with `where`, such as the file.
    """
    kinds = {name: field_types(cls) for name, cls in SECTIONS.items()}
    if section != "model":
        return check_values(section, values, kinds, where)
    return check_values(section, _fold(values), kinds, where, shape_fields(values) or [])


def _fold(section: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A `model` section with flags on top, by its fields, and without a Llama's defaults for another model."""
    values, fields = {**section, **(flags or {})}, section.get("config_fields") or {}
    known, others = shape_fields(values), {key for cls in SECTIONS.values() for key in field_types(cls)}
    more = {key: value for key, value in values.items() if key not in others and (known is None or key in known)}
    found = {key: value for key, value in values.items() if key not in more}
    if more or fields:
        over = (flags or {}).get("config_fields") or {}
        found["config_fields"] = {**check(fields, dict, "config_fields"), **more, **over}
    llama = values.get("path") is None and values.get("model_type") in (None, "llama")
    return found if llama else {**dict.fromkeys(SHAPE), **found}


def parse_arguments(argv: list[str]) -> PretrainArguments:
    """
    Parse a command line, such as `["--config", "demo", "--max_steps", "20"]`: the YAML named by `--config`, with every
    other flag on top of it.

    Nothing is downloaded. With `--dry_run` the training arguments are built for a CPU. This allows to plan a GPU run
    (`bf16`) on any machine.

    Raises:
        ValueError: an unknown key or flag, or a value that is not allowed, named in the message.
    """
    kinds = {section: field_types(cls) for section, cls in {"hardware": HardwareArguments, **SECTIONS}.items()}
    flags = read_flags(hide_token(argv), {"run": RUN, **kinds})
    name, dry_run = flags["run"].get("config", DEFAULT_CONFIG), flags["run"].get("dry_run", False)
    config = load_config(name)
    plain = {section: {**config.get(section, {}), **flags[section]} for section in SECTIONS}
    with naming(name, "model.", {}):
        plain["model"] = _fold(config.get("model", {}), flags["model"])
    # The values of flags have their types already.
    values = {section: check_section(section, content, f"{name}: ") for section, content in plain.items()}
    resolved = {section: _resolve(section, plain[section], values[section]) for section in SECTIONS}
    with naming(name, "model.", flags["model"]):
        model = ModelArguments(**values["model"])
    with naming(name, "data.", flags["data"]):
        mixture = MixtureConfig(**values["data"])
    if dry_run:
        values["training"]["use_cpu"] = True
    elif model.accelerators > 0 and not torch.accelerator.is_available():
        raise ValueError(
            f"The configuration {name!r} needs an accelerator, and this machine has none. Run the demo: "
            "hf-nexus train demo (in a checkout also accelerate launch recipes/pretrain_3b.py --config demo). "
            "Or plan this one: add --dry_run."
        )
    with naming(name, "", flags["training"]):
        training = PretrainConfig(**values["training"])
        for stage in weight_stages(training.mixture_weights or []):
            normalized(stage.weights, list(mixture.train_sources))
        check_run(model, mixture, training, here=not dry_run)
    _count_steps(training)
    defaults = _defaults(PretrainConfig)
    return PretrainArguments(
        config=name,
        sections=config,
        model=model,
        mixture=mixture,
        training=training,
        resolved=resolved,
        changed={key: value for key, value in resolved["training"].items() if value != defaults[key]},
        dry_run=dry_run,
        hardware=HardwareArguments(**flags["hardware"]),
    )


def _count_steps(training: PretrainConfig) -> None:
    """
    Replace fractions of the run by steps. When a run is resumed, transformers compares them with those of the
    checkpoint, which are steps, and warns of a difference.
    """
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if training.max_steps > 0 and 0 < (getattr(training, name) or 0) < 1:
            setattr(training, name, math.ceil(training.max_steps * getattr(training, name)))


def _resolve(section: str, plain: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """All fields of a section as plain data. Mappings and lists are kept as given."""
    typed = {key: plain[key] if isinstance(plain[key], dict | list) else value for key, value in values.items()}
    every = {**_defaults(SECTIONS[section]), **typed}
    sources = {"sources": every.pop("sources")} if section == "data" else {}
    return {key: value for key, value in every.items() if key not in _NOT_SAVED} | sources


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of the fields of a dataclass as plain data."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            value = field.default
            if field.default_factory is not dataclasses.MISSING:
                value = field.default_factory()
            found[field.name] = value.value if isinstance(value, enum.Enum) else value
    return found
