"""What a run will take, before anything is downloaded: parameters, tokens, steps and memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import SchedulerType

from .arguments import PretrainArguments, PretrainConfig
from .mixture.plan import PlanRow, format_plan, mixture_plan
from .models import count_parameters, model_config

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .mixture.loading import Mixture

__all__ = ["MemoryEstimate", "RunPlan", "estimate_memory", "plan_run", "print_plan"]

_SYMBOLS = "L layers, h width, kv width of keys, f feed-forward width, a heads, V vocabulary"


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Computed, not measured: bytes per device with a whole copy of the model on each.

    Attributes:
        parameters (`int`):
            Of the model, all trainable.
        per_parameter (`dict[str, int]`):
            Bytes per parameter, by what they are for.
        activations (`int`):
            Bytes kept for the backward pass of one micro-batch.
        formula (`str`):
            Of the activations.
    """

    parameters: int
    per_parameter: dict[str, int]
    activations: int
    formula: str

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.per_parameter.values()) * self.parameters + self.activations


def estimate_memory(arguments: PretrainArguments, parameters: int, devices: int) -> MemoryEstimate:
    """
    Memory per device, computed from the shapes.

    The activations count the tensors that a Llama layer of transformers saves for its backward pass with scaled
    dot-product attention (a test compares them with the tensors really saved), and the logits with their gradient.
    """
    m, t = arguments.model, arguments.training
    random = t.inner_direction == "random" and t.inner_lr > 0
    copies = (2 if random else 1) if t.nexus and t.snapshot_device is None else 0
    per_parameter = {"float32 weights": 4, "gradients": 4, "AdamW moments": 8}
    if copies:
        per_parameter["Nexus snapshot"] = 4 * copies
    if t.bf16:
        per_parameter["bfloat16 copies of the weights"] = 2  # autocast keeps them until the backward pass is over
    if devices > 1:
        per_parameter["DDP gradient buckets"] = 4
    h, ffn, heads = m.hidden_size, m.intermediate_size, m.num_attention_heads
    kv = h // heads * (m.num_key_value_heads or heads)
    if t.bf16:
        layer, layer_formula = 30 * h + 4 * kv + 8 * ffn + 4 * heads, "30h + 4kv + 8f + 4a"
    else:
        layer, layer_formula = 32 * h + 8 * kv + 16 * ffn + 4 * heads, "32h + 8kv + 16f + 4a"
    head = 12 * h + 12 * m.vocab_size
    if t.gradient_checkpointing:
        per_token = m.num_hidden_layers * 4 * h + layer + head
        formula = f"L * 4h + ({layer_formula}) + 12(h + V)"
    else:
        per_token = m.num_hidden_layers * layer + head
        formula = f"L * ({layer_formula}) + 12(h + V)"
    tokens = t.per_device_train_batch_size * arguments.data.sequence_length
    return MemoryEstimate(parameters, per_parameter, tokens * per_token, f"{tokens} tokens x ({formula}) bytes")


@dataclass(frozen=True)
class RunPlan:
    """
    A run in numbers.

    Attributes:
        parameters (`int`), devices (`int`):
            Of the model; processes that train.
        tokens_per_step (`int`):
            Of one outer step over all devices.
        steps (`int`, *optional*), tokens (`int`, *optional*):
            In all; unknown where they depend on data of unknown size. The tokens may be fewer than `steps *
            tokens_per_step`: the last window of an epoch has only the micro-batches that are left.
        mixture (`list[PlanRow]`, *optional*):
            What becomes of each training source.
    """

    parameters: int
    devices: int
    tokens_per_step: int
    steps: int | None
    tokens: int | None
    mixture: list[PlanRow] | None
    memory: MemoryEstimate


def plan_run(arguments: PretrainArguments, devices: int, tokens: Mapping[str, int] | None = None) -> RunPlan:
    """
    Compute the plan of a run.

    Args:
        arguments ([`PretrainArguments`]):
            The run.
        devices (`int`):
            Number of training processes.
        tokens (`Mapping[str, int]`, *optional*):
            Tokens of each training source; what the configuration states by default.

    Raises:
        ValueError: a cap on repetition that the sizes cannot meet, or a source smaller than one micro-batch.

    Example:
        >>> from hf_nexus.command_line import parse_arguments
        >>> from hf_nexus.planning import plan_run
        >>> plan = plan_run(parse_arguments(["--config", "130m", "--dry_run"]), devices=1)
        >>> round(plan.parameters / 1e6)
        132
    """
    t, length = arguments.training, arguments.data.sequence_length
    parameters = count_parameters(model_config(arguments.model, length))
    rows, window = t.per_device_train_batch_size * devices, t.gradient_accumulation_steps
    sources = arguments.mixture.train_sources
    known = tokens or {name: s.known_tokens for name, s in sources.items() if s.known_tokens is not None}
    steps: int | None = t.max_steps if t.max_steps > 0 else None
    total = None if steps is None else steps * window * rows * length
    mixture = None
    if len(known) == len(sources):
        weights = t.mixture_weights if isinstance(t.mixture_weights, dict) else arguments.mixture.weights(known)
        _check_sizes({name: size // length for name, size in known.items() if weights[name] > 0}, rows)
        epoch = sum(size // length for size in known.values()) // rows
        steps, micro_batches = _count_steps(t, epoch)
        total = micro_batches * rows * length
        caps = {name: source.max_epochs for name, source in sources.items()}
        mixture = mixture_plan(known, weights, total, caps)
    memory = estimate_memory(arguments, parameters, devices)
    return RunPlan(parameters, devices, window * rows * length, steps, total, mixture, memory)


def _check_sizes(sizes: Mapping[str, int], rows: int) -> None:
    for name, size in sizes.items():
        if size < rows:
            raise ValueError(
                f"sources.{name}: it has {size} rows, fewer than one micro-batch of {rows} ("
                "per_device_train_batch_size times devices). Lower per_device_train_batch_size or sequence_length, or "
                "add documents."
            )


def _count_steps(training: PretrainConfig, epoch: int) -> tuple[int, int]:
    """Outer steps and micro-batches of a run, from the micro-batches of an epoch, as the Trainer counts them."""
    window = training.gradient_accumulation_steps
    per_epoch = max(1, math.ceil(epoch / window))
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    epochs, rest = divmod(steps, per_epoch)
    return steps, epochs * epoch + min(rest * window, epoch)


def print_plan(
    arguments: PretrainArguments, plan: RunPlan, console: "Console", loaded: "Mixture | None" = None
) -> None:
    """Print a plan as tables; with the sizes and licences of the loaded mixture, where it is loaded."""
    console.print(_run_table(arguments, plan))
    if plan.mixture is not None:
        sources = arguments.mixture.sources
        licenses = {name: loaded.licenses[name] if loaded else source.license for name, source in sources.items()}
        sizes = {
            name: loaded.eval_tokens[name] if loaded else source.known_tokens
            for name, source in arguments.mixture.ood_sources.items()
        }
        console.print(format_plan(plan.mixture, licenses=licenses, ood_tokens=sizes))
    else:
        names = ", ".join(arguments.mixture.train_sources)
        console.print(f"The sizes of the sources ({names}) are known once they are tokenized; the plan follows then.")
    console.print(_memory_table(plan))
    console.print(f"Activations: {plan.memory.formula}\n({_SYMBOLS})", highlight=False)


def _run_table(arguments: PretrainArguments, plan: RunPlan) -> "Table":
    from rich.table import Table

    t, m = arguments.training, arguments.model
    table = Table(title=f"Plan of {arguments.config}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    shape = f"{m.num_hidden_layers} layers of width {m.hidden_size}, vocabulary {m.vocab_size}"
    table.add_row("parameters", f"{plan.parameters:,} ({shape})")
    factors = (
        f"{t.per_device_train_batch_size} rows x {arguments.data.sequence_length} tokens x "
        f"{t.gradient_accumulation_steps} inner steps on each device"
    )
    table.add_row("devices", str(plan.devices))
    table.add_row("tokens per step", f"{plan.tokens_per_step:,} ({factors})")
    table.add_row("steps", "unknown" if plan.steps is None else f"{plan.steps:,}")
    if plan.tokens is not None:
        table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens / plan.parameters:.1f} per parameter)")
    table.add_row("learning rate", _schedule(arguments, plan))
    table.add_row("Nexus", f"inner_lr {t.inner_lr}" if t.nexus else "off (plain accumulation)")
    return table


def _schedule(arguments: PretrainArguments, plan: RunPlan) -> str:
    t = arguments.training
    kind, kwargs = SchedulerType(t.lr_scheduler_type), t.lr_scheduler_kwargs
    if kind is not SchedulerType.WARMUP_STABLE_DECAY or plan.steps is None or not isinstance(kwargs, dict):
        return f"{t.learning_rate:g}, {kind.value}"
    warmup, decay = t.get_warmup_steps(plan.steps), kwargs.get("num_decay_steps", 0)
    stable = plan.steps - warmup - decay
    text = f"{t.learning_rate:g}: {warmup} steps up, {max(0, stable)} stable, {decay} down"
    if stable < 0:
        text += (
            "\n[yellow]The run ends before its schedule: lower warmup_steps and num_decay_steps (lr_scheduler_kwargs)."
        )
    return text


def _memory_table(plan: RunPlan) -> "Table":
    from rich.table import Table

    memory = plan.memory
    table = Table(title="Memory per device, computed (not measured)")
    table.add_column("")
    table.add_column("bytes per parameter", justify="right")
    table.add_column("size", justify="right")
    for what, size in memory.per_parameter.items():
        table.add_row(what, str(size), _size(size * memory.parameters))
    table.add_row("activations of a micro-batch", "", _size(memory.activations), end_section=True)
    table.add_row("total", "", _size(memory.total))
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
