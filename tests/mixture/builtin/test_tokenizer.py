"""The tokenizer that is trained on the mixture."""

import copy
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_nexus.mixture.builtin.tokenizer import CHAT_TEMPLATE, EOS_TOKEN, PAD_TOKEN, train_tokenizer

SIZE = 300
WORDS = ["sum", "root", "square", "cube", "ratio", "share"]
TEXT = [f"The {word} of number {n} is {n * n}.\n\tdef {word}(x): return x" for n in range(20) for word in WORDS]
TRAIN = """
import json, sys
from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
print(train_tokenizer(*json.load(sys.stdin)).backend_tokenizer.to_str())
"""


@cache
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXT, SIZE)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return copy.deepcopy(trained())  # Padding changes its state.


def test_the_vocabulary_has_its_size_and_special_tokens_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == SIZE
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS_TOKEN, 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (PAD_TOKEN, 1)


def test_words_become_tokens_and_nothing_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("The square of number")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["The", "Ġsquare", "Ġof", "Ġnumber"]


def test_each_digit_is_one_token_even_in_frequent_numbers() -> None:
    tokens = train_tokenizer(["in 2024 and 2024, year2024"] * 50, 1000).tokenize("from 2024 to 361, x14")
    digits = [token.lstrip("Ġ") for token in tokens if any(sign.isdigit() for sign in token)]
    assert digits == list("202436114")


@given(text=st.text())
def test_decoding_gives_back_any_text(text: str) -> None:
    assert trained().decode(trained()(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", ["naïve café — żółw 龜 \U0001f469\u200d\U0001f467", " a  b , c .\r\n\t ", "don't ( x )"]
)
def test_decoding_gives_back_awkward_texts(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saving_and_loading_keeps_everything(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 1, SIZE)
    for text in (*TEXT[:20], "naïve \U0001f422  x , y"):
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text


def test_padding_works_in_a_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(["The", "The square of"], padding=True)
    assert batch["input_ids"][0][1:] == [1, 1]
    assert batch["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_a_generation_prompt_ends_where_answers_begin(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "user", "content": "The number"}, {"role": "assistant", "content": "square root"}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(whole["input_ids"]) == f"Q: The number\nA: square root{EOS_TOKEN}"
    assert tokenizer.convert_ids_to_tokens(whole["input_ids"][len(prompt) :]) == ["Ġsquare", "Ġroot", EOS_TOKEN]
    assert whole["input_ids"][: len(prompt)] == prompt
    assert whole["assistant_masks"] == [0] * len(prompt) + [1] * 3


@pytest.mark.slow
def test_another_process_trains_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "RAYON_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command, given = [sys.executable, "-c", TRAIN], json.dumps([TEXT, SIZE])
    out = subprocess.run(command, input=given, env=environment, capture_output=True, check=True, encoding="utf-8")
    assert out.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert len(train_tokenizer(["abcabc abc"], 5000)) < 300
    assert len(train_tokenizer(iter([]), 5000)) == 258


@pytest.mark.parametrize("vocab_size", [0, 257])
def test_a_vocabulary_without_room_for_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"`vocab_size` is {vocab_size}, .* Choose 258 or more"):
        train_tokenizer(TEXT, vocab_size)
