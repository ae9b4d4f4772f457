"""Strict reading of configurations: YAML without duplicate keys, and dataclasses with type-checked fields."""

import codecs
import dataclasses
import enum
import io
import math
import os
import re
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .files import nearest, shown

__all__ = [
    "Bound",
    "Count",
    "Positive",
    "Text",
    "check",
    "check_fields",
    "dump_yaml",
    "from_text",
    "line_of_key",
    "load_yaml",
    "packaged",
    "parse_data",
    "parse_yaml",
    "read",
    "read_yaml",
]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Bound:
    """
    Range of a number, or of the length of a string, for `Annotated[int, Bound(least=1)]`: inclusive lower, exclusive
    lower and inclusive upper limit.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def holds(self, number: float) -> bool:
        """Whether a number is in the range."""
        low = (self.least is None or number >= self.least) and (self.above is None or number > self.above)
        return low and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        limits = {"of at least": self.least, "above": self.above, "of at most": self.most}
        texts = {
            name: f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
            for name, limit in limits.items()
            if limit is not None
        }
        return " and ".join(f"{name} {text}" for name, text in texts.items())


_LARGEST_INT = 2**63 - 1  # of torch and numpy

Count = Annotated[int, Bound(least=1)]
Positive = Annotated[float, Bound(above=0)]
Text = Annotated[str, Bound(least=1)]


# ---- Types ----


def field_types(cls: type[Any]) -> dict[str, Any]:
    """
    The type of each field that a configuration may set, by name.

    `None` is allowed where it is the default. `choices` and `const` in the metadata of a field, which are argparse's,
    restrict and extend its type.
    """
    hints, found = get_type_hints(cls, include_extras=True), {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if "choices" in field.metadata:
            kind = Literal[tuple(field.metadata["choices"])]
        if "const" in field.metadata:
            kind = kind | Literal[field.metadata["const"]]
        if field.default is None:
            kind = kind | None
        if field.init:
            found[field.name] = kind
    return found


def required_fields(cls: type[Any]) -> list[str]:
    """The fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def options(kind: Any) -> list[tuple[Any, Bound]]:
    """The members of a union, each with its range. Strings next to an enumeration are its values, and left out."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    pairs = [(m.__origin__, m.__metadata__[0]) if get_origin(m) is Annotated else (m, Bound()) for m in members]
    enumerated = any(is_subclass(member, enum.Enum) for member, _ in pairs)
    return [(member, bound) for member, bound in pairs if not (enumerated and member is str)]


def is_subclass(kind: Any, base: type | types.UnionType) -> bool:
    """Whether a type is a class derived from `base`; `list[int]` counts as derived from `list`."""
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, base)


def choices(kind: Any) -> tuple[Any, ...] | None:
    """The values of an enumeration or a `Literal`, `None` for any other type."""
    if is_subclass(kind, enum.Enum):
        return tuple(member.value for member in kind)
    return get_args(kind) if get_origin(kind) is Literal else None


def describe(kind: Any) -> str:
    """The values that a type allows, as part of a sentence."""
    return " or ".join(_describe(*option) for option in options(kind) if option[0] is not type(None)) or "null"


def _describe(kind: Any, bound: Bound) -> str:
    bounded = bound != Bound()
    if (values := choices(kind)) is not None:
        names = [str(value).lower() if isinstance(value, bool) else repr(value) for value in values]
        names[20:] = [f"{len(names) - 20} more"] if len(names) > 20 else []
        return f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(names)
    if dataclasses.is_dataclass(kind):
        return f"a mapping with the keys {', '.join(required_fields(kind))}"  # type: ignore[arg-type]
    if kind is int:
        return f"a whole number {bound}".strip()
    if kind is float:
        return f"a finite number {bound}".strip()
    if kind is str:
        return "a string that is not empty" if bounded else "a string"
    return "true or false" if kind is bool else "a list" if is_subclass(kind, list) else "a mapping"


# ---- Values ----


def check(value: Any, kind: Any, key: str) -> Any:
    """
    Check a value, and convert whole numbers to floats and mappings to dataclasses where its type says so.

    Raises:
        ValueError: the value is not of this type, or out of its range. The message starts with `key`.

    Example:
        >>> from hf_nexus.strict import Positive, check
        >>> check(3, Positive, "learning_rate")
        3.0
    """
    value = value.value if isinstance(value, enum.Enum) else value
    for option, bound in options(kind):
        if _fits(value, option, bound):
            return _convert(value, option, key)
    raise ValueError(f"{key}: {shown(value)} is not allowed; it must be {describe(kind)}.{_hint(value, kind)}")


def _hint(value: Any, kind: Any) -> str:
    texts = [text for option, _ in options(kind) for text in choices(option) or () if isinstance(text, str)]
    if isinstance(value, str):
        return nearest(value, texts)
    if not isinstance(value, int | float) or not (texts or str in dict(options(kind))):
        return ""
    return " Put it in quotes" + (": YAML reads no, yes, off and on as booleans." if isinstance(value, bool) else ".")


def _fits(value: Any, kind: Any, bound: Bound) -> bool:
    """Whether a value has the type and range. Of a container or dataclass, only whether it is one."""
    if kind is Any:
        return True
    if (values := choices(kind)) is not None:
        return any(value == allowed and type(value) is type(allowed) for allowed in values)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and abs(value) <= (_LARGEST_INT if kind is int else sys.float_info.max) and bound.holds(value)
    if kind is str:
        return isinstance(value, str) and bound.holds(len(value.strip()))
    mapped = dataclasses.is_dataclass(kind) or is_subclass(kind, dict)
    return isinstance(value, get_origin(kind) or kind) or (mapped and isinstance(value, Mapping))


def _convert(value: Any, kind: Any, key: str) -> Any:
    arguments = get_args(kind)
    if kind is float:
        return float(value)
    if is_subclass(kind, list) and arguments:
        return [check(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if is_subclass(kind, dict) and arguments:
        return {name: check(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return read(kind, value, key)  # type: ignore[arg-type]
    return value


def from_text(text: str, kind: Any, key: str) -> Any:
    """
    A value of the command line as plain data. Mappings, and lists of mappings, are given as JSON.

    Raises:
        ValueError: the text is not of this type.
    """
    value: Any = text
    kinds = [option for option, _ in options(kind)]
    if text.lstrip().startswith(("{", "[")) and any(is_subclass(option, dict | list) for option in kinds):
        value = parse_data(text, key, "JSON")
    elif bool in kinds and text.lower() in _BOOLEANS and (str not in kinds or text.lower() in ("true", "false")):
        value = _BOOLEANS[text.lower()]
    elif int in kinds or float in kinds:
        with suppress(ValueError):  # refused below
            value = _number(text, whole=int in kinds)
    check(value, kind, key)
    return value


def _number(text: str, whole: bool) -> float:
    """A number of the command line. A whole one may be written as `1e3`."""
    if whole:
        with suppress(ValueError):
            return int(text)
    value: float = _not_rounded_to_zero(float(text), text)
    return int(value) if whole and value.is_integer() else value


def _not_rounded_to_zero(value: Any, text: str) -> Any:
    """
    The value of a text.

    Raises:
        ValueError: the text is a number too close to zero for a float.
    """
    if value == 0 and re.search("[1-9]", re.split("e", text, flags=re.I)[0]):
        raise ValueError(f"{text} is too close to zero")
    return value


_BOOLEANS = dict.fromkeys(("true", "yes", "t", "y", "1"), True) | dict.fromkeys(("false", "no", "f", "n", "0"), False)


# ---- Dataclasses ----


def check_fields(instance: Any, cls: type[Any] | None = None) -> None:
    """
    Check and convert the fields of a dataclass, or only those of its base `cls`, for its `__post_init__`.

    Raises:
        ValueError: a value that is not allowed. The message starts with the field.
    """
    for name, kind in field_types(cls or type(instance)).items():
        object.__setattr__(instance, name, check(getattr(instance, name), kind, name))


def read(cls: type[T], mapping: Any, key: str = "") -> T:
    """
    Build a dataclass from plain data. The class checks its values with [`check_fields`].

    Raises:
        ValueError: an unknown or missing key, or an error of the class. The message starts with the path of the key.
    """
    names, required = list(field_types(cls)), required_fields(cls)
    if not isinstance(mapping, Mapping) or (required and not mapping):
        raise ValueError(f"{key or cls.__name__}: {shown(mapping)} is not allowed; it must be {describe(cls)}.")
    prefix = f"{key}." if key else ""
    for name in mapping:
        if name not in names:
            hint = nearest(name, names) or f" Allowed: {', '.join(names)}."
            raise ValueError(f"{prefix}{name}: unknown key.{hint}")
    for name in required:
        if name not in mapping:
            raise ValueError(f"{prefix}{name}: missing, and it has no default.")
    try:
        return cls(**mapping)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


# ---- YAML ----


def packaged(room: str) -> dict[str, Traversable]:
    """The YAML files in the folder `configs` of a room of the package, by name."""
    files = resources.files(__package__).joinpath(room, "configs").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=str) if file.name.endswith(".yaml")}


def load_yaml(name_or_path: str, room: str, kind: str) -> dict[str, Any]:
    """
    Parse a YAML file of a room of the package by name, or another one by path.

    Raises:
        ValueError: there is no such file (of this `kind`), or as for [`parse_yaml`].
    """
    files = packaged(room)
    if name_or_path not in files and not os.path.isfile(name_or_path):
        raise ValueError(
            f"There is no {kind} {name_or_path!r}.{nearest(name_or_path, files)} Use one of {', '.join(files)}, or "
            "the path of a YAML file."
        )
    if name_or_path in files:
        return parse_yaml(files[name_or_path].read_text(encoding="utf-8"), name_or_path)
    return read_yaml(name_or_path)


# Limits of a file whose aliases are expanded: characters and values, and nested levels.
_LARGEST, _DEEPEST = 1_000_000, 20
_TAG = "tag:yaml.org,2002:"
_TAGS = {
    yaml.ScalarNode: {"!number", *(f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str"))},
    yaml.SequenceNode: {f"{_TAG}seq"},
    yaml.MappingNode: {f"{_TAG}map"},
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Reads `3e-4` and `2e9` as numbers, which YAML 1.1 does not, and dates as text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    value = float(loader.construct_scalar(node))
    return int(value) if value.is_integer() and abs(value) <= _LARGEST_INT else value


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Quotes texts that `_Loader` reads as numbers, such as the commit `1234e56`."""


_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+$")
for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver("!number", _NUMBER, list("-+0123456789"))
_Loader.add_constructor("!number", _construct_number)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    Parse a YAML file.

    Raises:
        ValueError: not a text file, or as for [`parse_yaml`].
    """
    try:
        text = _text_of(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file. Give a YAML file.") from error
    return parse_yaml(text, str(path))


def _text_of(path: str | Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark, as `>` of Windows PowerShell writes it."""
    with open(path, "rb") as file:
        marked = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return io.TextIOWrapper(file, "utf-16" if marked else "utf-8").read(_LARGEST + 1)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """
    Parse YAML that holds a mapping of plain data, without duplicate keys, which plain YAML readers drop silently.

    Raises:
        ValueError: not YAML, not a mapping, a duplicate key, a value that is not plain data, or too much data. The
            message names `where`, such as the file.

    Example:
        >>> from hf_nexus.strict import parse_yaml
        >>> parse_yaml("sources: {web: {path: web.jsonl, max_tokens: 2e6}}", "example")
        {'sources': {'web': {'path': 'web.jsonl', 'max_tokens': 2000000}}}
    """
    value = parse_data(text, where)
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds {shown(value)}"
        raise ValueError(f"{where} {found}. It must hold a mapping of keys to values.")
    return value


def dump_yaml(value: Any, one_line: bool = False) -> str:
    """Plain data as YAML, with the keys in their order and all characters as they are."""
    style: dict[str, Any] = {"default_flow_style": True, "width": 10**9} if one_line else {}
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def parse_data(text: str, where: str, language: str = "YAML") -> Any:
    """Parse YAML, or JSON, which YAML contains, as [`parse_yaml`], into any plain data."""
    try:
        loader = _Loader(text[: _LARGEST + 1])
        node = loader.get_single_node()
    except RecursionError as error:
        raise _too_large(where) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an escape without a character
        # Only the problem: the whole text shows lines, which may hold a token.
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        refusal = ValueError(f"{where} is not valid {language}{line}: {problem:.200}.")
        raise (_pointing(refusal, where, mark) if mark else refusal) from error
    if node is None:
        return None
    _check_node(loader, node, (), where, len(text))
    return loader.construct_document(node)


def _pointing(error: ValueError, where: str, mark: yaml.Mark) -> ValueError:
    """The error with a note that shows the line."""
    if text := _excerpt(where, mark):
        error.add_note(text)
    return error


def _excerpt(where: str, mark: yaml.Mark) -> str:
    """A line of a file with a caret, and where it is. Empty for a line that may hold a token."""
    snippet = mark.get_snippet()
    if not snippet or re.search(r"hf_|token\b", snippet):
        return ""
    return f"  --> {where}:{mark.line + 1}:{mark.column + 1}\n{snippet}"


def line_of_key(path: str, key: str) -> str:
    """
    The line of a YAML file with a key, such as `training.max_steps` or `data.stages[0].until`, with a caret. If the
    file lacks its last parts, the line is that of the first ones, and the first may be missing in the file or in the
    key. Empty if there is no such line.
    """
    try:
        root = _Loader(_text_of(path)).get_single_node()
    except (yaml.YAMLError, OSError, ValueError, RecursionError):
        return ""
    parts = re.findall(r"[^.\[\]]+", key)
    marks = max(_marks(root, parts), _marks(root, ["training", *parts])[1:], _marks(root, parts[1:]), key=len)
    return _excerpt(path, marks[-1]) if marks else ""


def _marks(node: Any, names: list[str]) -> list[yaml.Mark]:
    """Where each key or item of a path starts in a tree, up to the first that is missing."""
    marks: list[yaml.Mark] = []
    for name in names:
        if isinstance(node, yaml.SequenceNode):
            pairs = {str(i): (item, item) for i, item in enumerate(node.value)}
        else:
            pairs = {pair[0].value: pair for pair in node.value} if isinstance(node, yaml.MappingNode) else {}
        if name not in pairs:
            break
        start, node = pairs[name]
        marks.append(start.start_mark)
    return marks


def _too_large(where: str) -> ValueError:
    return ValueError(
        f"{where} holds more than {_LARGEST:,} characters or {_DEEPEST} nested levels. Remove aliases (*name) that "
        "repeat each other or refer to themselves."
    )


def _check_node(loader: _Loader, node: Any, path: tuple[str, ...], where: str, size: int) -> int:
    """
    Refuse duplicate keys, what is not plain data, and aliases that expand to too much, before they are expanded.

    Returns `size` with that of the node added.
    """

    def refused(problem: str, node: yaml.Node = node, *more: str) -> ValueError:
        key = ".".join((*path, *more)).replace(".[", "[")
        line = f"line {node.start_mark.line + 1} of {where}"
        return _pointing(ValueError(f"{key or where}: {problem.format(line=line)}"), where, node.start_mark)

    size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
    if size > _LARGEST or len(path) > _DEEPEST:
        raise _too_large(where)
    if node.tag not in _TAGS[type(node)]:
        raise refused("the tag in {line} is not allowed. Give plain data.")
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            size = _check_node(loader, item, (*path, f"[{i}]"), where, size)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, item in node.value:
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                raise refused("a key in {line} is not a string. Put it in quotes.", key)
            if key.value in seen:
                raise refused("given twice, again in {line}. Remove one of the two.", key, key.value)
            seen.add(key.value)
            size = _check_node(loader, item, (*path, key.value), where, size + len(key.value))
            merged = item.value if isinstance(item, yaml.SequenceNode) else [item]
            if key.tag == f"{_TAG}merge" and not all(isinstance(part, yaml.MappingNode) for part in merged):
                raise refused("<< in {line} must name mappings.", key)
    else:
        try:
            value = loader.construct_object(node)
            if isinstance(value, float | int):
                _not_rounded_to_zero(value, node.value)
        except (ArithmeticError, LookupError, ValueError):  # such as `!!int ''`, or too many digits for Python
            value = math.inf
        if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            raise refused("the value in {line} is not a finite number, rounds to zero, or is not of its tag.")
        if not isinstance(value, str) and re.fullmatch(r"[-+]?0[0-9_]+|[-+]?[0-9].*:.*", node.value):
            given = f"{node.value:.40} in {{line}} is {value!s:.40} in YAML"
            raise refused(f"{given}. Write that number, or put it in quotes.")
    return size
