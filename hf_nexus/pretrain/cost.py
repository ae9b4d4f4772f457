"""Time and price of a training run, computed from inputs that are assumptions until they are measured."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .fields import HardwareArguments, PretrainArguments
from .memory import format_bytes, sharding_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CostEstimate", "cost_table", "estimate_cost"]


@dataclass(frozen=True)
class CostEstimate:
    """
    Computed, not measured: what one outer step takes.

    Attributes:
        devices (`int`), sharding (`str`):
            What it is computed for; `"ddp"` or `"fsdp2"`.
        compute (`float`):
            Seconds of arithmetic: `6 * parameters` operations per token (forward and backward; the scores of the
            attention are not counted), a third more with gradient checkpointing, at `mfu * peak_tflops` per device.
        sent (`int`):
            Bytes that each device sends, as rings do it.
        communication (`float`):
            Seconds to send them over `link`.
        overlaps (`bool`):
            Whether they can be sent during the backward pass. One reduction at the end of a window cannot.
        formula (`str`):
            Of the arithmetic and of the bytes.
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
        """Seconds of a step that hides as much of what it sends as can be hidden."""
        return max(self.compute, self.communication) if self.overlaps else self.worst

    @property
    def worst(self) -> float:
        """Seconds of a step that hides nothing."""
        return self.compute + self.communication


def estimate_cost(arguments: PretrainArguments, parameters: int, tokens_per_step: int, devices: int) -> CostEstimate:
    """
    Time of an outer step, computed.

    Args:
        arguments ([`PretrainArguments`]):
            The run, whose `hardware` holds the assumptions.
        parameters (`int`):
            Of the model.
        tokens_per_step (`int`):
            Of an outer step, over all devices.
        devices (`int`):
            Number of training processes.

    Example:
        >>> from hf_nexus.pretrain.parsing import parse_arguments
        >>> from hf_nexus.pretrain.cost import estimate_cost
        >>> arguments = parse_arguments(["--config", "3b", "--dry_run", "--peak_tflops", "1000", "--mfu", "0.5"])
        >>> estimate_cost(arguments, 3_000_000_000, 2**21, devices=64).compute
        1.179648
    """
    t, hardware, sharding = arguments.training, arguments.hardware, sharding_of(arguments)
    k, others = t.gradient_accumulation_steps, (devices - 1) / devices
    again, again_formula = (4 / 3, " x 4/3") if t.gradient_checkpointing else (1.0, "")
    compute = 6 * parameters * tokens_per_step * again / (hardware.mfu * hardware.peak_tflops * 1e12 * devices)
    reductions = k if t.nexus and t.inner_sync == "global" else 1
    size = 2 if t.bf16 else 4
    if devices == 1:
        sharding, copies, sent_formula = "one device", 0, "0"
    elif sharding == "fsdp2":  # twice gathered for each micro-batch, and scattered while it is reduced
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


def cost_table(cost: CostEstimate, hardware: HardwareArguments, steps: int | None) -> "Table":
    """The estimate as a table, for the whole run where its number of steps is known."""
    from rich.table import Table

    table = Table(title="Time, computed (not measured) from the inputs in brackets", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    assumed = f"--peak_tflops {hardware.peak_tflops:g} --mfu {hardware.mfu:g}"
    table.add_row("arithmetic per step", f"{cost.compute:.3g} s ({assumed})")
    if cost.devices > 1:
        sent = f"{cost.communication:.3g} s for {format_bytes(cost.sent)} per device (--link {hardware.link:g})"
        table.add_row(f"sent per step, {cost.sharding}", sent)
        hides = (
            "as the bytes hide behind the backward pass or not" if cost.overlaps else "all sent after the last pass"
        )
        table.add_row("step", f"{_range(cost.best, cost.worst, 's')}, {hides}")
    if steps is not None:
        days = [steps * seconds / 86400 for seconds in (cost.best, cost.worst)]
        hours = [24 * cost.devices * number for number in days]
        table.add_row("run", f"{_range(days[0], days[1], 'days')} for {steps:,} steps")
        table.add_row("device hours", _range(hours[0], hours[1]))
        if (price := hardware.price_per_hour) is not None:
            table.add_row("price", f"{_range(hours[0] * price, hours[1] * price)} (--price_per_hour {price:g})")
    return table


def _range(low: float, high: float, unit: str = "") -> str:
    first, last = _three(low), _three(high)
    return f"{first if first == last else f'{first} to {last}'} {unit}".strip()


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"
