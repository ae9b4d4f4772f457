"""Strict reading of configurations: nothing unknown, doubled or out of range passes silently."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from ..files import nearest

if TYPE_CHECKING:
    from .source import SourceConfig

__all__ = [
    "check_source",
    "known_keys",
    "parse_yaml",
    "require_count",
    "require_flag",
    "require_positive",
    "require_text",
]

BUILTIN_PREFIX = "builtin/"
# Become part of the names of logged metrics, such as `eval_<name>_loss`.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_COUNTS = ("max_tokens", "eval_rows", "tokens")
_POSITIVE = ("weight", "max_epochs")
NOT_TEXT = ("messages_column", "prompt_column", "completion_column")


def require_count(key: str, value: Any, least: int = 1) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key}: {value!r} is not allowed; it must be a whole number of at least {least}.")


def require_positive(key: str, value: Any, hint: str = "") -> None:
    """Raise `ValueError` unless `value` is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key}: {value!r} is not allowed; it must be a finite number above 0.{hint}")


def require_flag(key: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is `True` or `False`."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}: {value!r} is not allowed; it must be true or false.")


def require_text(key: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a string with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: {value!r} is not allowed; it must be a string that is not empty.")


def known_keys(mapping: Any, cls: type, where: str) -> dict[str, Any]:
    """The mapping as a dict, once its keys are found to be fields of the dataclass `cls`, with none missing."""
    fields = [field.name for field in dataclasses.fields(cls)]
    missing = dataclasses.MISSING
    required = [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]
    if not isinstance(mapping, Mapping) or not mapping:
        raise ValueError(f"{where or 'The mixture'}: {mapping!r} is not a mapping with keys {', '.join(required)}.")
    prefix = f"{where}." if where else ""
    for key in mapping:
        if key not in fields:
            raise ValueError(f"{prefix}{key}: unknown key.{nearest(key, fields)} Allowed: {', '.join(fields)}.")
    for key in required:
        if key not in mapping:
            raise ValueError(f"{prefix}{key}: missing, and it has no default.")
    return dict(mapping)


class _Loader(yaml.SafeLoader):
    """Reads `3e-4` and `2e9` as the numbers they are everywhere but in YAML 1.1."""


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    value = float(loader.construct_scalar(node))
    return int(value) if value.is_integer() else value


_Loader.add_implicit_resolver("!number", re.compile(r"[-+]?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_constructor("!number", _construct_number)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """
    Parse YAML strictly: a mapping without duplicate keys, which plain YAML readers drop silently.

    Args:
        text (`str`):
            The document.
        where (`str`):
            Named in errors, for instance the path of the file.

    Raises:
        ValueError: not YAML, not a mapping, or a key that is given twice.

    Example:
        >>> from hf_nexus.mixture.strict import parse_yaml
        >>> parse_yaml("sources: {web: {path: web.jsonl, max_tokens: 2e6}}", "example")
        {'sources': {'web': {'path': 'web.jsonl', 'max_tokens': 2000000}}}
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        for key, line in _duplicates(node):
            raise ValueError(f"{key}: given twice, again in line {line} of {where}. Remove one of the two.")
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a mapping of keys to values, not {type(value).__name__}.")
    return value


def _duplicates(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, path)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            here = f"{path}.{key.value}" if path else str(key.value)
            if here in seen:
                yield here, key.start_mark.line + 1
            seen.add(here)
            yield from _duplicates(value, here)


def check_source(name: Any, source: "SourceConfig", sequence_length: int) -> None:
    key = f"sources.{name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{key}: a name starts with a letter or digit and holds letters, digits, '_', '-', '.' only.")
    if name == "ood":
        raise ValueError(f"{key}: the name 'ood' is reserved for the mean over OOD sources. Name it after its text.")
    for field in dataclasses.fields(source):
        where, value = f"{key}.{field.name}", getattr(source, field.name)
        if value is None and field.default is None:
            continue
        if field.name in _COUNTS:
            require_count(where, value)
        elif field.name in _POSITIVE:
            hint = (
                " To evaluate on a source without training on it, set `role: ood`." if field.name == "weight" else ""
            )
            require_positive(where, value, hint)
        elif field.name == "streaming":
            require_flag(where, value)
        else:
            require_text(where, value)
    if source.max_tokens is not None and source.max_tokens < sequence_length:
        raise ValueError(
            f"{key}.max_tokens: {source.max_tokens} tokens do not fill one row of sequence_length={sequence_length}. "
            "Raise it, or shorten sequence_length."
        )
    _check_combinations(key, name, source)


def _check_combinations(key: str, name: str, source: "SourceConfig") -> None:
    if source.role not in ("train", "ood"):
        raise ValueError(f"{key}.role: {source.role!r} is not allowed; use 'train' or 'ood'.")
    other = [field for field in NOT_TEXT if getattr(source, field)]
    if other and source.text_column != "text":
        raise ValueError(columns_error(name, other[0]))
    if source.messages_column and len(other) > 1:
        raise ValueError(f"{key}.messages_column: it cannot be combined with {other[1]}. Keep one of the two.")
    if (source.prompt_column is None) != (source.completion_column is None):
        missing = "prompt_column" if source.prompt_column is None else "completion_column"
        raise ValueError(f"{key}.{missing}: missing; prompt_column and completion_column go together.")
    if source.eval_rows is not None and source.eval_split is not None:
        raise ValueError(f"{key}.eval_rows: it cannot be combined with eval_split. Keep one of the two.")
    if source.eval_split is not None and source.eval_split == source.split:
        raise ValueError(f"{key}.eval_split: {source.eval_split!r} is the training split. Use eval_rows instead.")
    if source.on_error not in ("raise", "skip"):
        raise ValueError(f"{key}.on_error: {source.on_error!r} is not allowed; use 'raise' or 'skip'.")
    if source.streaming:
        _check_streaming(key, source)
    elif source.on_error == "skip":
        raise ValueError(f"{key}.on_error: only a streaming source skips rows. Add `streaming: true`, or remove it.")
    if source.role == "ood":
        _refuse(key, source, (*_POSITIVE, "eval_rows", "eval_split"), "an OOD source, which is only evaluated")
    if source.path.startswith(BUILTIN_PREFIX):
        _refuse(
            key,
            source,
            ("subset", "revision", "eval_split", *NOT_TEXT),
            "a built-in source, which is one split of plain text",
        )
        if (source.split, source.text_column) != ("train", "text"):
            field = "split" if source.split != "train" else "text_column"
            raise ValueError(f"{key}.{field}: it cannot be chosen for a built-in source. Remove it.")


def _check_streaming(key: str, source: "SourceConfig") -> None:
    if source.role == "ood":
        raise ValueError(f"{key}.streaming: an OOD source is read whole before training. Remove it; set max_tokens.")
    if source.max_tokens is not None:
        raise ValueError(
            f"{key}.max_tokens: a stream is read only as far as training gets, so that nothing is to be bounded "
            "beforehand. Remove it (its weight and max_epochs say how much is trained on), or remove `streaming`."
        )
    if source.max_epochs is not None and source.max_epochs != int(source.max_epochs):
        raise ValueError(
            f"{key}.max_epochs: {source.max_epochs!r} is not allowed for a streaming source, whose size is not known "
            "while it is read; it must be a whole number."
        )
    if "[" in source.split:
        raise ValueError(
            f"{key}.split: {source.split!r} is a slice, and a stream cannot be sliced. Name a whole split, or remove "
            "`streaming`."
        )


def _refuse(key: str, source: "SourceConfig", fields: Iterable[str], what: str) -> None:
    for field in fields:
        if getattr(source, field) is not None:
            raise ValueError(f"{key}.{field}: it has no meaning for {what}. Remove it.")


def columns_error(name: str, other: str) -> str:
    return f"sources.{name}.text_column: it cannot be combined with {other}. Keep the one that holds the documents."
