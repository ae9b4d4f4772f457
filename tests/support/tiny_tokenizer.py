"""A byte-level BPE of a few hundred tokens, trained in milliseconds."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<bos>", "<eos>"


def tiny_tokenizer(text: str = "the quick brown fox jumps over the lazy dog") -> PreTrainedTokenizerFast:
    """It can tokenize and decode every text. Its merges depend on `text`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)


def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that starts each text with a BOS, as those of Llama and Gemma do."""
    tokenizer.add_special_tokens({"bos_token": BOS})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return tokenizer


# Each message ends with an EOS. What the assistant writes is marked, with its EOS.
MARKING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def count_tokenized(monkeypatch: Any) -> list[int]:
    """A list that grows with each call of a tokenizer in this process, by the number of its texts."""
    calls: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def counting(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1 if isinstance(text, str) else len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    return calls
