"""The command line of a pretraining run: a YAML file by name or path, with flags applied on top of it."""

import argparse
import dataclasses
import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from ..files import Secret, hide_token, nearest, shown
from ..mixture.config import MixtureConfig
from ..mixture.schedule import normalized
from ..mixture.stages import weight_stages
from ..schema import help_of
from ..strict import check, field_types, from_text, load_yaml, options
from .checks import check_run
from .fields import SECTIONS, SHAPE, HardwareArguments, ModelArguments, PretrainArguments, PretrainConfig
from .model import shape_fields
from .starter import starter_training

__all__ = ["check_section", "load_config", "parse_arguments"]

_DEFAULT_CONFIG = "3b"
# Never written to disk: the first would make a saved run resume itself, the second is a secret.
_NOT_SAVED = ("resume_from_checkpoint", "hub_token")
_NO_FLAGS = ("sources", "parallelism_config")


def load_config(name_or_path: str) -> dict[str, dict[str, Any]]:
    """
    Read a configuration by name (`"demo"`) or path: the fields of its sections as plain data. A mixture alone, with
    its fields at the top level, gets the training settings of `hf-nexus init`.

    Raises:
        ValueError: no such configuration, an unknown section, or no sources. The message names the file.
    """
    config = load_yaml(name_or_path, "pretrain", "configuration")
    if "sources" in config:
        config = {"data": config, "training": starter_training(name_or_path, config["sources"])}
    for section, values in config.items():
        if section not in SECTIONS:
            raise ValueError(
                f"{name_or_path}: unknown section {section!r}.{nearest(section, SECTIONS)} "
                f"Allowed: {', '.join(SECTIONS)}."
            )
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{name_or_path}: {section}: {shown(values)} is not allowed; it must be a mapping of fields."
            )
        if isinstance(token := values.get("hub_token"), str):
            config[section] = {**values, "hub_token": Secret(token)}
    if not config.get("data", {}).get("sources"):
        raise ValueError(f"{name_or_path}: data.sources: missing. Name one source or more.")
    return config


def check_section(section: str, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """
    The values of a section, or of some of its fields, by their types: a float in place of a whole number, for example.

    Raises:
        ValueError: an unknown key or a value of the wrong type. The message starts with `where`, such as the file.
    """
    kinds, found = field_types(SECTIONS[section]), {}
    for key, value in (_fold(values) if section == "model" else values).items():
        if key not in kinds:
            home = next((name for name, cls in SECTIONS.items() if key in field_types(cls)), None)
            known = [*kinds, *((shape_fields(values) or []) if section == "model" else [])]
            hint = f" It belongs to the section {home!r}." if home else nearest(key, known)
            raise ValueError(f"{where}{section}.{key}: unknown key.{hint}")
        found[key] = check(value, kinds[key], f"{where}{section}.{key}")
    return found


def _fold(values: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section in terms of its fields, and without the defaults of a Llama for another model."""
    known, others = shape_fields(values), {key for cls in SECTIONS.values() for key in field_types(cls)}
    more = {key: value for key, value in values.items() if key not in others and (known is None or key in known)}
    found = {key: value for key, value in values.items() if key not in more}
    if more:
        found["config_fields"] = {**check(values.get("config_fields") or {}, dict, "config_fields"), **more}
    llama = values.get("path") is None and values.get("model_type") in (None, "llama")
    return found if llama else {**dict.fromkeys(SHAPE), **found}


def parse_arguments(argv: list[str]) -> PretrainArguments:
    """
    Parse a command line: the YAML named by `--config`, with every other flag on top of it.

    Nothing is downloaded. With `--dry_run` the training arguments are built for a CPU. This allows to plan a GPU run
    (`bf16`) on any machine.

    Args:
        argv (`list[str]`):
            For instance `["--config", "demo", "--max_steps", "20"]`.

    Raises:
        ValueError: an unknown key or flag, or a value that is not allowed, named in the message.
    """
    argv = hide_token(argv)
    given = _given_flags(argv)
    name, dry_run = given.pop("config", _DEFAULT_CONFIG), given.pop("dry_run", "false")
    dry_run = dry_run is True or from_text(dry_run, bool, "--dry_run")
    flags = {cls: _values_of_flags(cls, given) for cls in (HardwareArguments, *SECTIONS.values())}
    config = load_config(name)
    plain = {section: {**config.get(section, {}), **flags[cls]} for section, cls in SECTIONS.items()}
    with _naming(name, "model.", {}):
        plain["model"] = _fold(plain["model"])
    # The values of flags have their types already.
    values = {section: check_section(section, content, f"{name}: ") for section, content in plain.items()}
    resolved = {section: _resolve(section, plain[section], values[section]) for section in SECTIONS}
    with _naming(name, "model.", flags[ModelArguments]):
        model = ModelArguments(**values["model"])
    with _naming(name, "data.", flags[MixtureConfig]):
        mixture = MixtureConfig(**values["data"])
    if dry_run:
        values["training"]["use_cpu"] = True
    elif model.accelerators > 0 and not torch.accelerator.is_available():
        raise ValueError(
            f"The configuration {name!r} needs an accelerator, and this machine has none. Run the demo: "
            "hf-nexus train demo (in a checkout also accelerate launch recipes/pretrain_3b.py --config demo). "
            "Or plan this one: add --dry_run."
        )
    with _naming(name, "", flags[PretrainConfig]):
        training = PretrainConfig(**values["training"])
        for _, weights in weight_stages(training.mixture_weights or []):
            normalized(weights, list(mixture.train_sources))
        check_run(model, mixture, training, here=not dry_run)
    defaults = _defaults(PretrainConfig)
    return PretrainArguments(
        config=name,
        model=model,
        mixture=mixture,
        training=training,
        resolved=resolved,
        changed={key: value for key, value in resolved["training"].items() if value != defaults[key]},
        dry_run=dry_run,
        hardware=HardwareArguments(**flags[HardwareArguments]),
    )


@contextmanager
def _naming(config: str, section: str, flags: Mapping[str, Any]) -> Iterator[None]:
    """Name the configuration in an error, unless flags changed the section."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # the Trainer's checks vary
        raise ValueError(f"{section}{error}" if flags else f"{config}: {section}{error}") from error


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


# ---- Flags ----


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


_UNSET = object()


def _given_flags(argv: list[str]) -> dict[str, Any]:
    """The flags of a command line by field, as text; `True` or `False` for a flag without a value."""
    parser = _Parser(
        allow_abbrev=False,  # abbreviations would accept a misspelt flag as another one
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Pretrain a model on a mixture of sources with the Nexus update.",
    )
    parser.add_argument(
        "--config", default=_DEFAULT_CONFIG, help="Name of a configuration in the package, or a YAML file."
    )
    parser.add_argument(
        *("--dry_run", "--dry-run"),
        nargs="?",
        const=True,
        default=False,
        help="Print the plan, without network or GPU.",
    )
    _add_flags(parser.add_argument_group("hardware to plan for"), HardwareArguments)
    for section, cls in SECTIONS.items():
        _add_flags(parser.add_argument_group(section), cls)
    unset = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions})
    found, rest = parser.parse_known_args(argv, unset)
    if rest:
        raise ValueError(_describe_unknown(rest, parser))
    return {key: value for key, value in vars(found).items() if value is not _UNSET}


def _add_flags(group: "argparse._ArgumentGroup", cls: type) -> None:
    defaults, texts = _defaults(cls), help_of(cls)
    for field in dataclasses.fields(cls):
        if field.name not in defaults or field.name in _NO_FLAGS:
            continue
        name, kinds = field.name, dict(options(field_types(cls)[field.name]))
        settings: dict[str, Any] = {"default": defaults[name], "help": texts[name].replace("%", "%%")}
        if list[str] in kinds and str not in kinds:
            settings["nargs"] = "+"
        elif bool in kinds or "const" in field.metadata:
            settings |= {"nargs": "?", "const": True}
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **settings)
        if defaults[name] is True:
            opposite = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
            group.add_argument(*opposite, dest=name, action="store_false", help=f"Sets {name} to false.")


def _values_of_flags(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the flags that are fields of a dataclass, as plain data."""
    found = {}
    for key, kind in field_types(cls).items():
        if key in given:
            text = given[key]
            found[key] = from_text(text, kind, f"--{key}") if isinstance(text, str) else check(text, kind, f"--{key}")
    return found


def _describe_unknown(rest: list[str], parser: argparse.ArgumentParser) -> str:
    word = next((argument for argument in rest if argument.startswith("-")), rest[0]).split("=")[0]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    what = f"Unknown argument {word!r}" if word.startswith("-") else f"{word!r} is not a flag"
    return f"{what}.{nearest(word, flags)} Allowed are the fields of the sections {', '.join(SECTIONS)}."
