"""Which tokens of prompts, completions and conversations are trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value, load_dataset
from tokenizers import Tokenizer
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_nexus.mixture import Mixture, MixtureConfig, SourceConfig, load_mixture
from hf_nexus.mixture.documents import DocumentEncoder, check_tokenizer, vocabulary_size
from hf_nexus.mixture.isolation import PackedRowCollator
from hf_nexus.mixture.stream.dataset import MixtureStream
from hf_nexus.mixture.stream.reader import SourceError

from ..support.tiny_tokenizer import BOS, EOS, MARKING, adding_bos, tiny_tokenizer

PAIR = {"prompt_column": "prompt", "completion_column": "completion", "loss_on": "completion"}
CHAT = {"messages_column": "messages", "loss_on": "assistant"}


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def encode(row: dict[str, Any], source: dict[str, str], tokenizer: Any = None, bos: bool | None = None) -> np.ndarray:
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = MARKING
    encoder = DocumentEncoder("a", SourceConfig("a.jsonl", **source), tokenizer, list(row), bos)
    (tokens,) = encoder.encode([encoder.document(row, 0)])
    return tokens


def targets(tokens: np.ndarray, tokenizer: Any = None) -> str:
    return (tokenizer or tiny_tokenizer()).decode(tokens[tokens >= 0])


def text(tokens: np.ndarray, tokenizer: Any = None) -> str:
    return (tokenizer or tiny_tokenizer()).decode(np.maximum(tokens, ~tokens))


def test_a_byte_order_mark_is_no_text():
    assert text(encode({"text": "\ufeffthe quick"}, {})) == "the quick" + EOS


@pytest.mark.parametrize(
    ("prompt", "completion", "whole", "trained"),
    [
        ("the quick", "brown fox", "the quick\nbrown fox", "brown fox"),
        ("the quick ", "brown fox", "the quick brown fox", " brown fox"),  # one token is of both
        ("é 龜\n", "żółw", "é 龜\nżółw", "żółw"),
        ("", "brown fox", "\nbrown fox", "brown fox"),
    ],
)
@pytest.mark.parametrize("segment", [1_000_000, 7])
def test_the_completion_and_its_eos_are_targets(monkeypatch, prompt, completion, whole, trained, segment):
    monkeypatch.setattr("hf_nexus.mixture.documents.SEGMENT", segment)
    tokens = encode({"prompt": prompt, "completion": completion}, PAIR)
    assert text(tokens) == whole + EOS and targets(tokens) == trained + EOS


def test_an_empty_completion_has_no_target():
    tokens = encode({"prompt": "fox", "completion": ""}, PAIR)
    assert text(tokens) == "fox" + EOS and targets(tokens) == ""


def test_a_completion_begins_after_the_generation_prompt():
    tokens = encode({"prompt": chat("fox"), "completion": chat("", "dog")[1:]}, PAIR)
    assert text(tokens) == f"<user>fox{EOS}<assistant>dog{EOS}" and targets(tokens) == f"dog{EOS}"


def test_a_prompt_that_a_completion_changes_is_an_error():
    tokenizer = tiny_tokenizer()
    # As the templates of Mistral, which move the system message to the last turn of the user.
    tokenizer.chat_template = (
        "{% set system = messages[0].content %}{% for m in messages[1:] %}"
        "[{{ system + ' ' if loop.last and m.role == 'user' else '' }}{{ m.content }}]{% endfor %}"
    )
    row = {"prompt": [{"role": "system", "content": "be brief"}, *chat("fox")], "completion": chat("", "dog")[1:]}
    encoder = DocumentEncoder("a", SourceConfig("a.jsonl", **PAIR), tokenizer, list(row))
    with pytest.raises(ValueError, match=r"cannot render row 7: it writes the prompt in another way"):
        encoder.document(row, 7)
    whole = DocumentEncoder("a", SourceConfig("a.jsonl", **PAIR | {"loss_on": "all"}), tokenizer, list(row))
    assert whole.document(row, 7).text == "[fox][dog]"


@pytest.mark.parametrize("contents", [("fox", "dog"), ("fox", "dog", "the quick", "brown"), ("fox", "dog", "jumps")])
def test_turns_are_marked_as_by_the_chat_template(contents):
    tokenizer = tiny_tokenizer()
    tokens = encode({"messages": chat(*contents)}, CHAT, tokenizer)
    expected = tokenizer.apply_chat_template(chat(*contents), return_assistant_tokens_mask=True)
    assert np.maximum(tokens, ~tokens).tolist() == expected["input_ids"]
    assert (tokens >= 0).astype(int).tolist() == expected["assistant_masks"]


def test_an_eos_that_a_template_lacks_is_part_of_the_last_turn():
    tokenizer = tiny_tokenizer()
    for end in ("", "."):
        tokenizer.chat_template = MARKING.replace("eos_token", f"'{end}'")
        encoder = DocumentEncoder("a", SourceConfig("a.jsonl", **CHAT), tokenizer, [])
        (tokens,) = encoder.encode([encoder.document({"messages": chat("fox", "dog")}, 0)])
        assert targets(tokens) == "dog" + end + EOS


@pytest.mark.parametrize("source", [PAIR, CHAT])
def test_a_bos_is_no_target(source):
    tokenizer = adding_bos(tiny_tokenizer())
    tokens = encode({"prompt": "a", "completion": "b", "messages": chat("a", "b")}, source, tokenizer)
    assert text(tokens, tokenizer).startswith(BOS) and BOS not in targets(tokens, tokenizer)


def test_a_number_of_a_message_is_rendered_as_it_was_written(tmp_path):
    """Arrow reads 1 as 1.0 if another row has 1.5."""
    calls = [{"messages": [{"role": "user", "content": "fox", "n": n}]} for n in (1, 1.5, 10**20 + 0.5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in calls))
    rows = load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].n }}"
    encoder = DocumentEncoder("a", SourceConfig("a.jsonl", messages_column="messages"), tokenizer, [])
    assert [document.text for document in encoder.documents(rows[:], 0)] == ["1", "1.5", "1e+20"]


def test_templates_and_tokenizers_that_cannot_mark_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"sources\.a\.loss_on: .*\{% generation %\} and .*set loss_on to 'all'"):
        check_tokenizer("a", SourceConfig("a.jsonl", **CHAT), tokenizer)
    with pytest.raises(ValueError, match=r"sources\.a\.loss_on: 'completion' needs a fast tokenizer"):
        check_tokenizer("a", SourceConfig("a.jsonl", **PAIR), ByT5Tokenizer())


# ---- Rows ----


def load(folder: Path, streaming: bool, rows: list[Any], length: int, tokenizer: Any = None, **source: Any) -> Mixture:
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = MARKING
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"path": str(folder / "a.jsonl"), "streaming": streaming, "weight": 1, **source}
    return load_mixture(
        MixtureConfig.from_dict({"sources": {"a": config}, "sequence_length": length}), tokenizer, cache_dir=folder
    )


def first_rows(mixture: Mixture, count: int) -> list[dict[str, torch.Tensor]]:
    if mixture.config.sources["a"].streaming:
        return list(MixtureStream(mixture.train, buffer_size=2).__getitems__([(0, 0)] * count))
    return [mixture.train["a"][i] for i in range(min(count, len(mixture.train["a"])))]


PAIRS = [{"prompt": f"the fox {i} ", "completion": f"jumps {i} times"} for i in range(40)]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_rows_are_minus_100_outside_of_completions(tmp_path, streaming):
    mixture = load(tmp_path, streaming, PAIRS, 16, **PAIR)
    for row in first_rows(mixture, 8):
        trained = row["labels"] != -100
        assert row["labels"][trained].equal(row["input_ids"][trained])
        document = (row["position_ids"] == 0).cumsum(0)[trained]
        assert "the" not in tiny_tokenizer().decode(row["labels"][trained]) and len(document)
    text = tiny_tokenizer().decode(torch.cat([row["input_ids"] for row in first_rows(mixture, 8)]))
    assert "the fox" in text and "jumps" in text


def test_rows_of_a_stream_are_those_of_the_packed_source(tmp_path):
    packed, streamed = (first_rows(load(tmp_path, s, PAIRS[:1] * 40, 16, **PAIR), 12) for s in (False, True))
    assert all(row[key].equal(other[key]) for row, other in zip(packed, streamed, strict=True) for key in row)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_a_target_are_left_out(tmp_path, streaming):
    rows = [{"prompt": "the fox " * 30, "completion": "jumps"}] * 9
    mixture = load(tmp_path, streaming, rows, 16, **PAIR)
    found = first_rows(mixture, 6)
    assert len(found) == 6 and all((row["labels"][1:] != -100).any() for row in found)
    error = SourceError if streaming else ValueError
    with pytest.raises(error, match=r"one to train on|token to train on"):
        first_rows(load(tmp_path, streaming, [{**rows[0], "completion": ""}] * 9, 16, **PAIR), 1)


def test_another_loss_on_does_not_read_the_same_cache(tmp_path):
    one, other = (load(tmp_path, False, PAIRS, 16, **PAIR | {"loss_on": on}) for on in ("all", "completion"))
    assert (one.train["a"][0]["labels"] != -100).all() and (other.train["a"][0]["labels"] == -100).any()


def test_targets_are_counted_apart_from_tokens_read(tmp_path):
    mixture = load(tmp_path, False, PAIRS, 16, **PAIR)
    rows = first_rows(mixture, 10**6)
    assert mixture.tokens["a"] == 16 * len(rows)
    labels = torch.stack([row["labels"].masked_fill(row["position_ids"] == 0, -100) for row in rows])
    assert mixture.targets == {"a": int((labels != -100).sum())} and mixture.targets["a"] < mixture.tokens["a"]


@pytest.mark.parametrize("pads_with", ["EOS", "another token", "a token of the text"])
@pytest.mark.parametrize("isolate", [True, False])
def test_collators_that_make_labels_of_tokens_keep_the_mask(tmp_path, pads_with, isolate):
    tokenizer = tiny_tokenizer()
    rows = first_rows(load(tmp_path, False, PAIRS, 16, **PAIR), 3)
    if pads_with == "another token":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    elif pads_with == "a token of the text":
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(int(rows[0]["input_ids"][0]))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    eos = tokenizer.eos_token_id
    made, plain = (PackedRowCollator(c, eos, isolate)(rows)["labels"] for c in (collate, default_data_collator))
    assert made.equal(plain)


@pytest.mark.parametrize("source", [{}, PAIR, CHAT], ids=["text", "pair", "chat"])
def test_a_read_that_finds_only_held_out_documents_goes_on(tmp_path, source):
    rows = [{"text": p["prompt"], "messages": chat(*p.values()), **p} for p in PAIRS]
    assert len(first_rows(load(tmp_path, True, rows, 4, eval_rows=20, **source), 40)) == 40


# ---- Rows that are tokens already ----

TOKENS = {"tokens_column": "input_ids"}


DOCUMENTS = [f"{i} fox jumps" * (1 + i % 4) for i in range(40)]


def tokenized(tokenizer: Any, end: bool = False) -> list[dict[str, list[int]]]:
    return [{"input_ids": tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * end} for text in DOCUMENTS]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_given_tokens_get_the_rows_of_their_text(tmp_path, streaming, bos):
    """An EOS, or a BOS, that the rows have already is not repeated."""
    tokenizer = adding_bos(tiny_tokenizer()) if bos else tiny_tokenizer()
    expected = first_rows(load(tmp_path, streaming, [{"text": text} for text in DOCUMENTS], 16, tokenizer), 6)
    for end in (False, True):
        found = first_rows(load(tmp_path, streaming, tokenized(tokenizer, end), 16, tokenizer, **TOKENS), 6)
        for text, row in zip(expected, found, strict=True):
            assert all(text[key].equal(row[key]) and text[key].dtype == row[key].dtype for key in text)


def test_ids_that_no_token_has_do_not_lower_the_largest(tmp_path):
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    largest = len(tokenizer) + 5
    backend["model"]["vocab"] = backend["model"]["vocab"] | {"~~~": largest}
    gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token=EOS)
    assert vocabulary_size(gap) == largest + 1 > len(gap)
    rows = [{"input_ids": [largest, 20, 21]}] * 9
    assert largest in load(tmp_path, False, rows, 4, gap, **TOKENS).train["a"][0]["input_ids"].tolist()


def test_packed_rows_do_not_read_the_cache_of_unpacked_ones(tmp_path):
    rows = [{"input_ids": [20, 21, 22, 23]}] * 9
    one, other = (load(tmp_path, False, rows, 4, packed=packed, **TOKENS) for packed in (False, True))
    assert one.train["a"][1]["input_ids"].tolist() == [tiny_tokenizer().eos_token_id, 20, 21, 22]
    assert other.train["a"][1]["input_ids"].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_rows_stay_as_they_are(tmp_path, streaming):
    eos = tiny_tokenizer().eos_token_id
    rows = [{"input_ids": [20 + i, 21, eos, 22, 23, eos, eos, 24]} for i in range(9)]
    mixture = load(tmp_path, streaming, rows, 8, packed=True, **TOKENS)
    found = first_rows(mixture, 9)
    assert sorted(row["input_ids"].tolist() for row in found) == [row["input_ids"] for row in rows]
    for row in found:
        assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 0] and row["labels"].equal(row["input_ids"])
    with pytest.raises((ValueError, SourceError), match=r"has 8 tokens, not sequence_length=6\. Remove `packed`"):
        first_rows(load(tmp_path, streaming, rows, 6, packed=True, **TOKENS), 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([3, 10**6], "holds the token 1000000, but the tokenizer has 0 to 288"),
        ([-1], "holds the token -1"),
        ([0.5], "not a list of token ids"),
        (None, "holds None, not a list"),
    ],
)
def test_given_tokens_are_checked_by_the_tokenizer(tmp_path, streaming, wrong, message):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": wrong}]
    with pytest.raises((ValueError, SourceError), match=f"row . .*{message}"):
        first_rows(load(tmp_path, streaming, rows, 4, **TOKENS), 30)


def test_copies_of_held_out_tokens_are_not_trained_on(tmp_path):
    rows = tokenized(tiny_tokenizer())
    for streaming in (False, True):
        mixture = load(tmp_path, streaming, rows * 2, 4, eval_rows=9, **TOKENS)
        held_out = set(tiny_tokenizer().decode(mixture.eval["a"]["input_ids"][:].flatten()).split(EOS)[:-1])
        trained = tiny_tokenizer().decode(torch.cat([row["input_ids"] for row in first_rows(mixture, 40)]))
        assert len(held_out) >= 8 and held_out.isdisjoint(trained.split(EOS))


@pytest.mark.parametrize(
    ("kind", "streaming"), [("parquet", False), ("parquet", True), ("fixed", False), ("fixed", True), ("arrow", False)]
)
def test_tokens_of_arrow_and_parquet_files_are_the_same(tmp_path, kind, streaming):
    rows = Dataset.from_dict({"input_ids": [[i % 200, 5, 6, 7] for i in range(60)]})
    if kind == "fixed":
        rows = rows.cast_column("input_ids", List(Value("uint16"), length=4))
    expected = first_rows(load(tmp_path, streaming, list(rows), 8, **TOKENS), 10)
    rows.save_to_disk(tmp_path / "saved") if kind == "arrow" else rows.to_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / ("saved" if kind == "arrow" else "a.parquet"))
    found = first_rows(load(tmp_path, streaming, [], 8, **TOKENS, path=path), 10)
    assert [row["input_ids"].tolist() for row in found] == [row["input_ids"].tolist() for row in expected]
