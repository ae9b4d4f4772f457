"""Strict reading: values are checked by type, and YAML has no duplicate keys."""

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from hf_nexus.schema import documented, help_of, json_schema
from hf_nexus.strict import Bound, Count, Positive, Text, check, check_fields, from_text, parse_yaml, read


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@documented
@dataclass
class Inner:
    """
    An inner part.

    Args:
        size (`int`):
            Its size, 100% of it. See [`Outer`].
    """

    size: Count

    def __post_init__(self) -> None:
        check_fields(self)


@documented
@dataclass
class Outer:
    """
    A whole.

    Args:
        inner (`dict[str, Inner]`):
            Inner parts by name.
        rate (`float`, *optional*, defaults to 1.0), share (`float`, *optional*):
            Two numbers.
    """

    inner: dict[str, Inner]
    rate: Positive = 1.0
    share: Annotated[float, Bound(least=0, most=1)] | None = None
    names: list[Text] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.share == self.rate:
            raise ValueError("share: it must differ from rate.")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (True, bool, True),
        (None, int | None, None),
        (3, int | str, 3),
        ("red", Color | str, "red"),
        (Color.RED, Color, "red"),
        ("a", Literal["a", False], "a"),
        ([1, 2], list[float], [1.0, 2.0]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": object}, dict, {"a": object}),
        ({"size": 1}, Inner, Inner(1)),
        ({"a": {"size": 1}}, dict[str, Inner], {"a": Inner(1)}),
        ("anything", Any, "anything"),
    ],
)
def test_a_value_of_the_type_is_converted(value, kind, expected):
    found = check(value, kind, "key")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (True, int, "a whole number"),
        (1.0, int, "a whole number"),
        ("1", float, "a number"),
        (0, Count, "a whole number of at least 1"),
        (float("nan"), Positive, "a finite number above 0"),
        (2, Annotated[float, Bound(above=0, most=1)], "above 0 and of at most 1"),
        (" ", Text, "a string that is not empty"),
        (1, bool, "true or false"),
        (None, int, "a whole number"),
        (3, str, r"a string\. Put it in quotes\."),
        (False, Literal["no", "steps"], "'no' or 'steps'. Put it in quotes: YAML reads no"),
        ("rad", Color | str, "'red' or 'blue'. Did you mean 'red'"),
        (0, Literal[False] | None, "false"),
        ("a", list[str] | dict, "a list or a mapping"),
        (3, Inner, "a mapping with the keys size"),
    ],
)
def test_a_value_of_another_type_is_refused(value, kind, words):
    with pytest.raises(ValueError, match=rf"^key: .* is not allowed; it must be .*{words}"):
        check(value, kind, "key")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"inner": {"a": {"size": 0}}}, r"^top\.inner\.a\.size: 0 is not allowed"),
        ({"inner": {"a": {"sise": 1}}}, r"^top\.inner\.a\.sise: unknown key\. Did you mean 'size'\?"),
        ({"inner": {}, "names": ["a", ""]}, r"^top\.names\[1\]: '' is not allowed"),
        ({"inner": {}, "share": 1}, r"^top\.share: it must differ"),
        ({"inner": {}, "zzz": 1}, r"^top\.zzz: unknown key\. Allowed: inner, rate"),
        ({"rate": 1}, r"^top\.inner: missing"),
        ({}, r"^top: \{\} is not allowed; it must be a mapping with the keys inner"),
    ],
)
def test_an_error_starts_with_the_path_of_its_key(mapping, message):
    with pytest.raises(ValueError, match=message):
        read(Outer, mapping, "top")


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("3", str, "3"),
        ("no", bool, False),
        ("no", bool | str, "no"),
        ("True", bool | str, True),
        ("[1, 2]", str, "[1, 2]"),
        ("[1, 2]", list | str, [1, 2]),
        ('{"a": 1}', dict | str | None, {"a": 1}),
        ("file.json", dict | str | None, "file.json"),
    ],
)
def test_text_of_the_command_line_becomes_data(text, kind, expected):
    found = from_text(text, kind, "--key")
    assert found == expected and type(found) is type(expected)


def test_help_texts_come_from_the_docstring():
    assert help_of(Outer) == {"inner": "Inner parts by name.", "rate": "Two numbers.", "share": "Two numbers."}
    assert help_of(Inner) == {"size": "Its size, 100% of it. See `Outer`."}
    definitions: dict[str, Any] = {}
    json_schema(Outer, definitions)
    assert definitions["Outer"]["required"] == ["inner"] and not definitions["Outer"]["additionalProperties"]
    properties = definitions["Outer"]["properties"]
    assert properties["rate"] == {
        "description": "Two numbers.",
        "default": 1.0,
        "type": ["number"],
        "exclusiveMinimum": 0,
    }
    assert properties["inner"]["additionalProperties"] == {"$ref": "#/definitions/Inner"}
    assert properties["share"]["type"] == ["number", "null"]


# ---- YAML ----


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("sequence_length: 4\nsources:\n  web: {path: a}\nsequence_length: 8\n", "sequence_length", 4),
        ("sources:\n  web:\n    path: a\n    weight: 1\n    weight: 2\n", "sources.web.weight", 5),
        ("sources:\n  web: {path: a}\n  web: {path: b}\n", "sources.web", 3),
    ],
)
def test_a_key_given_twice_is_refused_with_its_path_and_line(text: str, key: str, line: int) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: given twice, again in line {line} of mixture\.yaml"):
        parse_yaml(text, "mixture.yaml")


def test_the_same_key_in_different_mappings_is_no_duplicate() -> None:
    assert parse_yaml("a: {x: 1}\nb: [{x: 1}, {x: 2}]", "f") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 2}]}


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n"])
def test_what_is_no_mapping_is_refused_naming_the_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"mixture\.yaml"):
        parse_yaml(text, "mixture.yaml")


def test_numbers_in_scientific_notation_are_numbers() -> None:
    values = parse_yaml("a: 2e9\nb: 3e-4\nc: 1.5e3\nd: 2_000\ne: e9\nf: '2e9'", "f")
    assert values == {"a": 2_000_000_000, "b": 3e-4, "c": 1500, "d": 2000, "e": "e9", "f": "2e9"}
    assert isinstance(values["a"], int)
