"""The Nexus fields of the training arguments."""

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import TrainingArguments
from transformers.utils import logging

from ..files import hidden, write_atomic
from ..mixture.stages import Weight, parse_stages
from ..schema import documented
from ..strict import Bound, check, check_fields, dump_yaml, parse_data, read_yaml
from ..tensors import accelerator_or_cpu
from .optimizers import muon_options

__all__ = [
    "SETTINGS_NAME",
    "NexusConfig",
    "NexusConfigMixin",
    "lower_is_better",
    "nexus_settings",
    "save_settings",
    "warn_of_changes",
]

logger = logging.get_logger(__name__)

# The Nexus settings, saved with each model.
SETTINGS_NAME = "nexus.yaml"

NonNegative = Annotated[float, Bound(least=0)]


@documented
@dataclass(repr=False)  # that of the Trainer's arguments hides the token
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
            Which ranks walk one path. `"global"`: all of them, and every inner gradient is reduced over all. `"node"`:
            the ranks of each machine, over which the inner gradients are reduced, and over which FSDP2 shards the
            weights. `"local"` (DDP only): each rank alone. Several paths are averaged once per outer step.
        node_size (`int`, *optional*):
            Number of ranks per path with `inner_sync="node"`. Defaults to the ranks of a machine.
        reduce_dtype (`str`, *optional*):
            `"bfloat16"` sends inner gradients in bfloat16 under DDP: half the traffic, at about three digits. An error
            where it has no effect: with `inner_sync="local"`, and for sharded models. FSDP2 reduces in bfloat16 with
            `bf16`.
        snapshot_device (`str`, *optional*):
            `"cpu"` keeps the extra copy of the parameters in host memory. By default it is on the device of the
            parameters.
        mixture_weights (`dict[str, float]`, `list[dict]` or JSON `str`, *optional*):
            Share of each source in the micro-batches, and so in the tokens of packed rows. Or stages, by fraction of
            training: `[{"until": 0.8, "weights": {...}}, {"until": 1.0, "weights": {...}}]`. Defaults to the weights
            of the mixture, or if there are none, to the numbers of rows.
        source_schedule (`str`, *optional*, defaults to `"random"`):
            How the source of each inner step is chosen: `"random"` draws it from the weights, as in the paper;
            `"stratified"` takes the source that is furthest below its target share. Two controls: `"mixed"` puts rows
            of all sources into each micro-batch, by their weights (each `loss/<source>` is then not logged);
            `"blocked"` draws one source for all inner steps of an outer step.
        gradient_cosine_steps (`int`, *optional*, defaults to 0):
            Log the gradient cosine of each pair of sources at the restored weights every this many outer steps, and
            at the end (0: never). One measurement costs about S^2/2 backward passes for S sources.
        matrix_optimizer (`str`, *optional*):
            `"muon"` trains the matrices between the embeddings and the head with torch's Muon, and the other
            parameters with `optim`, which must be AdamW. Muon's options are in `optim_args`, for example
            `"muon_lr=0.01,muon_momentum=0.95"`. `learning_rate` and `weight_decay` apply to both optimizers.
        upcast_weights (`bool`, *optional*, defaults to `True`):
            Make trainable weights of 16 bits float32 when the trainer is built, and compute in bfloat16 unless a type
            is chosen (`bf16`, `fp16`). When off, such weights are an error.
        save_dtype (`str`, *optional*):
            `"bfloat16"` saves and pushes the model with weights of this type. Checkpoints stay float32.
        checkpoint_async (`bool`, *optional*, defaults to `False`):
            Write model and optimizer of each checkpoint in sharded files while training goes on, from a copy in host
            memory. See docs/checkpoints.md.
        allow_mixture_change (`bool`, *optional*, defaults to `False`):
            Resume although the data is not that of the checkpoint. Streams are then read from their beginning.
        hub_flush_timeout (`float`, *optional*, defaults to 600):
            With `push_to_hub`, seconds to wait for the Hub at the end. What is not uploaded by then stays on disk, for
            `hf-nexus push`.
    """

    nexus: bool = True
    inner_lr: NonNegative = 0.05
    inner_lr_schedule: Literal["constant", "follow"] = "constant"
    inner_direction: Literal["gradient", "random"] = "gradient"
    inner_sync: Literal["global", "node", "local"] = "global"
    node_size: Annotated[int, Bound(least=1)] | None = None
    reduce_dtype: Literal["bfloat16"] | None = None
    snapshot_device: Literal["cpu"] | None = None
    mixture_weights: dict | str | list | None = None  # `str` second: the argument parser takes that one
    source_schedule: Literal["random", "stratified", "mixed", "blocked"] = "random"
    gradient_cosine_steps: Annotated[int, Bound(least=0)] = 0
    matrix_optimizer: Literal["muon"] | None = None
    upcast_weights: bool = True
    save_dtype: Literal["bfloat16"] | None = None
    checkpoint_async: bool = False
    allow_mixture_change: bool = False
    hub_flush_timeout: NonNegative = 600.0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, hidden(value) if name == "hub_token" else value)

    def __post_init__(self) -> None:
        # Accelerate connects no processes on an Apple GPU. Each would train a model alone, as without an accelerator.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and accelerator_or_cpu().type in ("cpu", "mps"):
            self.use_cpu = True
        check_fields(self, NexusConfigMixin)
        self.mixture_weights = _parse_weights(self.mixture_weights)
        if self.matrix_optimizer == "muon":
            muon_options(self.optim_args)  # type: ignore[attr-defined]
        args: Any = self  # joined with TrainingArguments
        if args.greater_is_better is None and lower_is_better(args.metric_for_best_model):
            args.greater_is_better = False
        super().__post_init__()  # type: ignore[misc]  # of the TrainingArguments it is joined with


@dataclass(repr=False)
class NexusConfig(NexusConfigMixin, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the fields of [`NexusConfigMixin`].

    Example:
        >>> from hf_nexus import NexusConfig
        >>> args = NexusConfig(output_dir="out", inner_lr=0.05, gradient_accumulation_steps=4, report_to="none")
        >>> args.inner_lr
        0.05
    """

    # `None`: not chosen. `--bf16` alone is true, as for the other flags.
    bf16: bool | None = field(default=None, metadata={"nargs": "?", "const": True})  # type: ignore[assignment]


def lower_is_better(metric: str | None) -> bool:
    """Whether a metric is a perplexity, which transformers takes for better if it is greater."""
    return metric is not None and metric.endswith("perplexity")


def _parse_weights(weights: Any) -> dict[str, float] | list[dict[str, Any]] | None:
    if weights is None:
        return None
    if isinstance(weights, str):
        weights = parse_data(weights, "mixture_weights", "JSON")
    if isinstance(weights, list):
        return [asdict(stage) for stage in parse_stages(weights, key="mixture_weights")]
    weights = check(weights, dict[str, Weight], "mixture_weights")
    if not sum(weights.values()) > 0:
        raise ValueError(f"mixture_weights={weights} is not allowed; give at least one source a weight above 0.")
    return {str(source): weight for source, weight in weights.items()}


def nexus_settings(args: TrainingArguments) -> dict[str, Any]:
    """The Nexus fields and k as plain data: saved with a model, and compared when a run is resumed."""
    # Fields that do not change what is trained.
    left_out = ("checkpoint_async", "allow_mixture_change", "hub_flush_timeout", "upcast_weights", "save_dtype")
    names = [f.name for f in fields(NexusConfigMixin) if f.name not in left_out]
    settings = {name: getattr(args, name) for name in names}
    return {**settings, "gradient_accumulation_steps": args.gradient_accumulation_steps}


def save_settings(settings: dict[str, Any], folder: str) -> None:
    """Save the Nexus settings next to a model."""
    write_atomic(Path(folder, SETTINGS_NAME), dump_yaml(settings))


def warn_of_changes(settings: dict[str, Any], checkpoint: str) -> None:
    """Warn of settings that are not those of a checkpoint."""
    path = Path(checkpoint, SETTINGS_NAME)
    saved = read_yaml(path) if path.is_file() else {}
    before, now = (int(of.get("paths", 1)) for of in (saved, settings))
    if saved and before != now:
        logger.warning(
            f"Resuming with {now} paths (inner_sync); the checkpoint was trained with {before}: another algorithm."
        )
    for name, value in settings.items():
        if name != "paths" and name in saved and saved[name] != value:
            logger.warning(f"Resuming with {name}={value!r}; the checkpoint was trained with {saved[name]!r}.")
