"""The Llama of the `model` section of a configuration."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from .fields import ModelArguments

__all__ = ["build_model", "count_parameters", "model_config"]


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
