"""Time of a training run, computed from assumptions that a measurement can replace."""

from dataclasses import dataclass

from .fields import PretrainArguments
from .memory import path_of, sharding_of
from .model import config_of

__all__ = ["CostEstimate", "estimate_cost"]


@dataclass(frozen=True)
class CostEstimate:
    """Computed time of one outer step."""

    devices: int
    sharding: str  # "ddp", "fsdp2" or "one device"
    # Seconds of arithmetic: `6 * parameters` operations per token (forward and backward, without the attention
    # scores), a third more with gradient checkpointing, at `mfu * peak_tflops` per device.
    compute: float
    # Bytes that each device sends in ring reductions: over `link`, and with `inner_sync="node"` also over `node_link`
    # to the devices of its machine.
    sent: int
    during: float  # seconds of sending that the backward passes can hide
    after: float  # seconds of sending that follow the last backward pass
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
    arguments: PretrainArguments, parameters: int, tokens_per_step: int, devices: int, inner_sync: str | None = None
) -> CostEstimate:
    """
    Time of an outer step of `tokens_per_step` over all devices, from the assumptions in `arguments.hardware`, with
    another `inner_sync` if given.
    """
    t, hardware, sharding = arguments.training, arguments.hardware, sharding_of(arguments)
    k, sync = t.gradient_accumulation_steps, (inner_sync or t.inner_sync) if t.nexus else "plain"
    again, again_formula = (4 / 3, " x 4/3") if t.activation_checkpointing else (1.0, "")
    if getattr(config_of(arguments), "num_experts_per_tok", None) is not None:
        again_formula += " (an upper bound, since a token passes only some of the experts that N counts)"
    compute = 6 * parameters * tokens_per_step * again / (hardware.mfu * hardware.peak_tflops * 1e12 * devices)
    path = path_of(arguments, devices)
    if sync == "node" and devices == path:
        sync = "global"
    reductions = k if sync == "global" else 1
    wire, size = (2 if t.reduce_dtype else 4), 2 if t.bf16 else 4
    inside, sharded = 0.0, sharding == "fsdp2"
    gathered = f"(2 x {k} gathers + {{}} reductions) x {size}N"  # for each micro-batch twice, scattered when reduced
    if devices == 1:
        sharding, copies, sent_formula = "one device", 0.0, "0"
    elif sync == "node":
        near = gathered.format(k) if sharded else f"({k} reductions x 2 x {wire}N + a gather of 4N)"
        inside = (3 * k * size if sharded else 2 * k * wire + 4) * (path - 1) / path
        copies = 2 * 4 / path * (devices - path) / devices
        sent_formula = f"1 reduction x 4N/{path} x 2(W - {path})/W, in a machine {near} x {path - 1}/{path}"
    elif sharded:
        copies = size * (2 * k + reductions) * (devices - 1) / devices
        sent_formula = f"{gathered.format(reductions)} x (W - 1)/W"
    else:
        wire = 4 if sync == "local" else wire
        copies = 2 * wire * reductions * (devices - 1) / devices
        sent_formula = f"{reductions} reduction{'s' * (reductions > 1)} x {wire}N x 2(W - 1)/W"
    over_link = copies * parameters / (hardware.link * 1e9)
    late = sync in ("node", "local")
    return CostEstimate(
        devices=devices,
        sharding=sharding,
        compute=compute,
        sent=round((copies + inside) * parameters),
        during=inside * parameters / (hardware.node_link * 1e9) + (0 if late else over_link),
        after=over_link if late else 0.0,
        formula=f"arithmetic 6N x tokens{again_formula} / (mfu x peak x W), sent {sent_formula}",
    )


def choose_sync(arguments: PretrainArguments, parameters: int, tokens_per_step: int, devices: int) -> str | None:
    """
    A line that names the `inner_sync` with the most ranks per path among those within 5 % of the fastest step, and
    the time of each. `None` if there is no choice: one device, or no update.
    """
    if devices == 1 or not arguments.training.nexus:
        return None
    choices = ("global", "node") if sharding_of(arguments) == "fsdp2" else ("global", "node", "local")
    steps = {sync: estimate_cost(arguments, parameters, tokens_per_step, devices, sync).worst for sync in choices}
    best = next(sync for sync, seconds in steps.items() if seconds <= 1.05 * min(steps.values()))
    times = ", ".join(f"{sync} {seconds:.3g} s" for sync, seconds in steps.items())
    return f"{best} (steps without overlap: {times}; the largest groups of ranks within 5 % of the fastest)"
