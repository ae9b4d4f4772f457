"""
Trainers of TRL. They check, tokenize and pack their training set themselves, and know but one: here each source is
prepared on its own, so that packing never crosses sources.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer

from ..mixture.training_data import TrainingData

__all__ = ["SourcePreparationMixin"]

# What the mixins are mixed into has the Trainer's attributes; this tells type checkers not to look for them.
Base: Any = object

# Columns that tell the parent what kind of examples it has.
_FORMATS = ("messages", "prompt", "completion", "chosen", "rejected", "label", "images", "image")


class SourcePreparationMixin(Base):
    """
    The part of [`NexusTrainerMixin`] for parents that come from TRL; nothing to any other.

    The parent's constructor is shown the first source and prepares all; weights that are not given are proportional
    to the rows that come of it.

    Raises:
        ValueError: a trainer that generates while it trains, arguments that are not TRL's, or sources of several
        formats.
    """

    data: TrainingData

    def __init__(self, *args: Any, **kwargs: Any):
        self._shown: Any = None  # to the parent, in place of all sources
        self._arguments: Any = kwargs["args"]
        parent = _trl_trainer(type(self))
        if parent is not None:
            _check_arguments(parent, self._arguments, mixes=bool(self.data.stages))
            if self.data.stages:
                _check_sources(self.data)
                # A copy, so that it is not taken for an evaluation set.
                self._shown = kwargs["train_dataset"] = copy.copy(self.data.dataset.sources[self.data.names[0]])
        super().__init__(*args, **kwargs)
        if self._shown is not None:
            self.train_dataset = self.data.dataset  # where the parent had nothing to prepare
        if parent is not None and self.args.nexus:
            _widen_adapters(self.model)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        prepare = super()._prepare_dataset
        if self._shown is None or dataset is not self._shown:
            return prepare(dataset, *args, **kwargs)
        return self._replace_sources(lambda source: prepare(source, *args, **kwargs))

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        compute = super()._precompute_ref_logps
        if dataset is not self.data.dataset or not self.data.stages:
            return compute(dataset, *args, **kwargs)
        return self._replace_sources(lambda source: compute(source, *args, **kwargs))

    def _replace_sources(self, function: Callable[[Any], Any]) -> Any:
        sources = {name: function(source) for name, source in self.data.dataset.sources.items()}
        self._set_data(sources, self.data.evaluation, self._arguments)
        return self.data.dataset


def _trl_trainer(cls: type) -> type | None:
    """The class of TRL that a trainer is made of."""
    return next((c for c in cls.__mro__ if issubclass(c, Trainer) and c.__module__.startswith("trl.")), None)


def _check_arguments(parent: type, args: Any, mixes: bool) -> None:
    # What samples completions has a temperature to do it at; no trainer on given data has.
    if (args.nexus or mixes) and "temperature" in {f.name for f in fields(args)}:
        raise ValueError(
            f"Nexus does not support {parent.__name__}: it generates text while it trains, which inside a window "
            f"would come from displaced weights. Use {parent.__name__} as it is (nexus=False and one plain dataset), "
            "or a trainer on given data, such as SFTTrainer or DPOTrainer."
        )
    if not any(c.__module__.startswith("trl.") for c in type(args).__mro__):
        config = parent.__name__.replace("Trainer", "Config")
        raise ValueError(
            f"{parent.__name__} needs arguments of its own, but got {type(args).__name__}. Pass {config}, or to set "
            f"Nexus fields: `@dataclass class Nexus{config}(NexusConfigMixin, {config}): pass`."
        )


def _check_sources(data: TrainingData) -> None:
    if data.mixture is not None:
        raise ValueError(
            "A Mixture is tokenized and packed already. Pass a dict of datasets of text, prompts or messages, or "
            "train on the mixture with NexusTrainer."
        )
    formats = {name: {c for c in _FORMATS if c in _columns(source)} for name, source in data.dataset.sources.items()}
    first = data.names[0]
    for name, columns in formats.items():
        if columns != formats[first]:  # the parent decides by the first source what the loss is
            raise ValueError(
                f"Source {name!r} has the columns {sorted(columns)}, but {first!r} has {sorted(formats[first])}. All "
                "sources need examples of one format: convert them, to messages say."
            )


def _columns(source: Any) -> list[str] | Mapping:
    names = getattr(source, "column_names", None)
    return names if names is not None else next(iter(source))


def _widen_adapters(model: torch.nn.Module) -> None:
    """TRL makes the adapters of a quantized model bfloat16; the frozen weights may have any dtype, they may not."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
