"""Strict reading: values are checked by type, and YAML has no duplicate keys."""

import codecs
import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from hf_nexus.schema import documented, help_of, json_schema
from hf_nexus.strict import (
    Bound,
    Count,
    Positive,
    Text,
    check,
    check_fields,
    dump_yaml,
    from_text,
    line_of_key,
    parse_yaml,
    read,
    read_yaml,
)


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
        (2**63, int, "a whole number"),
        (float("inf"), float, "a finite number"),
        (10**400, float, "a finite number"),
        ("1", float, "a finite number"),
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
        ("1e3", int, 1000),
        ("9007199254740993", int, 2**53 + 1),
        ("1e3", float, 1000.0),
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


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment", "is empty"),
        ("- a\n- b\n", "holds ['a', 'b']"),
        ("plain text", "holds 'plain text'"),
        ("a: [1\n", "not valid YAML, line 2: expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \0", "unacceptable character"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("[" * 2000, "nested levels"),
        ("a: " + "[" * 30 + "]" * 30, "nested levels"),
        ("a: &a [*a]", "nested levels"),
        ("a: &a {b: *a}", "nested levels"),
        ("a: &a [*a, *a]", "nested levels"),
        ("a: &a {<<: *a, b: 1}", "nested levels"),
        (LAUGHS, "repeat each other"),
        (MERGES, "repeat each other"),
        ("a: &a " + "x" * 10_000 + "\nb: [" + "*a, " * 200 + "]", "characters"),
        ("a: 1 #" + " " * 1_000_000, "1,000,000 characters"),
        ("<<: 3", "line 1 of mixture.yaml must name mappings"),
        ("a: {1: b}", "a: a key in line 1 of mixture.yaml is not a string"),
        ("a: {on: b}", "a: a key in line 1 of mixture.yaml is not a string"),
        ("? [a]\n: b", "a key in line 1 of mixture.yaml is not a string"),
        ("a:\n- !!python/object:os.system x", "a[0]: the tag in line 2"),
        ("a: !!set {b}", "a: the tag in line 1"),
        ("a: !!binary eA==", "a: the tag in line 1"),
        ("a: !!map b", "a: the tag in line 1"),
        *((f"a: {text}", f"a: {text} in line 1 of mixture.yaml is") for text in ("010", "-007", "1:30", "1:30.5")),
        ("a: 0" + "1" * 300, "in line 1 of mixture.yaml is"),
        *((f"a: {value}", "a: the value in line 1") for value in ("!!float ''", "!!int x", "!!bool 7")),
        *((f"a: {value}", "a: the value in line 1") for value in (".inf", "-.inf", ".nan", "1e400", "9" * 400)),
        *((f"a: {value}", "rounds to zero") for value in ("1e-400", "-0.1E-400", f"0.{'0' * 400}1")),
        *((f"a: {value}", "a: the value in line 1") for value in ("9" * 5000, "0x" + "f" * 5000)),
        *((f"a: {value}", "a: the value in line 1") for value in ("9" + ":59" * 200, "9" + ":59" * 200 + ".5")),
    ],
    ids=lambda text: repr(text)[:30],
)
def test_what_is_no_plain_mapping_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_yaml(text, "mixture.yaml")
    message = str(error.value)
    assert "mixture.yaml" in message and words in message and "\n" not in message and len(message) < 300


def test_an_error_of_the_parser_shows_no_line_of_the_file() -> None:
    with pytest.raises(ValueError) as error:
        parse_yaml('training: {hub_token: "hf_SECRET', "mixture.yaml")
    assert "SECRET" not in str(error.value)


def test_aliases_and_merges_are_read() -> None:
    text = "base: &base {path: a, weight: 1}\nall: [*base, {<<: *base, weight: 2}]"
    assert parse_yaml(text, "f")["all"] == [{"path": "a", "weight": 1}, {"path": "a", "weight": 2}]


def test_numbers_are_read_as_they_look() -> None:
    assert parse_yaml("a: [0, 0.5, 1_000, 0x1F, 0e1, '010', 2:a]", "f")["a"] == [0, 0.5, 1000, 31, 0, "010", "2:a"]


def test_dates_are_strings() -> None:
    assert parse_yaml("revision: 2024-01-31", "f") == {"revision": "2024-01-31"}


def test_a_file_that_is_no_text_is_refused(tmp_path) -> None:
    (tmp_path / "model.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"model\.bin is not a text file\. Give a YAML file\."):
        read_yaml(tmp_path / "model.bin")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_file_of_any_shell_is_read(tmp_path, encoding) -> None:
    text = "training:\n  output_dir: żółw\n"
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "mine.yaml").write_bytes(mark + text.encode(encoding))
    assert read_yaml(tmp_path / "mine.yaml") == {"training": {"output_dir": "żółw"}}
    assert "mine.yaml:2:3\n" in line_of_key(str(tmp_path / "mine.yaml"), "training.output_dir")


def test_an_integer_of_too_many_digits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^key: an integer of too many digits is not allowed"):
        check(10**5000, Positive, "key")


@pytest.mark.parametrize("text", ["1e-400", "-1e-999"])
def test_a_number_that_rounds_to_zero_is_refused(text):
    with pytest.raises(ValueError, match=f"'{text}' is not allowed"):
        from_text(text, float, "--inner_lr")
    assert from_text("0e5", float, "--inner_lr") == parse_yaml("a: 0.0e-5", "b")["a"] == 0


@pytest.mark.parametrize("text", ["{oops", "[" * 500, '{"a": 1, "a": 2}', '{"a": 1e999}'])
def test_odd_json_of_the_command_line_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--key"):
        from_text(text, dict | list, "--key")


def test_numbers_in_scientific_notation_are_numbers() -> None:
    texts = {"commit": "1234e56", "subset": "1e5", "day": "2026-01-02", "rate": 3e-5, "count": 10**20}
    assert parse_yaml(dump_yaml(texts), "f") == texts
    values = parse_yaml("a: 2e9\nb: 3e-4\nc: 1.5e3\nd: 2_000\ne: e9\nf: '2e9'", "f")
    assert values == {"a": 2_000_000_000, "b": 3e-4, "c": 1500, "d": 2000, "e": "e9", "f": "2e9"}
    assert isinstance(values["a"], int)
