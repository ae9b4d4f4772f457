"""Mixture configurations: valid ones are read, and errors name the key and a fix."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nexus.mixture import MixtureConfig, SourceConfig
from hf_nexus.mixture.config import MAP_STYLE_LIMIT

VALID: dict[str, Any] = {
    "sequence_length": 16,
    "num_proc": 2,
    "sources": {
        "web": {"path": "org/web", "subset": "en", "revision": "main", "weight": 3, "eval_rows": 5, "tokens": 1000},
        "code": {"path": "code/*.jsonl", "text_column": "content", "weight": 1.0, "max_epochs": 2.5},
        "chat": {"path": "chat.parquet", "messages_column": "messages", "weight": 0.5, "eval_split": "test"},
        "log": {"path": "org/log", "streaming": True, "on_error": "skip", "max_epochs": 2.0, "weight": 1},
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
  log: {path: org/log, streaming: true, on_error: skip, max_epochs: 2, weight: 1}
  law: {path: builtin/law, role: ood, max_tokens: 100}
"""
    (tmp_path / "mixture.yaml").write_text(text)
    config = MixtureConfig.from_yaml(tmp_path / "mixture.yaml")
    assert config == MixtureConfig.from_dict(VALID)
    assert list(config.train_sources) == ["web", "code", "chat", "log"]
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
        ("sources.macro", {"path": "x"}, "reserved"),
        (
            "sources",
            {"train": {"path": "a"}, "dev": {"path": "b"}},
            "Set `role: ood` for those held out, or name their split as `eval_split` of 'train'",
        ),
        ("sources.a/b", {"path": "x", "role": "ood"}, "letter or digit"),
        ("sequence_length", 1, "at least 2"),
        ("sequence_length", "16", "whole number"),
        ("temperature", 0, "at least 0.1"),
        ("temperature", 2.0, "Remove it, or the weights"),
        ("num_proc", 0, "at least 1"),
        ("sources.web.path", " ", "not empty"),
        ("sources.web.weight", -1.0, "above 0"),
        ("sources.web.weight", 0, "role: ood"),
        ("sources.web.weight", float("nan"), "finite"),
        ("sources.web.weight", "1", "above 0"),
        ("sources.web.weight", True, "above 0"),
        ("sources.web.weight", None, "Give a weight to all"),
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
        ("sources.chat.prompt_column", "prompt", "Keep the one"),
        ("sources.web.prompt_column", "prompt", "completion_column: missing"),
        ("sources.chat.loss_on", "completion", "needs a prompt_column"),
        ("sources.web.loss_on", "assistant", "needs a messages_column"),
        ("sources.web.loss_on", "prompt", "'all', 'completion', 'assistant'"),
        ("sources.web.packed", True, "Name their tokens_column"),
        ("sources.code.tokens_column", "input_ids", "Keep the one"),
        ("sources.law.tokens_column", "input_ids", "Remove it"),
        ("sources.law.weight", 1.0, "Remove it"),
        ("sources.law.streaming", True, "set max_tokens"),
        ("sources.web.streaming", "yes", "true or false"),
        ("sources.web.on_error", "ignore", "'raise' or 'skip'"),
        ("sources.web.on_error", "skip", "Add `streaming: true`"),
        ("sources.log.max_tokens", 100, "weight and max_epochs"),
        ("sources.log.max_epochs", 2.5, "whole number"),
        ("sources.log.split", "train[:10%]", "Name a whole split"),
        ("buffer_size", 1, "at least 2"),
        ("isolate_documents", "auto", "true or false"),
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
        "sources.code.tokens_column": "sources.code.text_column",
    }
    assert str(error.value).startswith((f"{other.get(path, path)}:", f"{path}.path: missing"))
    assert fix in str(error.value)


def test_contradictions_are_refused_without_yaml_too() -> None:
    with pytest.raises(ValueError, match=r"^text_column: .* messages_column"):
        SourceConfig(path="chat.jsonl", text_column="content", messages_column="messages")
    with pytest.raises(ValueError, match=r"sources\.chat\.weight: -1 "):
        MixtureConfig({"chat": {"path": "chat.jsonl", "weight": -1}}, sequence_length=8)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"weight: -1"):
        SourceConfig("chat.jsonl", weight=-1)


def test_a_mixture_needs_a_source_to_train_on() -> None:
    with pytest.raises(ValueError, match="none of them is trained on"):
        MixtureConfig({"law": SourceConfig(path="law", role="ood")}, sequence_length=8)


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
def test_a_temperature_evens_shares_out_and_keeps_their_order(sizes: dict[str, int], t: float) -> None:
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


def test_a_stream_needs_a_weight_or_a_stated_size() -> None:
    source = {"path": "org/web", "streaming": True}
    with pytest.raises(ValueError, match=r"sources\.web\.weight: missing.*sources\.web\.tokens"):
        MixtureConfig.from_dict({"sources": {"web": source}, "sequence_length": 8})
    for enough in ({"weight": 1.0}, {"tokens": 1000}):
        MixtureConfig.from_dict({"sources": {"web": {**source, **enough}}, "sequence_length": 8})


def test_a_source_too_large_to_load_whole_is_refused() -> None:
    def stated_size(**web: Any) -> MixtureConfig:
        return MixtureConfig.from_dict({"sources": {"web": {"path": "org/web", **web}}, "sequence_length": 8})

    with pytest.raises(ValueError, match=r"sources\.web\.tokens.*max_tokens.*streaming: true"):
        stated_size(tokens=MAP_STYLE_LIMIT + 1)
    stated_size(tokens=MAP_STYLE_LIMIT)
    stated_size(tokens=10 * MAP_STYLE_LIMIT, max_tokens=MAP_STYLE_LIMIT)
    stated_size(tokens=10 * MAP_STYLE_LIMIT, streaming=True)
    stated_size()
    with pytest.raises(ValueError, match=r"sources\.web"):
        stated_size(max_tokens=MAP_STYLE_LIMIT + 1)
