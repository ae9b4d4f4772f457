"""The model of the `model` section of a configuration: any causal language model of transformers."""

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import nearest
from ..mixture.isolation import choose_isolation, isolation_problem
from .fields import SHAPE, ModelArguments, PretrainArguments

__all__ = ["build_model", "config_of", "count_parameters", "joined_documents", "model_config", "planned_attention"]
__all__ += ["shape_fields"]


def shape_fields(section: Mapping[str, Any]) -> list[str] | None:
    """
    The fields of the configuration class of a `model` section; `None` for a model to continue, which the Hub may have.

    Raises:
        ValueError: a type that is not one of a causal language model.
    """
    path = section.get("path")
    if path is None:
        return _fields(_class_of(section.get("model_type") or "llama", "model_type"))
    return _fields(type(_saved_config(str(path), None))) if str(path).endswith(".json") else None


def _fields(cls: type[PreTrainedConfig]) -> list[str]:
    names = [*(f.name for f in dataclasses.fields(cls)), *cls.attribute_map]  # type: ignore[arg-type]
    # Models read these whether or not their classes declare them.
    implied = {"rope_parameters": "rope_theta", "num_attention_heads": "head_dim"}
    return names + [field for name, field in implied.items() if name in names and field not in names]


def _class_of(kind: Any, key: str) -> type[PreTrainedConfig]:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
        hint = nearest(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ValueError(f"{key}: {kind!r} is not a causal language model of transformers.{hint}")
    return CONFIG_MAPPING[kind]


@cache
def _saved_config(path: str, revision: str | None) -> PreTrainedConfig:
    if Path(path, "adapter_config.json").exists():
        raise ValueError(
            f"model.path: {path!r} holds adapters. Merge them into their base (merge_and_unload of peft)."
        )
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    _class_of(config.model_type, "path")
    return config


def model_config(
    model: ModelArguments, sequence_length: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """
    The configuration of a `model` section. A new model has the special tokens of the tokenizer if one is given. Of a
    `path` on the Hub, `config.json` is downloaded.

    Raises:
        ValueError: a field that the configuration class does not have or allow, or a context that is too short.
    """
    shape = {name: value for name in SHAPE if (value := getattr(model, name)) is not None}
    shape |= model.config_fields or {}
    saved = None if model.path is None else _saved_config(model.path, model.revision)
    cls = _class_of(model.model_type or "llama", "model_type") if saved is None else type(saved)
    known = _fields(cls)
    for name in shape:
        if name not in known:
            raise ValueError(f"model.{name}: the configuration of this model has no such field.{nearest(name, known)}")
    for switch in {"is_decoder", "causal"}.intersection(known):
        shape.setdefault(switch, True)  # else a BERT or an XLM sees the tokens that it predicts
    if tokenizer is not None and not model.continues:
        shape |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        if "rope_theta" in shape:
            rotary = getattr(saved or cls(), "rope_parameters", None) or {"rope_type": "default"}
            if any(isinstance(value, Mapping) for value in rotary.values()):
                raise ValueError("model.rope_theta: this model has one per type of layer. Set rope_parameters.")
            given = shape.get("rope_parameters") or {}  # more specific than rope_theta, which has a default
            shape["rope_parameters"] = {**rotary, "rope_theta": shape.pop("rope_theta"), **given}
        if saved is not None and model.continues:
            config = copy.deepcopy(saved)
            for name, value in shape.items():
                setattr(config, name, value)
        else:
            config = _new_config(cls, model.path, shape, sequence_length)
            _drop_padding(config.get_text_config())
    except (StrictDataclassError, ArithmeticError, AttributeError, TypeError) as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from error
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or sequence_length
    if 0 < longest < sequence_length:  # an XLNet has -1: any length
        rotary_only = " if the positions are rotary" if model.continues else ""  # learned ones have weights
        raise ValueError(
            f"model.max_position_embeddings: the model has {longest}, and sequence_length is {sequence_length}. Lower "
            f"sequence_length, or raise max_position_embeddings{rotary_only}."
        )
    return config


def _new_config(
    cls: type[PreTrainedConfig], path: str | None, shape: Mapping[str, Any], sequence_length: int
) -> PreTrainedConfig:
    """
    The configuration of a new model, from the fields of a file, if any, and of the section. It is built once, since
    the class derives fields that are not given from others: `head_dim` and `layer_types`, for example.
    """
    saved = {} if path is None else PreTrainedConfig.get_config_dict(path)[0]
    saved.pop("model_type", None)  # `cls` has it
    if "rope_parameters" in shape:
        saved.pop("rope_scaling", None)  # an older name, which the class would prefer
    # Of two names of one field, the class would prefer the alias, wherever it is from.
    given = {cls.attribute_map.get(name, name): value for part in (saved, shape) for name, value in part.items()}
    if path is None and "max_position_embeddings" in _fields(cls):
        given.setdefault(cls.attribute_map.get("max_position_embeddings", "max_position_embeddings"), sequence_length)
    if "num_attention_heads" in shape and hasattr(cls, "num_key_value_heads"):
        given.setdefault("num_key_value_heads", shape["num_attention_heads"])  # that of the class may be larger
    config = cls(**given)
    names = ("num_attention_heads", "num_key_value_heads")
    heads, groups = (given.get(name, getattr(cls, name, None)) for name in names)
    if heads and groups and heads % groups:
        raise ValueError(
            f"model.num_key_value_heads={groups} with num_attention_heads={heads} is not allowed: it must divide them "
            f"evenly. Set it to {heads} for as many as attention heads, or to a divisor."
        )
    return config


def _drop_padding(text: PreTrainedConfig) -> None:
    """
    Drop a padding token that the class has for another vocabulary, or that starts or ends documents: a new model does
    not train the input embedding of its padding token.
    """
    pad = getattr(text, "pad_token_id", None) or 0
    if pad < text.vocab_size and pad not in (getattr(text, "bos_token_id", None), getattr(text, "eos_token_id", None)):
        return
    try:
        text.pad_token_id = None
    except StrictDataclassError:  # it must have one: any will do until the tokenizer is known
        text.pad_token_id = pad if pad < text.vocab_size else 0


def config_of(arguments: PretrainArguments) -> Any:
    """The configuration of the language model of a run."""
    return model_config(arguments.model, arguments.mixture.sequence_length).get_text_config()


def build_model(config: PreTrainedConfig, attn_implementation: str | None = None, **saved: Any) -> PreTrainedModel:
    """
    A model with float32 weights, which are random, or those of a `pretrained_model_name_or_path`.

    Raises:
        ValueError: transformers cannot build a new model of this configuration.
    """
    options: Any = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    if saved:
        return AutoModelForCausalLM.from_pretrained(config=config, trust_remote_code=False, **saved, **options)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        attention = f" with attn_implementation={attn_implementation!r}" if attn_implementation else ""
        raise ValueError(
            f"model: transformers cannot build a {config.model_type} of these fields{attention} ({problem}). Change "
            "them, or choose another model_type."
        ) from error


def count_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters, with tied ones counted once, on the meta device. Any attention has the same."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


def planned_attention(arguments: PretrainArguments) -> str:
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
    if config_of(arguments).model_type != "llama":
        return "unless a probe of the model shows that it keeps them apart"
    problem = _isolation_problem(planned_attention(arguments))
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
