"""From a command line to the arguments of a run: a YAML file by name or path, then every other flag on top of it."""

import argparse
import dataclasses
import enum
import json
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from ..files import nearest
from ..mixture.config import MixtureConfig
from ..mixture.strict import parse_yaml
from .fields import (
    SECTIONS,
    DataArguments,
    HardwareArguments,
    ModelArguments,
    PretrainArguments,
    PretrainConfig,
    RunArguments,
)

__all__ = ["available_configs", "check_keys", "load_config", "parse_arguments"]

_CONFIGS = resources.files("hf_nexus").joinpath("pretrain", "configs")
# Never written to disk: the first would make a saved run resume itself, the second is a secret.
_NOT_SAVED = ("resume_from_checkpoint", "hub_token")


def available_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    files = _CONFIGS.iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))


def load_config(name_or_path: str) -> dict[str, dict[str, Any]]:
    """
    Read a configuration by name (`"demo"`) or path and check its sections and keys.

    Raises:
        ValueError: no such configuration, not a mapping, or an unknown section or key.

    Example:
        >>> from hf_nexus.pretrain.parsing import load_config
        >>> load_config("3b")["model"]["num_hidden_layers"]
        28
    """
    names = available_configs()
    if name_or_path in names:
        text = _CONFIGS.joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"There is no configuration {name_or_path!r}.{nearest(name_or_path, names)} "
            f"Use one of {', '.join(names)}, or the path of a YAML file."
        )
    config = parse_yaml(text, name_or_path)
    if not all(isinstance(section, dict) for section in config.values()):
        raise ValueError(f"{name_or_path} must hold the mappings {', '.join(SECTIONS)}.")
    for section, values in config.items():
        if section not in SECTIONS:
            raise ValueError(
                f"{name_or_path} has an unknown section {section!r}.{nearest(section, SECTIONS)} "
                f"Allowed: {', '.join(SECTIONS)}."
            )
        check_keys(name_or_path, section, values)
    if not config.get("data", {}).get("sources"):
        raise ValueError(f"{name_or_path} names no sources: `data: sources:` needs at least one.")
    return config


def check_keys(where: str, section: str, values: dict[str, Any]) -> None:
    """Raise `ValueError`, which begins with `where`, if `values` has a key that the section does not know."""
    allowed = _keys(section)
    for key in values:
        if key in allowed:
            continue
        home = next((name for name in SECTIONS if key in _keys(name)), None)
        hint = f" It belongs to the section {home!r}." if home else nearest(key, allowed)
        raise ValueError(f"{where} has an unknown key {key!r} in the section {section!r}.{hint}")


def _keys(section: str) -> list[str]:
    names = [f.name for f in dataclasses.fields(SECTIONS[section]) if f.init]
    return [*names, "sources"] if section == "data" else names


_DATACLASSES: Any = [RunArguments, HardwareArguments, *SECTIONS.values()]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _make_parser() -> _Parser:
    return _Parser(  # abbreviations would let a misspelt flag pass as another one
        _DATACLASSES,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Pretrain a Llama on a mixture of sources with the Nexus update.",
    )


def parse_arguments(argv: list[str]) -> PretrainArguments:
    """
    Parse a command line: the YAML that `--config` names, then every other argument on top.

    Nothing is downloaded. With `--dry_run` the training arguments are built for a CPU, so that those of a GPU run
    (`bf16`) can be planned anywhere.

    Args:
        argv (`list[str]`):
            For instance `["--config", "demo", "--max_steps", "20"]`.

    Raises:
        ValueError: an unknown key or argument, or a value of the wrong type, named in the message.
    """
    parser = _make_parser()
    defaults = vars(parser.parse_args([]))
    known, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(_describe_unknown(rest, parser))
    config = load_config(known.config)
    values: list[str] = []
    for section, content in config.items():
        types = {f.name: f.type for f in dataclasses.fields(SECTIONS[section])}
        for key, value in content.items():
            if key == "sources":
                continue
            if isinstance(value, dict | list) and "str" not in str(types[key]):
                raise ValueError(f"{known.config}: {section}.{key} must be a single value, not {value!r}.")
            if value is None or isinstance(value, dict | list):
                parser.set_defaults(**{key: value})
            else:  # through argparse, which converts and checks it as if it had been typed
                values.append(f"--{key}={value}")
    try:
        parser.parse_args(values)
    except ValueError as error:
        raise ValueError(f"{known.config}: {error}") from error
    return _build(vars(parser.parse_args([*values, *argv])), config["data"], defaults)


def _build(values: dict[str, Any], file: dict[str, Any], defaults: dict[str, Any]) -> PretrainArguments:
    sources = file["sources"]
    resolved = {
        section: {key: _plain(key, values[key]) for key in _keys(section) if key not in ("sources", *_NOT_SAVED)}
        for section in SECTIONS
    }
    try:
        mixture = MixtureConfig.from_dict({**resolved["data"], "sources": sources})
    except ValueError as error:
        from_flags = any(value != _plain(key, file.get(key, defaults[key])) for key, value in resolved["data"].items())
        raise ValueError(str(error) if from_flags else f"{values['config']}: {error}") from error
    resolved["data"]["sources"] = sources
    given = {name: {key: values[key] for key in _keys(name) if key != "sources"} for name in SECTIONS}
    model = ModelArguments(**given["model"])
    _check_shape(model)
    if values["devices"] is not None and values["devices"] < 1:
        raise ValueError(f"--devices {values['devices']} is not allowed; plan for 1 or more.")
    if values["dry_run"]:
        given["training"]["use_cpu"] = True
    else:
        _require_accelerator(values)
    training = PretrainConfig(**given["training"])
    _check_weights(training, mixture)
    return PretrainArguments(
        model=model,
        data=DataArguments(**given["data"]),
        training=training,
        mixture=mixture,
        config=values["config"],
        dry_run=values["dry_run"],
        devices=values["devices"],
        resolved=resolved,
        changed={key: value for key, value in resolved["training"].items() if value != _plain(key, defaults[key])},
        hardware=HardwareArguments(**{f.name: values[f.name] for f in dataclasses.fields(HardwareArguments)}),
    )


def _check_shape(model: ModelArguments) -> None:
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
        value = getattr(model, name)
        if value is not None and value < 1:
            raise ValueError(f"model.{name}={value} is not allowed; it must be 1 or more.")
    if model.hidden_size % (2 * heads):
        raise ValueError(
            f"model.hidden_size={model.hidden_size} with model.num_attention_heads={heads} is not allowed: each head "
            f"needs the same even width. Make hidden_size a multiple of {2 * heads}, or change num_attention_heads."
        )
    if groups is not None and heads % groups:
        raise ValueError(
            f"model.num_key_value_heads={groups} is not allowed with model.num_attention_heads={heads}: it must "
            "divide them evenly. Leave it out for as many as attention heads."
        )


def _check_weights(training: PretrainConfig, mixture: MixtureConfig) -> None:
    weights, sources = training.mixture_weights, mixture.train_sources
    if isinstance(weights, list):  # stages, which all name the same sources
        weights = weights[0]["weights"]
    if isinstance(weights, dict) and weights.keys() != sources.keys():
        raise ValueError(
            f"mixture_weights names {', '.join(weights)}, but the training sources are {', '.join(sources)}. Give "
            "each of them a weight, and no other name; 0 leaves a source out."
        )


def _require_accelerator(values: dict[str, Any]) -> None:
    if values["accelerators"] > 0 and not torch.accelerator.is_available():
        raise ValueError(
            f"The configuration {values['config']!r} needs an accelerator, and this machine has none. Run the demo: "
            "hf-nexus train demo (in a checkout also accelerate launch recipes/pretrain_3b.py --config demo). "
            "Or plan this one: add --dry_run."
        )


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):  # given as JSON
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{key} is not valid JSON: {value!r} ({error}).") from error
    return value


def _describe_unknown(rest: list[str], parser: argparse.ArgumentParser) -> str:
    word = next((argument for argument in rest if argument.startswith("-")), rest[0]).split("=")[0]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    sections = ", ".join(SECTIONS)
    what = f"Unknown argument {word!r}" if word.startswith("-") else f"{word!r} is not a flag"
    return f"{what}.{nearest(word, flags)} Allowed are the fields of the sections {sections}."
