"""
Tiny tokenizers with the shapes of well-known ones, as the files that `AutoTokenizer` loads.

Each has the model, normalizer, post-processor and special tokens of the original, and merges of a few words.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer

__all__ = ["SHAPES"]

_TEXT = ["the quick brown fox jumps over the lazy dog, abcd 1234"] * 2
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _train(backend: Tokenizer, special: list[str], alphabet: list[str], size: int = 320) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)


def _byte_level(special: list[str], pattern: str | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    backend.decoder = decoders.ByteLevel()
    _train(backend, special, sorted(pre_tokenizers.ByteLevel.alphabet()))
    return backend


def _sentence_pieces(special: list[str], unknown: str, prefix: str) -> Tokenizer:
    """Pieces with `▁` for spaces. The bytes of other characters are tokens, which are not among the merges."""
    backend = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(prefix), replace]) if prefix else replace
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _train(backend, [*special, *_BYTES], sorted("▁abcdefghijklmnopqrstuvwxyz"), 380)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in _BYTES]
    return Tokenizer.from_str(json.dumps(content))


def _start_with(backend: Tokenizer, bos: str, *before: Any) -> None:
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.post_processor = processors.Sequence([*before, template]) if before else template


def _save(folder: Path, backend: Tokenizer, **settings: Any) -> None:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _gpt2(folder: Path) -> None:
    """No padding token. One token is BOS, EOS and unknown."""
    end = "<|endoftext|>"
    settings = {"bos_token": end, "eos_token": end, "unk_token": end, "add_prefix_space": False}
    backend = _byte_level([])
    backend.add_special_tokens([end])
    _save(folder, backend, tokenizer_class="GPT2Tokenizer", model_max_length=1024, **settings)


def _llama2(folder: Path) -> None:
    """Sentence pieces with bytes, a BOS, no padding token, and a leading space ("legacy")."""
    backend = _sentence_pieces(["<unk>", "<s>", "</s>"], "<unk>", "▁")
    _start_with(backend, "<s>")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None, "legacy": True}
    settings |= {"add_bos_token": True, "add_eos_token": False, "model_max_length": 10**30, "padding_side": "right"}
    _save(folder, backend, tokenizer_class="LlamaTokenizer", **settings)


def _llama3(folder: Path) -> None:
    """Special tokens behind the vocabulary, a BOS by the post-processor, no padding and no unknown token."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    backend = _byte_level([], _WORDS)
    backend.add_special_tokens([begin, end, *(f"<|reserved_special_token_{i}|>" for i in range(20)), "<|eot_id|>"])
    _start_with(backend, begin, processors.ByteLevel(trim_offsets=True))
    settings = {"bos_token": begin, "eos_token": end, "clean_up_tokenization_spaces": True}
    _save(folder, backend, tokenizer_class="PreTrainedTokenizerFast", model_max_length=131072, **settings)


def _gemma(folder: Path) -> None:
    """Sentence pieces without a leading space, a BOS, and padding as entry 0."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    backend = _sentence_pieces(special, "<unk>", "")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    _start_with(backend, "<bos>")
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "model_max_length": 10**30}
    _save(folder, backend, tokenizer_class="GemmaTokenizer", **settings)


def _qwen(folder: Path) -> None:
    """Special tokens behind the vocabulary, no BOS, and an EOS that is not the padding token."""
    backend = _byte_level([], _WORDS)
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    settings |= {"add_bos_token": False, "add_prefix_space": False, "model_max_length": 131072}
    _save(folder, backend, tokenizer_class="Qwen2Tokenizer", **settings)


def _byt5(folder: Path) -> None:
    """No vocabulary but the bytes, no BOS, and no fast implementation. It ends each text with an EOS itself."""
    ByT5Tokenizer().save_pretrained(folder)


SHAPES: dict[str, Callable[[Path], None]] = {
    "gpt2": _gpt2,
    "llama2": _llama2,
    "llama3": _llama3,
    "gemma": _gemma,
    "qwen": _qwen,
    "byt5": _byt5,
}
