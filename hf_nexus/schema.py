"""Dataclasses described from their docstrings: help texts and a JSON schema for editors."""

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args

from .strict import Bound, choices, field_types, is_subclass, options, required_fields

__all__ = ["documented", "help_of", "json_schema", "kind_of"]

T = TypeVar("T")

# An entry of the section `Args:`, whose header names one field or several, and its indented text.
_ENTRY = re.compile(r"^    (\w+ \(`[^:]*?\)):\n((?:        .*\n|\n)+)", re.MULTILINE)
_BARE = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}
_KINDS: dict[str, Any] = {name: kind for kind, name in _BARE.items()} | {"array": list, "object": dict}


def documented(cls: type[T]) -> type[T]:
    """Give the fields of a dataclass the texts of its docstring as `help` in their metadata, as argparse reads it."""
    found: dict[str, str] = {}
    for header, text in _ENTRY.findall(inspect.cleandoc(cls.__doc__ or "") + "\n"):
        text = re.sub(r"\[`~?([^`]+)`\]", r"`\1`", " ".join(text.split()))  # links are for the documentation only
        found |= dict.fromkeys(re.findall(r"(\w+) \(`", header), text)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in found:
            text = found[field.name].replace("%", "%%")
            field.metadata = types.MappingProxyType({**field.metadata, "help": text})
    return cls


def help_of(cls: type) -> dict[str, str]:
    """The help text of each field, by name. A field without its own text has that of the base class."""
    texts: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        texts |= {field.name: field.metadata["help"] for field in dataclasses.fields(base) if "help" in field.metadata}
    return {name: text.replace("%%", "%") for name, text in texts.items()}


def json_schema(cls: type, definitions: dict[str, Any]) -> dict[str, str]:
    """A reference to the JSON schema (draft 7) of a dataclass, which is added to `definitions` with those it needs."""
    if cls.__name__ not in definitions:
        found: dict[str, Any] = {
            "description": " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())
        }
        definitions[cls.__name__] = found  # first, since a type may contain itself
        texts, defaults = help_of(cls), {field.name: field.default for field in dataclasses.fields(cls)}
        found["type"], found["properties"], found["additionalProperties"] = "object", {}, False
        for name, kind in field_types(cls).items():
            found["properties"][name] = {"description": texts[name]} if name in texts else {}
            if isinstance(defaults[name], bool | int | float | str):
                found["properties"][name]["default"] = defaults[name]
            found["properties"][name] |= _schema(kind, definitions)
        found["required"] = required_fields(cls)
    return {"$ref": f"#/definitions/{cls.__name__}"}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    members = [_member(option, bound, definitions) for option, bound in options(kind)]
    scalars = [member for member in members if isinstance(member.get("type"), list)]
    if scalars:
        names = [name for member in scalars for name in member["type"]]
        merged = {key: value for member in scalars for key, value in member.items()} | {"type": names}
        members = [merged, *(member for member in members if member not in scalars)]
    return members[0] if len(members) == 1 else {"anyOf": members}


def _member(kind: Any, bound: Bound, definitions: dict[str, Any]) -> dict[str, Any]:
    """One option. The type of a scalar is a list, whose limits apply to this type only."""
    arguments = get_args(kind)
    if kind is Any:
        return {}
    if (values := choices(kind)) is not None:
        return {"enum": list(values)}
    if dataclasses.is_dataclass(kind):
        return json_schema(kind, definitions)  # type: ignore[arg-type]
    if is_subclass(kind, list):
        return {"type": "array"} | ({"items": _schema(arguments[0], definitions)} if arguments else {})
    if is_subclass(kind, dict):
        values_of = {"additionalProperties": _schema(arguments[1], definitions)} if arguments else {}
        return {"type": "object", **values_of}
    if kind is str:
        return {"type": ["string"]} | ({"minLength": 1} if bound.least else {})
    limits = {"minimum": bound.least, "exclusiveMinimum": bound.above, "maximum": bound.most}
    found = {"type": [_BARE[kind]]} | {name: limit for name, limit in limits.items() if limit is not None}
    # 1_000 is a number in YAML 1.1, which this package reads, and a string in YAML 1.2, which editors read.
    return found | {"type": ["integer", "string"], "pattern": "^[0-9]+(_[0-9]+)+$"} if kind is int else found


def kind_of(schema: Mapping[str, Any], exact: bool = True) -> Any:
    """
    The type that the schema of a field describes, for [`~hf_nexus.strict.check`]. The values of mappings are
    `Any`, and without `exact` also those of an enumeration.

    Example:
        >>> from hf_nexus.schema import kind_of
        >>> from hf_nexus.strict import describe
        >>> describe(kind_of({"type": ["number", "null"], "minimum": 0}))
        'a finite number of at least 0'
    """
    kinds: list[Any] = []
    for member in schema.get("anyOf", [schema]):
        if "enum" in member:
            kinds.append(Literal[tuple(member["enum"])] if exact else Any)
        elif "type" not in member:
            kinds.append(dict if "$ref" in member else Any)
        limits = [member.get(key) for key in ("minimum", "exclusiveMinimum", "maximum")]
        names = [member["type"]] if isinstance(member.get("type"), str) else list(member.get("type", ()))
        if "pattern" in member:
            names.remove("string")  # 1_000
        for name in names:
            if name == "array" and "items" in member:
                kinds.append(list[kind_of(member["items"], exact)])  # type: ignore[misc]
            elif name in ("integer", "number"):
                kinds.append(Annotated[_KINDS[name], Bound(*limits)])
            else:
                least = name == "string" and "minLength" in member
                kinds.append(Annotated[str, Bound(least=1)] if least else _KINDS[name])
    return Union[tuple(kinds)]  # noqa: UP007  # the members are known at run time only
