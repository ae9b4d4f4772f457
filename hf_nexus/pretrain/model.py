"""The Llama of the `model` section of a configuration."""

from functools import cache

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..mixture.isolation import choose_isolation, isolation_problem
from .fields import ModelArguments, PretrainArguments

__all__ = ["attention_of", "build_model", "count_parameters", "joined_documents", "model_config"]


def model_config(
    model: ModelArguments, sequence_length: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> LlamaConfig:
    """The `LlamaConfig` of a `model` section, with the special tokens of the tokenizer if one is given."""
    special = {}
    if tokenizer is not None:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        max_position_embeddings=model.max_position_embeddings or sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        **special,
    )


def build_model(config: LlamaConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """A randomly initialized model with float32 weights."""
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attn_implementation, trust_remote_code=False
    )


def count_parameters(config: LlamaConfig) -> int:
    """Number of parameters, with tied ones counted once, on the meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


def attention_of(arguments: PretrainArguments) -> str:
    """Attention implementation of the run."""
    return arguments.model.attn_implementation or "sdpa"  # the default of a Llama


def joined_documents(arguments: PretrainArguments) -> str | None:
    """
    Why the documents of a row attend to each other in a run; `None` if they do not.

    Raises:
        ValueError: `isolate_documents` is true, and the model cannot do it.
    """
    wanted = arguments.mixture.isolate_documents
    if wanted is False:
        return "isolate_documents is off"
    problem = _isolation_problem(attention_of(arguments))
    choose_isolation(wanted, problem)
    return problem


@cache
def _isolation_problem(attention: str) -> str | None:
    """What a probe of a tiny Llama finds, since a plan does not build the model."""
    sizes = ModelArguments(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng([]):
        model = build_model(model_config(sizes, sequence_length=8))
    model.config._attn_implementation = attention
    return isolation_problem(model, use_cache=False)
