"""Configurations: what is right is read, what is wrong is refused by an error that names the key and the way out."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nexus.mixture import MixtureConfig, SourceConfig
from hf_nexus.mixture.strict import parse_yaml

VALID: dict[str, Any] = {
    "sequence_length": 16,
    "num_proc": 2,
    "sources": {
        "web": {"path": "org/web", "subset": "en", "revision": "main", "weight": 3, "eval_rows": 5, "tokens": 1000},
        "code": {"path": "code/*.jsonl", "text_column": "content", "weight": 1.0, "max_epochs": 2.5},
        "chat": {"path": "chat.parquet", "messages_column": "messages", "weight": 0.5, "eval_split": "test"},
        "law": {"path": "builtin/law", "role": "ood", "max_tokens": 100},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The valid configuration with one key, such as `sources.web.weight`, set to a value."""
    mapping = copy.deepcopy(VALID)
    *parents, last = path.split(".")
    place = mapping
    for key in parents:
        place = place[key]
    place[last] = value
    return mapping


def test_yaml_is_read_into_the_same_configuration_as_plain_data(tmp_path: Path) -> None:
    text = """
sequence_length: 16
num_proc: 2
sources:
  web: {path: org/web, subset: en, revision: main, weight: 3, eval_rows: 5, tokens: 1e3}
  code: {path: code/*.jsonl, text_column: content, weight: 1.0, max_epochs: 2.5}
  chat: {path: chat.parquet, messages_column: messages, weight: 5e-1, eval_split: test}
  law: {path: builtin/law, role: ood, max_tokens: 100}
"""
    (tmp_path / "mixture.yaml").write_text(text)
    config = MixtureConfig.from_yaml(tmp_path / "mixture.yaml")
    assert config == MixtureConfig.from_dict(VALID)
    assert list(config.train_sources) == ["web", "code", "chat"]
    assert list(config.ood_sources) == ["law"]
    assert config.sources["web"].known_tokens == 1000 and config.sources["code"].known_tokens is None


def test_known_tokens_stop_at_max_tokens() -> None:
    assert SourceConfig(path="x", tokens=1000, max_tokens=100).known_tokens == 100
    assert SourceConfig(path="x", max_tokens=100).known_tokens == 100


@pytest.mark.parametrize(
    ("path", "value", "fix"),
    [
        ("temprature", 1.0, "Did you mean 'temperature'"),
        ("sources.web.wieght", 1.0, "Did you mean 'weight'"),
        ("sources.web", {}, "keys path"),
        ("sources.web", None, "keys path"),
        ("sources.web", "org/web", "keys path"),
        ("sources.web", {"weight": 1.0}, "path: missing"),
        ("sources", {}, "Give one or more"),
        ("sources.ood", {"path": "x", "role": "ood"}, "reserved"),
        ("sources.a/b", {"path": "x", "role": "ood"}, "letter or digit"),
        ("sequence_length", 1, "at least 2"),
        ("sequence_length", "16", "whole number"),
        ("temperature", 0, "above 0"),
        ("temperature", 2.0, "Remove it, or the weights"),
        ("num_proc", 0, "at least 1"),
        ("sources.web.path", " ", "not empty"),
        ("sources.web.weight", -1.0, "above 0"),
        ("sources.web.weight", 0, "role: ood"),
        ("sources.web.weight", float("nan"), "finite"),
        ("sources.web.weight", "1", "above 0"),
        ("sources.web.weight", True, "above 0"),
        ("sources.web.weight", None, "Give it to all"),
        ("sources.web.max_epochs", float("inf"), "finite"),
        ("sources.web.max_tokens", 2.5, "whole number"),
        ("sources.web.max_tokens", 15, "shorten sequence_length"),
        ("sources.web.eval_rows", 0, "at least 1"),
        ("sources.web.eval_split", "train", "Keep one of the two"),
        ("sources.chat.eval_split", "train", "Use eval_rows"),
        ("sources.web.split", None, "must be a string"),
        ("sources.web.license", "", "must be a string"),
        ("sources.web.role", "test", "'train' or 'ood'"),
        ("sources.chat.text_column", "content", "Keep the one"),
        ("sources.chat.text_column", "text", "Keep the one"),
        ("sources.chat.prompt_column", "prompt", "Keep one of the two"),
        ("sources.web.prompt_column", "prompt", "completion_column: missing"),
        ("sources.law.weight", 1.0, "Remove it"),
        ("sources.law.eval_rows", 1, "Remove it"),
        ("sources.law.revision", "main", "Remove it"),
        ("sources.law.split", "test", "Remove it"),
        ("sources.law.text_column", "content", "Remove it"),
    ],
)
def test_a_wrong_value_is_refused_naming_its_key_and_the_fix(path: str, value: Any, fix: str) -> None:
    with pytest.raises(ValueError) as error:
        MixtureConfig.from_dict(changed(path, value))
    # Where two keys contradict each other, the error may be at the other one.
    other = {
        "sources.web.eval_split": "sources.web.eval_rows",
        "sources.chat.prompt_column": "sources.chat.messages_column",
        "sources.web.prompt_column": "sources.web.completion_column",
    }
    assert str(error.value).startswith((f"{other.get(path, path)}:", f"{path}.path: missing"))
    assert fix in str(error.value)


def test_contradictions_are_refused_without_yaml_too() -> None:
    source = SourceConfig(path="chat.jsonl", text_column="content", messages_column="messages")
    with pytest.raises(ValueError, match=r"sources\.chat\.text_column"):
        MixtureConfig({"chat": source}, sequence_length=8)
    with pytest.raises(ValueError, match=r"sources\.chat: .* from_dict"):
        MixtureConfig({"chat": {"path": "chat.jsonl"}}, sequence_length=8)  # type: ignore[dict-item]


def test_a_mixture_needs_a_source_to_train_on() -> None:
    with pytest.raises(ValueError, match="none to train on"):
        MixtureConfig({"law": SourceConfig(path="law", role="ood")}, sequence_length=8)


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


def sized(temperature: float, **sources: float | None) -> MixtureConfig:
    return MixtureConfig({n: SourceConfig(path=n, weight=w) for n, w in sources.items()}, 8, temperature)


def test_given_weights_are_scaled_to_shares_whatever_the_sizes() -> None:
    assert sized(1.0, a=3, b=1).weights({"a": 1, "b": 99}) == {"a": 0.75, "b": 0.25}
    assert sized(1.0, a=3, b=1).weights({}) == {"a": 0.75, "b": 0.25}


sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 10**12), min_size=2)


@given(sizes)
def test_without_weights_shares_follow_sizes(sizes: dict[str, int]) -> None:
    shares = sized(1.0, **dict.fromkeys(sizes)).weights(sizes)
    assert shares == pytest.approx({name: size / sum(sizes.values()) for name, size in sizes.items()})


@given(sizes, st.floats(1.1, 10))
def test_a_temperature_above_one_evens_shares_out_and_keeps_their_order(sizes: dict[str, int], t: float) -> None:
    plain = sized(1.0, **dict.fromkeys(sizes)).weights(sizes)
    evened = sized(t, **dict.fromkeys(sizes)).weights(sizes)
    assert sum(evened.values()) == pytest.approx(1)
    for a in sizes:
        for b in sizes:
            if sizes[a] > sizes[b]:
                assert 1 - 1e-12 <= evened[a] / evened[b] <= plain[a] / plain[b] * (1 + 1e-12)
                assert evened[a] / evened[b] == pytest.approx((sizes[a] / sizes[b]) ** (1 / t))


def test_weights_need_sizes_where_none_are_given() -> None:
    with pytest.raises(ValueError, match=r"sources\.b\.weight.*sources\.b\.tokens"):
        sized(1.0, a=None, b=None).weights({"a": 10})
