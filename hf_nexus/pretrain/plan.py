"""What a run will take, before anything is downloaded: parameters, tokens, steps, memory and time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import SchedulerType

from ..mixture.isolation import choose_isolation
from ..mixture.plan import PlanRow, mixture_plan
from ..mixture.plan_tables import plan_table, stage_table
from ..mixture.stages import stage_borders, weight_stages
from .cost import CostEstimate, cost_table, estimate_cost
from .fields import PretrainArguments, PretrainConfig
from .memory import SYMBOLS, MemoryEstimate, attention_of, estimate_memory, memory_table
from .model import count_parameters, model_config

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..mixture.loading import Mixture

__all__ = ["RunPlan", "plan_run", "print_plan"]


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
        stages (`list[int]`):
            The first outer step of each stage.
        memory ([`~memory.MemoryEstimate`]), cost ([`~plan_cost.CostEstimate`]):
            Computed from the shapes, and from what is assumed of the hardware.
    """

    parameters: int
    devices: int
    tokens_per_step: int
    steps: int | None
    tokens: int | None
    mixture: list[PlanRow] | None
    stages: list[int]
    memory: MemoryEstimate
    cost: CostEstimate


def plan_run(arguments: PretrainArguments, devices: int, tokens: Mapping[str, int | None] | None = None) -> RunPlan:
    """
    Compute the plan of a run.

    Args:
        arguments ([`PretrainArguments`]):
            The run.
        devices (`int`):
            Number of training processes.
        tokens (`Mapping[str, int | None]`, *optional*):
            Tokens of each training source, `None` for a stream of unknown size; what the configuration states by
            default.

    Raises:
        ValueError: a cap on repetition that the sizes cannot meet, a source smaller than one micro-batch, streaming
            sources without `max_steps`, or documents that the attention cannot isolate.

    Example:
        >>> from hf_nexus.pretrain.parsing import parse_arguments
        >>> from hf_nexus.pretrain.plan import plan_run
        >>> plan = plan_run(parse_arguments(["--config", "130m", "--dry_run"]), devices=1)
        >>> round(plan.parameters / 1e6)
        132
    """
    t, length = arguments.training, arguments.mixture.sequence_length
    choose_isolation(arguments.mixture.isolate_documents, attention_of(arguments))
    parameters = count_parameters(model_config(arguments.model, length))
    rows, window = t.per_device_train_batch_size * devices, t.gradient_accumulation_steps
    sources = arguments.mixture.train_sources
    sizes = dict(tokens) if tokens else {name: source.known_tokens for name, source in sources.items()}
    known = {name: size for name, size in sizes.items() if size is not None}
    streams = [name for name, source in sources.items() if source.streaming]
    steps: int | None = t.max_steps if t.max_steps > 0 else None
    if streams and steps is None:
        raise ValueError(f"max_steps: missing, and the streaming source {streams[0]!r} has no end. Set it.")
    total = None if steps is None else steps * window * rows * length
    if not streams and len(known) == len(sizes):
        steps, micro_batches = _count_steps(t, sum(size // length for size in known.values()) // rows)
        total = micro_batches * rows * length
    stages, mixture = _weights(arguments, known), None
    borders = stage_borders(stages or [], steps or 0, window)
    if steps is not None and total is not None and borders and sizes.keys() == {*known, *streams}:
        used = {name for _, weights in borders for name, weight in weights.items() if weight > 0}
        _check_sizes({name: size // length for name, size in known.items() if name in used}, rows)
        caps = {name: source.max_epochs for name, source in sources.items()}
        in_tokens = [(first * rows * length, weights) for first, weights in borders]
        mixture = mixture_plan(sizes, in_tokens, total, caps)
    first_steps = [first // window for first, _ in borders]
    memory = estimate_memory(arguments, parameters, devices)
    cost = estimate_cost(arguments, parameters, window * rows * length, devices)
    return RunPlan(parameters, devices, window * rows * length, steps, total, mixture, first_steps, memory, cost)


def _weights(arguments: PretrainArguments, known: Mapping[str, int]) -> list[tuple[float, dict[str, float]]] | None:
    """`(until, weights)` of each stage, `None` where they depend on sizes that are not known."""
    given, config = arguments.training.mixture_weights, arguments.mixture
    if isinstance(given, dict | list):
        return weight_stages(given)
    weighted = config.stages is not None or all(s.weight is not None for s in config.train_sources.values())
    return config.stage_weights(known) if weighted or len(known) == len(config.train_sources) else None


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
        console.print(plan_table(plan.mixture, licenses=licenses, ood_tokens=sizes))
        if len(plan.stages) > 1:
            assert plan.steps is not None
            ends = [*plan.stages[1:], plan.steps]
            titles = [f"steps {a:,} to {b:,}" for a, b in zip(plan.stages, ends, strict=True)]
            console.print(stage_table(plan.mixture, titles))
    else:
        names = ", ".join(arguments.mixture.train_sources)
        console.print(f"The sizes of the sources ({names}) are known once they are tokenized; the plan follows then.")
    console.print(memory_table(plan.memory))
    console.print(f"Activations: {plan.memory.formula}\n({SYMBOLS})", highlight=False)
    if arguments.model.accelerators > 0:  # what is assumed of the hardware is an accelerator's
        console.print(cost_table(plan.cost, arguments.hardware, plan.steps))
        console.print(f"Time: {plan.cost.formula}\n(N parameters, W devices)", highlight=False)


def _run_table(arguments: PretrainArguments, plan: RunPlan) -> "Table":
    from rich.table import Table

    t, m = arguments.training, arguments.model
    table = Table(title=f"Plan of {arguments.config}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    shape = f"{m.num_hidden_layers} layers of width {m.hidden_size}, vocabulary {m.vocab_size}"
    table.add_row("parameters", f"{plan.parameters:,} ({shape})")
    factors = (
        f"{t.per_device_train_batch_size} rows x {arguments.mixture.sequence_length} tokens x "
        f"{t.gradient_accumulation_steps} inner steps on each device"
    )
    table.add_row("devices", str(plan.devices))
    table.add_row("tokens per step", f"{plan.tokens_per_step:,} ({factors})")
    table.add_row("steps", "unknown" if plan.steps is None else f"{plan.steps:,}")
    if plan.tokens is not None:
        table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens / plan.parameters:.1f} per parameter)")
    table.add_row("learning rate", _schedule(arguments, plan))
    table.add_row("documents", _documents(arguments))
    table.add_row("Nexus", f"inner_lr {t.inner_lr}" if t.nexus else "off (plain accumulation)")
    return table


def _documents(arguments: PretrainArguments) -> str:
    wanted, attention = arguments.mixture.isolate_documents, attention_of(arguments)
    if choose_isolation(wanted, attention):
        return f"an EOS ends each; no attention from one to another ({attention}, positions restart)"
    why = "isolate_documents is off" if wanted is False else f"{attention} cannot keep them apart"
    return f"an EOS ends each; attention reaches across them in a row ({why})"


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
