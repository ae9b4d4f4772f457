"""Time of a training run, computed from assumptions that a measurement can replace."""

from dataclasses import dataclass

from .fields import PretrainArguments
from .memory import sharding_of

__all__ = ["CostEstimate", "estimate_cost"]


@dataclass(frozen=True)
class CostEstimate:
    """
    Computed time of one outer step.

    Attributes:
        devices, sharding:
            Number of devices, and `"ddp"`, `"fsdp2"` or `"one device"`.
        compute:
            Seconds of arithmetic: `6 * parameters` operations per token (forward and backward, without the attention
            scores), a third more with gradient checkpointing, at `mfu * peak_tflops` per device.
        sent, communication:
            Bytes that each device sends in ring reductions, and the seconds that this takes over `link`.
        overlaps:
            Whether they can be sent during the backward pass. One reduction at the end of a window cannot.
        formula:
            Formulas of the arithmetic and of the bytes.
    """

    devices: int
    sharding: str
    compute: float
    sent: int
    communication: float
    overlaps: bool
    formula: str

    @property
    def best(self) -> float:
        """Seconds of a step that hides as much communication as possible."""
        return max(self.compute, self.communication) if self.overlaps else self.worst

    @property
    def worst(self) -> float:
        """Seconds of a step that hides no communication."""
        return self.compute + self.communication


def estimate_cost(arguments: PretrainArguments, parameters: int, tokens_per_step: int, devices: int) -> CostEstimate:
    """Time of an outer step of `tokens_per_step` over all devices, from the assumptions in `arguments.hardware`."""
    t, hardware, sharding = arguments.training, arguments.hardware, sharding_of(arguments)
    k, others = t.gradient_accumulation_steps, (devices - 1) / devices
    again, again_formula = (4 / 3, " x 4/3") if t.gradient_checkpointing else (1.0, "")
    compute = 6 * parameters * tokens_per_step * again / (hardware.mfu * hardware.peak_tflops * 1e12 * devices)
    reductions = k if t.nexus and t.inner_sync == "global" else 1
    size = 2 if t.bf16 else 4
    if devices == 1:
        sharding, copies, sent_formula = "one device", 0, "0"
    elif sharding == "fsdp2":  # gathered twice for each micro-batch, and scattered while it is reduced
        copies = size * (2 * k + reductions)
        sent_formula = f"(2 x {k} gathers + {reductions} reductions) x {size}N x (W - 1)/W"
    else:
        copies = 2 * 4 * reductions
        sent_formula = f"{reductions} reduction{'s' * (reductions > 1)} x 4N x 2(W - 1)/W"
    sent = round(copies * parameters * others)
    return CostEstimate(
        devices=devices,
        sharding=sharding,
        compute=compute,
        sent=sent,
        communication=sent / (hardware.link * 1e9),
        overlaps=not (t.nexus and t.inner_sync == "local"),
        formula=f"arithmetic 6N x tokens{again_formula} / (mfu x peak x W), sent {sent_formula}",
    )
