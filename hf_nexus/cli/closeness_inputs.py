"""What `hf-nexus closeness` is given: a model or an adapter, and its mixture."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from ..files import nearest
from ..mixture.config import MixtureConfig
from ..pretrain.folder import CONFIG_NAME
from ..pretrain.parsing import load_config
from ..strict import parse_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_minima", "load_model", "load_tokenizer", "mixture_of", "parse_minima", "trainable"]


def load_model(model: str, base: str | None = None) -> tuple[Any, str | None]:
    """
    Load a model, or a PEFT adapter onto its frozen base, in float32 on the CPU.

    Args:
        model (`str`):
            A folder or a Hub id.
        base (`str`, *optional*):
            Of an adapter, by default what it names.

    Returns:
        `tuple`: the model, in evaluation mode, and what an adapter adapts.

    Raises:
        ValueError: a base and no adapter, or an adapter of nothing.
        OSError: there is no such model.
        ImportError: an adapter, and `peft` is not installed.

    Example:
        >>> from hf_nexus.cli.closeness_inputs import load_model
        >>> model, base = load_model("org/adapter")  # doctest: +SKIP
    """
    if find_adapter_config_file(model) is None:
        if base is not None:
            raise ValueError(f"{model} is a model of its own and no adapter of {base}. Leave --base out.")
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), None
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"{model} is an adapter, which needs the peft library: pip install peft") from error
    base = base or PeftConfig.from_pretrained(model).base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {model} does not name its base model. Name it with --base.")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(whole, model, is_trainable=True).eval(), base


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that are not frozen, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_tokenizer(model: str, base: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer beside a model, or for an adapter that of its base if there is none."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(base)


def check_minima(minima: Mapping[str, str], mixture: MixtureConfig) -> None:
    """Refuse minimizers of one source only, and of what is no training source with held-out rows."""
    known = [name for name, s in mixture.train_sources.items() if s.eval_rows or s.eval_split]
    for name in minima:
        if name not in known:
            raise ValueError(
                f"--minima: {name!r} is no training source with held-out rows.{nearest(name, known)} Allowed: "
                f"{', '.join(known)}."
            )
    if len(minima) == 1:
        raise ValueError("--minima: distances are between minimizers. Give those of two sources or more.")


def mixture_of(model: str, config: str | None = None) -> MixtureConfig:
    """
    The mixture that a configuration names, by default the `pretrain.yaml` in the model's folder, or for a checkpoint
    in the folder above.

    Args:
        model (`str`):
            A folder or a Hub id.
        config (`str`, *optional*):
            Name or path of a pretraining configuration, or path of a YAML file with a mixture's own fields.

    Raises:
        ValueError: there is none, or it is not valid.

    Example:
        >>> from hf_nexus.cli.closeness_inputs import mixture_of
        >>> list(mixture_of("org/model", "demo").train_sources)
        ['code', 'documentation', 'mathematics', 'reasoning', 'records']
    """
    if config is None:
        folder = Path(model).resolve()
        folders = [folder, folder.parent] if re.fullmatch(r"checkpoint-\d+", folder.name) else [folder]
        found = [path for path in (one / CONFIG_NAME for one in folders) if path.is_file()]
        if not found:
            raise ValueError(
                f"There is no {CONFIG_NAME} beside {model}, so that its sources are not known. Name them with "
                "--config: a configuration (demo, 3b), a run's pretrain.yaml, or a YAML file of a mixture."
            )
        config = str(found[0])
    elif Path(config).is_file() and "sources" in parse_yaml(Path(config).read_text(encoding="utf-8"), config):
        return MixtureConfig.from_yaml(config)
    return MixtureConfig.from_dict(load_config(config)["data"])


def parse_minima(text: str | None) -> dict[str, str]:
    """
    Read `code=runs/code,math=runs/math`.

    Raises:
        ValueError: a part without a name or a path, or a name that is given twice.

    Example:
        >>> from hf_nexus.cli.closeness_inputs import parse_minima
        >>> parse_minima("code=runs/code,math=runs/math")
        {'code': 'runs/code', 'math': 'runs/math'}
    """
    minima: dict[str, str] = {}
    for part in (text or "").split(",") if text else []:
        name, _, path = (piece.strip() for piece in part.partition("="))
        if not name or not path or name in minima:
            raise ValueError(f"--minima: {part!r} is not allowed. Give each source once, as in code=DIR,math=DIR.")
        minima[name] = path
    return minima
