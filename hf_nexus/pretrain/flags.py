"""The flags of a pretraining run, which are the fields of its sections."""

import argparse
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, NoReturn

from ..files import nearest
from ..strict import check, choices, from_text, options

__all__ = ["HARDWARE", "NO_FLAGS", "described_fields", "given_flags", "packaged_schema", "values_of_flags"]

HARDWARE = "hardware"  # to plan for: fields that only the command line has
_CLASSES = {
    HARDWARE: "HardwareArguments",
    **{"model": "ModelArguments", "data": "MixtureConfig", "training": "PretrainConfig"},
}
NO_FLAGS = ("sources", "parallelism_config")
_UNSET = object()

# The type of each field, by section and name.
Kinds = Mapping[str, Mapping[str, Any]]


@cache
def packaged_schema() -> dict[str, Any]:
    """The JSON schema of all configurations, which is part of the package."""
    return json.loads(resources.files("hf_nexus").joinpath("nexus.schema.json").read_text(encoding="utf-8"))


def described_fields() -> dict[str, dict[str, dict[str, Any]]]:
    """The fields of each section, as the JSON schema describes them, by name."""
    return {section: packaged_schema()["definitions"][cls]["properties"] for section, cls in _CLASSES.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def given_flags(argv: list[str], kinds: Kinds) -> dict[str, Any]:
    """
    The flags of a command line by field, as text; `True` or `False` for a flag without a value. `-` in a flag is `_`.

    Raises:
        ValueError: an unknown flag, with the nearest one.
    """
    parser = _Parser(
        allow_abbrev=False,  # abbreviations would accept a misspelt flag as another one
        description="Pretrain a model on a mixture of sources with the Nexus update.",
    )
    parser.add_argument("--config", help="Name of a configuration in the package (by default 3b), or a YAML file.")
    parser.add_argument("--dry_run", nargs="?", const=True, help="Print the plan, without network or GPU.")
    for section, fields in kinds.items():
        group = parser.add_argument_group(section)
        for name, kind in fields.items():
            if name not in NO_FLAGS:
                _add_flag(group, name, kind, described_fields()[section].get(name, {}))
    unset = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions})
    found, rest = parser.parse_known_args([_with_underscores(word) for word in argv], unset)
    if rest:
        raise ValueError(_describe_unknown(rest, parser))
    return {key: value for key, value in vars(found).items() if value is not _UNSET}


def _with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else word


def _add_flag(group: "argparse._ArgumentGroup", name: str, kind: Any, described: Mapping[str, Any]) -> None:
    kinds = dict(options(kind))
    default = described.get("default")
    text = described.get("description", "") + ("" if default is None else f" (default: {default})")
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if list[str] in kinds and str not in kinds:
        settings["nargs"] = "+"
    elif bool in kinds or any(True in (choices(option) or ()) for option in kinds):
        settings |= {"nargs": "?", "const": True}
    group.add_argument(f"--{name}", **settings)
    if default is True:
        group.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"Sets {name} to false.")


def values_of_flags(kinds: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values of the flags that are fields of a section, as plain data.

    Raises:
        ValueError: a value that is not of its type.
    """
    found = {}
    for key, kind in kinds.items():
        if key in given:
            text = given[key]
            found[key] = from_text(text, kind, f"--{key}") if isinstance(text, str) else check(text, kind, f"--{key}")
    return found


def _describe_unknown(rest: list[str], parser: argparse.ArgumentParser) -> str:
    word = next((argument for argument in rest if argument.startswith("-")), rest[0]).split("=")[0]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    if word.startswith("-"):
        return f"Unknown argument {word!r}.{nearest(word, flags)} `hf-nexus train --help` lists all."
    return f"{word!r} is not a flag.{nearest(word, flags)} `hf-nexus train --help` lists all."
