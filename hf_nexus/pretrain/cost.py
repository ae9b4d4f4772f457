"""Time of a training run, computed from assumptions that a measurement can replace."""

from dataclasses import dataclass

from ..terminal import format_number
from .fields import PretrainArguments
from .layout import Layout

__all__ = ["CostEstimate", "estimate_cost"]


@dataclass(frozen=True)
class CostEstimate:
    """Computed time of one outer step."""

    devices: int
    sharding: str  # "ddp", "fsdp2", "tensor parallel" or "one device"
    # Seconds of arithmetic: `6 * parameters` operations per token (forward and backward, without the attention
    # scores), a third more with gradient checkpointing, at `mfu * peak_tflops` per device.
    compute: float
    sent: int  # bytes that each device sends in ring reductions
    links: tuple[str, ...]  # that it sends over: `link`, or `node_link` to the other devices of its machine
    during: float  # seconds of sending that the backward passes can hide
    after: float  # seconds of sending that they cannot hide
    formula: str  # of the arithmetic and of the bytes

    @property
    def best(self) -> float:
        """Seconds of a step that hides as much communication as possible."""
        return max(self.compute, self.during) + self.after

    @property
    def worst(self) -> float:
        """Seconds of a step that hides no communication."""
        return self.compute + self.during + self.after


def estimate_cost(
    arguments: PretrainArguments, parameters: int, tokens_per_step: int, layout: Layout, inner_sync: str | None = None
) -> CostEstimate:
    """
    Time of an outer step of `tokens_per_step` over all devices, from the assumptions in `arguments.hardware`, with
    another `inner_sync` if given.

    Raises:
        ValueError: the devices cannot be split into the paths of `inner_sync="node"`.
    """
    t, hardware, devices = arguments.training, arguments.hardware, layout.devices
    sync = (inner_sync or t.inner_sync) if t.nexus else "plain"
    again, again_formula = (4 / 3, " x 4/3") if t.activation_checkpointing else (1.0, "")
    if getattr(layout.model, "num_experts_per_tok", None) is not None:
        again_formula += " (an upper bound, since a token passes only some of the experts that N counts)"
    messages = _messages(arguments, parameters, layout, sync)
    seconds = [(m.size / (getattr(hardware, m.link) * 1e9), m.hidden) for m in messages]
    return CostEstimate(
        devices=devices,
        sharding="one device" if devices == 1 else layout.sharding if layout.replicas > 1 else "tensor parallel",
        compute=6 * parameters * tokens_per_step * again / (hardware.mfu * hardware.peak_tflops * 1e12 * devices),
        sent=round(sum(m.size for m in messages)),
        links=tuple(sorted({m.link for m in messages})),
        during=sum(time for time, hidden in seconds if hidden),
        after=sum(time for time, hidden in seconds if not hidden),
        formula=f"arithmetic 6N x tokens{again_formula} / (mfu x peak x W), sent "
        + (", ".join(m.formula for m in messages) or "0"),
    )


@dataclass(frozen=True)
class _Message:
    """What a device sends in a step for one purpose."""

    size: float  # bytes
    link: str  # the field of `HardwareArguments` with its speed
    hidden: bool  # whether backward passes can hide it
    formula: str


def _messages(arguments: PretrainArguments, parameters: int, layout: Layout, sync: str) -> list[_Message]:
    t, devices, replicas, machine = arguments.training, layout.devices, layout.replicas, layout.machine
    n, sharded, found = layout.weights(parameters), layout.sharded, []
    k, wire, size = t.gradient_accumulation_steps, 2 if t.reduce_dtype else 4, 2 if arguments.bf16 else 4
    path = layout.path() if sync == "node" else devices
    sync = "global" if sync == "node" and path == devices else sync
    reductions = k if sync in ("global", "node") else 1
    gathered = f"(2 x {k} gathers + {reductions} reductions) x {size}N"  # each micro-batch, scattered when reduced

    def link(ranks: int) -> str:
        """That of groups of so many devices in turn. A ring over several machines is as slow as the link of these."""
        return "node_link" if devices <= machine or machine % ranks == 0 else "link"

    if (tp := layout.tp) > 1:  # after attention and feed-forward, forward, backward and recomputed
        m = layout.model
        count = k * m.num_hidden_layers * (6 if t.activation_checkpointing else 4)
        tokens = t.per_device_train_batch_size * arguments.mixture.sequence_length
        formula = f"{count} reductions x {size}h x {tokens} tokens x 2 x {tp - 1}/{tp}"
        found.append(_Message(count * size * m.hidden_size * tokens * 2 * (tp - 1) / tp, link(tp), False, formula))
    if replicas == 1:
        return found
    if path < devices:
        formula = f"1 reduction x 4N/{path} x 2(W - {path})/W"
        found.append(_Message(n * 8 / path * (devices - path) / devices, link(devices), False, formula))
        if path > 1:
            inside, copies = n * (path - 1) / path, 3 * k * size if sharded else 2 * k * wire
            near = gathered if sharded else f"{k} reductions x 2 x {wire}N"
            found.append(_Message(copies * inside, link(path), True, f"in a path {near} x {path - 1}/{path}"))
            if not sharded:  # each rank has averaged a part
                formula = f"1 gather x 4N x {path - 1}/{path}"
                found.append(_Message(4 * inside, link(path), False, formula))
        return found
    if sharded:
        copies, formula = size * (2 * k + reductions), f"{gathered} x (W - 1)/W"
        formula += f" of N/{tp} (embeddings: N) over W/{tp}" if tp > 1 else ""
    else:
        wire = wire if sync == "global" else 4
        formula = f"{reductions} reduction{'s' * (reductions > 1)} x {wire}N x 2(W - 1)/W"
        copies = 2 * wire * reductions
    return [*found, _Message(n * copies * (replicas - 1) / replicas, link(devices), sync != "local", formula)]


def choose_sync(arguments: PretrainArguments, parameters: int, tokens_per_step: int, layout: Layout) -> str | None:
    """
    A line that names the `inner_sync` with the most ranks per path among those within 5 % of the fastest step, and
    the time of each. `None` if there is no choice: one device, tensor parallelism, or no update.
    """
    if layout.devices == 1 or not arguments.training.nexus or layout.tp > 1:
        return None
    choices = ["global", "node"] if layout.sharded else ["global", "node", "local"]
    try:
        layout.path()
    except ValueError:
        choices.remove("node")
    steps = {sync: estimate_cost(arguments, parameters, tokens_per_step, layout, sync).worst for sync in choices}
    best = next(sync for sync, seconds in steps.items() if seconds <= 1.05 * min(steps.values()))
    times = ", ".join(f"{sync} {format_number(seconds, 3)} s" for sync, seconds in steps.items())
    return f"{best} (steps without overlap: {times}; the largest groups of ranks within 5 % of the fastest)"
