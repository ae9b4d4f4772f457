"""The flags of a pretraining run, which are the fields of its sections."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from ..files import nearest
from ..strict import check, choices, from_text, options

__all__ = ["NO_FLAGS", "RUN", "described", "packaged_schema", "read_flags"]

NO_FLAGS = ("sources", "parallelism_config")
RUN: dict[str, Any] = {"config": str, "dry_run": bool}  # flags that are no field
# The definition in the JSON schema of each section. The hardware to plan for is only on the command line.
_CLASSES = {"model": "ModelArguments", "data": "MixtureConfig", "training": "PretrainConfig"}
_CLASSES |= {"hardware": "HardwareArguments", "nexus": "NexusConfigMixin"}


@cache
def packaged_schema() -> dict[str, Any]:
    """The JSON schema of all configurations, which is part of the package."""
    return json.loads(resources.files("hf_nexus").joinpath("nexus.schema.json").read_text(encoding="utf-8"))


def described(section: str) -> dict[str, dict[str, Any]]:
    """The fields of a section as the JSON schema describes them, by name."""
    return packaged_schema()["definitions"][_CLASSES[section]]["properties"]


def read_flags(argv: list[str], kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """
    The values of the flags of a command line, by section and field. `kinds` has the types of the fields. `-` in a flag
    is `_`. A flag without a value is true, and `--no_<field>` is false.

    Raises:
        ValueError: an unknown flag, with the nearest one, or a value that is not of its type.
    """
    homes = {name: section for section, fields in kinds.items() for name in fields if name not in NO_FLAGS}
    found: dict[str, dict[str, Any]] = {section: {} for section in kinds}
    words = list(argv)
    while words:
        value: Any
        word, equals, value = words.pop(0).partition("=")
        name = word[2:].replace("-", "_")
        negated = name not in homes and name.removeprefix("no_") in homes
        name = name.removeprefix("no_") if negated else name
        if not word.startswith("--") or name not in homes:
            what = f"Unknown argument {word!r}" if word.startswith("-") else f"{word!r} is not a flag"
            hint = nearest(word, [f"--{known}" for known in homes])
            raise ValueError(f"{what}.{hint} `hf-nexus plan --help` lists all.")
        if negated and equals:
            raise ValueError(f"{word}: it takes no value. Remove it, or use --{name}=false.")
        kind = kinds[homes[name]][name]
        types = [option for option, _ in options(kind)]
        several = list[str] in types and str not in types
        given = [value] if equals else []
        while words and not equals and not negated and not words[0].startswith("--") and (several or not given):
            given.append(words.pop(0))
        if given:
            value = check(given, kind, f"--{name}") if several else from_text(given[0], kind, f"--{name}")
        elif {bool, Any} & {*types} or any(True in (choices(option) or ()) for option in types):
            value = not negated
        else:
            raise ValueError(f"--{name}: a value is missing.")
        found[homes[name]][name] = value
    return found
