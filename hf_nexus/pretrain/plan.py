"""The plan of a run, computed before anything is downloaded: parameters, tokens, steps, memory and time."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..mixture.plan import PlanRow, mixture_plan
from ..mixture.schedule import WindowCounts
from ..mixture.stages import Stage, stage_borders, stages_of
from .cost import CostEstimate, choose_sync, estimate_cost
from .fields import PretrainArguments
from .layout import layout_of
from .memory import MemoryEstimate, estimate_memory
from .model import count_parameters, joined_documents, model_config

__all__ = ["RunPlan", "plan_run"]


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a run."""

    parameters: int  # of the model
    devices: int  # training processes
    tokens_per_step: int  # per outer step, over all devices
    steps: int | None  # outer steps; None if they depend on data of unknown size, as the tokens
    tokens: int | None  # may be fewer than `steps * tokens_per_step`: the last window of an epoch may be short
    mixture: list[PlanRow] | None  # tokens and epochs of each training source; None if unknown
    stages: list[int]  # the first outer step of each
    memory: MemoryEstimate
    cost: CostEstimate
    checkpoint_copy: int  # bytes in host memory per process while a checkpoint is written; 0 if training waits for it
    joined: str | None  # why documents of a row attend to each other; None if they do not
    sync: str | None = None  # the choice of `inner_sync`, in words


def plan_run(arguments: PretrainArguments, devices: int, tokens: Mapping[str, int | None] | None = None) -> RunPlan:
    """
    Compute the plan of a run on that many devices. `tokens` are those of each training source, `None` for a stream of
    unknown size. They default to the stated sizes.

    Raises:
        ValueError: a limit on epochs that the sizes cannot meet, a source smaller than one micro-batch, or documents
            that the model cannot isolate.
    """
    t, length, layout = arguments.training, arguments.mixture.sequence_length, layout_of(arguments, devices)
    joined = joined_documents(arguments)
    parameters = count_parameters(model_config(arguments.model, length))
    rows = t.per_device_train_batch_size * layout.replicas
    window = t.gradient_accumulation_steps
    sources = arguments.mixture.train_sources
    sizes = dict(tokens) if tokens else {name: source.known_tokens for name, source in sources.items()}
    known = {name: size for name, size in sizes.items() if size is not None}
    streams = [name for name, source in sources.items() if source.streaming]
    finite = not streams and len(known) == len(sizes)
    windows = WindowCounts(window, sum(size // length for size in known.values()) // rows if finite else None)
    steps = windows.count(t.max_steps, t.num_train_epochs) if finite or t.max_steps > 0 else None
    total = None if steps is None else windows.micro_batches(steps) * rows * length
    if total is not None and total > 2**60:
        raise ValueError(f"max_steps: the run has {total:,} tokens. Lower it, or num_train_epochs.")
    borders, mixture = stage_borders(_stages(arguments, known), steps or 0), None
    if total is not None and borders and sizes.keys() == {*known, *streams}:
        used = {name for _, weights in borders for name, weight in weights.items() if weight > 0}
        _check_sizes({name: size // length for name, size in known.items() if name in used}, rows)
        caps = {name: source.max_epochs for name, source in sources.items()}
        in_tokens = [(windows.micro_batches(first) * rows * length, weights) for first, weights in borders]
        mixture = mixture_plan(sizes, in_tokens, total, caps)
    memory = estimate_memory(arguments, parameters, layout)
    return RunPlan(
        parameters=parameters,
        devices=devices,
        tokens_per_step=window * rows * length,
        steps=steps,
        tokens=total,
        mixture=mixture,
        stages=[first for first, _ in borders],
        memory=memory,
        cost=estimate_cost(arguments, parameters, window * rows * length, layout),
        checkpoint_copy=12 * parameters // memory.shards if t.checkpoint_async else 0,
        joined=joined,
        sync=choose_sync(arguments, parameters, window * rows * length, layout),
    )


def _stages(arguments: PretrainArguments, known: Mapping[str, int]) -> list[Stage]:
    """The stages, empty if they depend on unknown sizes."""
    given, config = arguments.training.mixture_weights, arguments.mixture
    if isinstance(given, dict | list):
        return stages_of(given)
    weighted = config.stages is not None or all(s.weight is not None for s in config.train_sources.values())
    return config.resolved_stages(known) if weighted or len(known) == len(config.train_sources) else []


def _check_sizes(sizes: Mapping[str, int], rows: int) -> None:
    for name, size in sizes.items():
        if size < rows:
            raise ValueError(
                f"sources.{name}: it has {size} rows, fewer than one micro-batch of {rows} "
                "(per_device_train_batch_size times devices). Lower per_device_train_batch_size or sequence_length, "
                "or add documents."
            )
