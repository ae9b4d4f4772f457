"""The Nexus fields of the training arguments."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from ..mixture.stages import parse_stages
from .optimizers import muon_options

__all__ = ["NexusConfig", "NexusConfigMixin", "nexus_settings"]

_CHOICES = {
    "inner_lr_schedule": ("constant", "follow"),
    "inner_direction": ("gradient", "random"),
    "inner_sync": ("global", "local"),
    "snapshot_device": (None, "cpu"),
    "source_schedule": ("random", "stratified"),
    "matrix_optimizer": (None, "muon"),
}


@dataclass
class NexusConfigMixin:
    """
    The fields that Nexus adds to any [`~transformers.TrainingArguments`] subclass. The number of inner steps k is
    `gradient_accumulation_steps`.

    Args:
        nexus (`bool`, *optional*, defaults to `True`):
            Apply the Nexus update. When off, the Trainer accumulates gradients as usual. A mixture is still sampled
            and logged per source.
        inner_lr (`float`, *optional*, defaults to 0.05):
            Length gamma of one inner step, in parameter space (the gradient is normalized). 0 averages the normalized
            gradients without moving: the control that isolates the path's effect.
        inner_lr_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or `"follow"`: `inner_lr * lr_t / peak lr` of the first parameter group.
        inner_direction (`str`, *optional*, defaults to `"gradient"`):
            `"gradient"`, or `"random"`: move along random directions of the same length (a control).
        inner_sync (`str`, *optional*, defaults to `"global"`):
            `"global"` reduces every inner gradient over the ranks. `"local"` (DDP only) lets each rank walk its own
            path and averages the pseudo-gradient once per outer step.
        snapshot_device (`str`, *optional*):
            `"cpu"` keeps the extra copy of the parameters in host memory. By default it is on the device of the
            parameters.
        mixture_weights (`dict[str, float]`, `list[dict]` or JSON `str`, *optional*):
            Share of each source in the micro-batches, and so in the tokens of packed rows. Or stages, by fraction of
            training: `[{"until": 0.8, "weights": {...}}, {"until": 1.0, "weights": {...}}]`. Defaults to the weights
            of the mixture, or if there are none, to the numbers of rows.
        source_schedule (`str`, *optional*, defaults to `"random"`):
            How the source of each inner step is chosen: `"random"` draws it from the weights, as in the paper;
            `"stratified"` takes the source that is furthest below its target share.
        gradient_cosine_steps (`int`, *optional*, defaults to 0):
            Log the gradient cosine of each pair of sources at the restored weights every this many outer steps
            (0: never). One measurement costs about S^2/2 backward passes for S sources.
        matrix_optimizer (`str`, *optional*):
            `"muon"` trains the matrices between the embeddings and the output layer with torch's Muon, and the other
            parameters with `optim`, which must be AdamW. Muon's options are in `optim_args`, for example
            `"muon_lr=0.01,muon_momentum=0.95"`. `learning_rate` and `weight_decay` apply to both optimizers.
        allow_mixture_change (`bool`, *optional*, defaults to `False`):
            Resume although the data is not that of the checkpoint. Streams are then read from their beginning.
        hub_flush_timeout (`float`, *optional*, defaults to 600):
            With `push_to_hub`, seconds to wait for the Hub at the end. What is not uploaded by then stays on disk, for
            `hf-nexus push`.
    """

    nexus: bool = field(
        default=True,
        metadata={
            "help": "Apply the Nexus update. If off, accumulate gradients on the same mixture with the same logs."
        },
    )
    inner_lr: float = field(
        default=0.05,
        metadata={"help": "Length gamma of a normalized inner step. 0: average normalized gradients without moving."},
    )
    inner_lr_schedule: str = field(
        default="constant", metadata={"help": "'constant', or 'follow': scale inner_lr with the learning rate."}
    )
    inner_direction: str = field(
        default="gradient",
        metadata={"help": "'gradient', or 'random': a control with random steps of the same length."},
    )
    inner_sync: str = field(
        default="global",
        metadata={
            "help": "'global': reduce every inner gradient over the ranks. 'local': reduce once per outer step."
        },
    )
    snapshot_device: str | None = field(
        default=None, metadata={"help": "'cpu' keeps the extra copy of the parameters in host memory."}
    )
    mixture_weights: dict | str | list | None = field(  # `str` second: the argument parser takes that one
        default=None, metadata={"help": 'Share of each source, as JSON: \'{"text": 0.6, "code": 0.4}\'. Or stages.'}
    )
    source_schedule: str = field(
        default="random",
        metadata={
            "help": "'random': draw the source of each inner step. 'stratified': take the one most below its share."
        },
    )
    gradient_cosine_steps: int = field(
        default=0, metadata={"help": "Log gradient cosines between the sources every this many outer steps. 0: never."}
    )
    matrix_optimizer: str | None = field(
        default=None,
        metadata={
            "help": "'muon': torch's Muon for the hidden matrices, AdamW (`optim`) for the other parameters. Options "
            "in optim_args: 'muon_lr=0.02,muon_momentum=0.95'."
        },
    )
    allow_mixture_change: bool = field(
        default=False,
        metadata={"help": "Resume although the data is not that of the checkpoint. Streams start at their beginning."},
    )
    hub_flush_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds to wait for the Hub at the end. `hf-nexus push` sends the rest later."},
    )

    def __post_init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise each process would train a model alone, without a message
        self.mixture_weights = _parse_weights(self.mixture_weights)
        self.inner_lr = float(self.inner_lr)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; use one of {list(allowed)}.")
        if self.matrix_optimizer is not None:
            muon_options(self.optim_args)  # type: ignore[attr-defined]
        if not (math.isfinite(self.inner_lr) and self.inner_lr >= 0):
            raise ValueError(
                f"inner_lr={self.inner_lr} is not allowed; it must be finite and >= 0 (0.05 is the default)."
            )
        if self.gradient_cosine_steps < 0:
            raise ValueError(f"gradient_cosine_steps={self.gradient_cosine_steps} is not allowed; use 0 for never.")
        self.hub_flush_timeout = float(self.hub_flush_timeout)
        if not (math.isfinite(self.hub_flush_timeout) and self.hub_flush_timeout >= 0):
            raise ValueError(
                f"hub_flush_timeout={self.hub_flush_timeout} is not allowed; it must be finite and >= 0 seconds."
            )
        super().__post_init__()  # type: ignore[misc]  # of the TrainingArguments it is joined with


@dataclass
class NexusConfig(NexusConfigMixin, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the fields of [`NexusConfigMixin`].

    Example:
        >>> from hf_nexus import NexusConfig
        >>> args = NexusConfig(output_dir="out", inner_lr=0.05, gradient_accumulation_steps=4, report_to="none")
        >>> args.inner_lr
        0.05
    """


def _parse_weights(weights: dict | list | str | None) -> dict[str, float] | list[dict[str, Any]] | None:
    if weights is None:
        return None
    fix = 'Pass a mapping of source to share, on the command line as JSON: \'{"text": 0.6, "code": 0.4}\'.'
    if isinstance(weights, str):
        try:
            weights = json.loads(weights)
        except json.JSONDecodeError as error:
            raise ValueError(f"mixture_weights={weights!r} is not valid JSON ({error}). {fix}") from error
    if isinstance(weights, list):
        return [asdict(stage) for stage in parse_stages(weights, key="mixture_weights")]
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"mixture_weights={weights!r} is not a non-empty mapping. {fix}")
    for source, weight in weights.items():
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not (math.isfinite(weight) and weight >= 0)
        ):
            raise ValueError(f"mixture_weights[{source!r}]={weight!r} is not a finite number >= 0. {fix}")
    if sum(weights.values()) <= 0:
        raise ValueError(f"mixture_weights={weights} sum to zero. {fix}")
    return {str(source): float(weight) for source, weight in weights.items()}


def nexus_settings(args: TrainingArguments) -> dict[str, Any]:
    """The Nexus fields and k as plain data: saved with a model, and compared when a run is resumed."""
    left_out = ("allow_mixture_change", "hub_flush_timeout")  # they do not change what is trained
    names = [f.name for f in fields(NexusConfigMixin) if f.name not in left_out]
    settings = {name: getattr(args, name) for name in names}
    return {**settings, "gradient_accumulation_steps": args.gradient_accumulation_steps}
