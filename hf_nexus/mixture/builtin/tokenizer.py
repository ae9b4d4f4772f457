"""A byte-level BPE tokenizer, trained on the mixture it will be used for."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["EOS_TOKEN", "PAD_TOKEN", "train_tokenizer"]

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|padding|>"
# Merges stay within a word with the space before it, one digit, a run of signs or a run of white space.
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """
    Trains a byte-level BPE tokenizer: any text is encoded without an unknown token and decoded without loss.

    Each digit is a token of its own, so that numbers look alike whatever their length. Encoding adds no special
    tokens; whoever packs the documents puts `eos_token` between them. The same documents give the same tokenizer.

    Args:
        documents (`Iterable[str]`):
            The text to learn merges from. The built-in training sources take a few seconds, every fourth of their
            documents about one, with tokens as long.
        vocab_size (`int`):
            Number of tokens, with the two special tokens and the 256 bytes. Fewer result if the documents run out of
            pairs that occur twice: size a model by `len(tokenizer)`.

    Returns:
        `PreTrainedTokenizerFast`: With `eos_token` (`"<|endoftext|>"`, id 0) and `pad_token` (`"<|padding|>"`, id 1).

    Raises:
        ValueError: If `vocab_size` does not hold the special tokens and the bytes.

    Example:
        >>> from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["the cat and the hat", "that cat"], vocab_size=270)
        >>> tokenizer.tokenize("the cat, 12")
        ['the', 'Ġcat', ',', 'Ġ', '1', '2']
        >>> tokenizer.decode(tokenizer("żółw 龜")["input_ids"])
        'żółw 龜'
    """
    from transformers import PreTrainedTokenizerFast

    # The set of bytes comes in no fixed order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [EOS_TOKEN, PAD_TOKEN]
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise ValueError(
            f"`vocab_size` is {vocab_size}; the {len(alphabet)} bytes and {len(special)} special tokens alone take "
            f"{least}. Choose {least} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )
