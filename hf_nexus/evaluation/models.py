"""Saved models and adapters, loaded to be measured."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["adapter_config", "load_model", "saved_tokenizer", "trainable_parameters"]


def adapter_config(model: str, revision: str | None = None) -> Any | None:
    """
    Configuration of a PEFT adapter, by folder or Hub id; `None` for a whole model.

    Raises:
        OSError: the Hub has no such model, or cannot be reached.
        ImportError: an adapter, and peft is not installed.
    """
    if find_adapter_config_file(model, revision=revision) is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(f"{model} is an adapter. Install peft to load it: pip install 'peft>=0.21'") from error
    return PeftConfig.from_pretrained(model, revision=revision)


def load_model(model: str, base: str | None = None) -> tuple[Any, str | None]:
    """
    Load a model, or a PEFT adapter on its frozen base model, in float32 on the CPU, in evaluation mode.

    By default, the base model is the one that the adapter names. Returns the model, and the base model of an adapter
    or `None`.

    Raises:
        ValueError: `base` for a model that is not an adapter, or an adapter without a base model.
        OSError: there is no such model.
        ImportError: an adapter, and peft is not installed.
    """
    adapter = adapter_config(model)
    if adapter is None:
        if base is not None:
            raise ValueError(f"{model} is a whole model, not an adapter of {base}. Leave the base model out.")
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False), None
    from peft import PeftModel

    base = base or adapter.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {model} does not name its base model. Pass it as --base.")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    return PeftModel.from_pretrained(whole, model, is_trainable=True).eval(), base


def saved_tokenizer(model: str, base: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer saved with a model. For an adapter without one, that of its base model."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError):
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)


def trainable_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters that are not frozen, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
