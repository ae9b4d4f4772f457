"""The arguments of a pretraining run, built from a YAML file and the flags on top of it."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..mixture.stages import normalized, stages_of
from ..strict import check, field_types, from_text
from .checks import check_run
from .command_line import CommandLine, read_command_line
from .fields import SECTIONS, SHAPE, HardwareArguments, ModelArguments, PretrainArguments, PretrainConfig
from .model import shape_fields
from .sections import check_values, naming

__all__ = ["changed_fields", "parse_arguments", "resolve"]

# Never written to disk: the first would make a saved run resume itself, the second is a secret.
_NOT_SAVED = ("resume_from_checkpoint", "hub_token")


def _fold(section: Mapping[str, Any], flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    A `model` section with flags on top, by its fields, and without a Llama's defaults for another model; and the known
    fields of its configuration class.
    """
    values, fields = {**section, **flags}, section.get("config_fields") or {}
    known, others = shape_fields(values), {key for cls in SECTIONS.values() for key in field_types(cls)}
    more = {key: value for key, value in values.items() if key not in others and (known is None or key in known)}
    found = {key: value for key, value in values.items() if key not in more}
    if more or fields:
        over = flags.get("config_fields") or {}
        found["config_fields"] = {**check(fields, dict, "config_fields"), **more, **over}
    llama = values.get("path") is None and values.get("model_type") in (None, "llama")
    return (found if llama else {**dict.fromkeys(SHAPE), **found}), known or []


def parse_arguments(argv: list[str]) -> PretrainArguments:
    """The arguments of a command line, as [`read_command_line`] and [`resolve`] build them."""
    return resolve(read_command_line(argv))


def resolve(command_line: CommandLine) -> PretrainArguments:
    """
    Build the arguments of a run, which are checked together.

    Nothing is downloaded. With `dry_run` the training arguments are built for a CPU. This allows to plan a GPU run
    (`bf16`) on any machine.

    Raises:
        ValueError: an unknown key, or a value that is not allowed, named in the message.
    """
    name, sections, dry_run = command_line.name, command_line.sections, command_line.dry_run
    kinds = {section: field_types(cls) for section, cls in {"hardware": HardwareArguments, **SECTIONS}.items()}
    flags = {section: _typed(command_line.flags[section], kinds[section]) for section in kinds}
    plain = {section: {**sections.get(section, {}), **flags[section]} for section in ("data", "training")}
    with naming(name, "model.", flags["model"]):
        plain["model"], known = _fold(sections.get("model", {}), flags["model"])
    mixture = command_line.mixture
    # The mixture was built with the command line.
    values = {
        section: check_values(section, plain[section], kinds, f"{name}: ", known) for section in ("model", "training")
    }
    values["data"] = {key: getattr(mixture, key) for key in plain["data"]}
    resolved = {section: _every_field(section, plain[section], values[section]) for section in SECTIONS}
    with naming(name, "model.", flags["model"]):
        model = ModelArguments(**values["model"])
    if dry_run:
        # These are checked on the devices of this process, which need not be those of the run.
        values["training"] |= {"use_cpu": True, "tf32": None, "ddp_backend": None}
    elif model.accelerators > 0 and not torch.accelerator.is_available():
        raise ValueError(
            f"The configuration {name!r} needs an accelerator, and this machine has none. Run the demo: "
            "hf-nexus train demo (in a checkout also accelerate launch recipes/pretrain_3b.py --config demo). "
            f"Or plan this one: hf-nexus plan {name}."
        )
    with naming(name, "", flags["training"]):
        training = PretrainConfig(**values["training"])
        if "num_train_epochs" in flags["training"] and training.max_steps > 0:  # a file may hold both
            raise ValueError(f"--num_train_epochs: max_steps={training.max_steps} overrides it. Add --max_steps -1.")
        for stage in stages_of(training.mixture_weights or []):
            normalized(stage.weights, list(mixture.train_sources))
        check_run(model, mixture, training, here=not dry_run)
    _fractions_to_steps(training)
    return PretrainArguments(
        name=name,
        sections=sections,
        model=model,
        mixture=mixture,
        training=training,
        resolved=resolved,
        dry_run=dry_run,
        hardware=HardwareArguments(**flags["hardware"]),
    )


def changed_fields(arguments: PretrainArguments) -> dict[str, Any]:
    """The fields of the section `training` that differ from their defaults."""
    defaults = _defaults(PretrainConfig)
    return {key: value for key, value in arguments.resolved["training"].items() if value != defaults[key]}


def _typed(flags: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Flags by the types of their fields. A flag whose type the JSON schema does not have is still text."""
    read = {name: from_text if isinstance(value, str) else check for name, value in flags.items()}
    return {
        name: read[name](value, kinds[name], f"--{name}") if name in kinds else value for name, value in flags.items()
    }


def _fractions_to_steps(training: PretrainConfig) -> None:
    """
    Replace fractions of the run by steps. When a run is resumed, transformers compares them with those of the
    checkpoint, which are steps, and warns of a difference.
    """
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if training.max_steps > 0 and 0 < (getattr(training, name) or 0) < 1:
            setattr(training, name, math.ceil(training.max_steps * getattr(training, name)))


def _every_field(section: str, plain: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
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
