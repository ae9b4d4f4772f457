"""A byte-level BPE tokenizer that is trained on the mixture."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "EOS_TOKEN", "PAD_TOKEN", "train_tokenizer"]

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|padding|>"
# A chat template for any tokenizer. `generation` marks the messages of the assistant and their end tokens. A
# generation prompt lacks the space before the message, because tokenizers join it to the first word.
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == "assistant" -%}
A:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else -%}
Q: {{ message.content }}
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}A:{% endif -%}"""
# A merge stays within a word and the space before it, one digit, a run of signs or a run of white space.
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """
    Train a byte-level BPE tokenizer. It encodes any text without unknown tokens and decodes it without loss.

    Each digit is one token, and encoding adds no special tokens. The same documents give the same tokenizer. A million
    characters take about a second.

    `vocab_size` includes 256 bytes, `eos_token` (`"<|endoftext|>"`, id 0) and `pad_token` (`"<|padding|>"`, id 1). The
    result has fewer tokens if the documents run out of pairs that occur twice, so size a model by `len(tokenizer)`.

    Example:
        >>> from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["the cat and the hat", "that cat"], vocab_size=270)
        >>> tokenizer.tokenize("the cat, 12")
        ['the', 'Ġcat', ',', 'Ġ', '1', '2']
        >>> tokenizer.decode(tokenizer("żółw 龜")["input_ids"])
        'żółw 龜'
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # It comes in random order.
    special = [EOS_TOKEN, PAD_TOKEN]
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but {len(special)} special tokens and {len(alphabet)} bytes need {least}. "
            f"Choose {least} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
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
