"""What a run has trained on so far, and how it went since the last log line."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

__all__ = ["TrainingMeter", "peak_flops"]

# Dense bfloat16 peak in FLOP/s, from the makers' data sheets, by the start of the device's name.
_PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or `None` if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for start, peak in _PEAK_FLOPS.items() if name.startswith(start)), None)


@dataclass
class _Interval:
    """Sums since the last log line; tensors stay on the device until then."""

    loss: dict[str, Any] = field(default_factory=lambda: defaultdict(float))
    tokens: dict[str, Any] = field(default_factory=lambda: defaultdict(int))
    unsettled: dict[str, Any] = field(default_factory=lambda: defaultdict(int))  # tokens not in the totals yet
    cosines: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)  # of each window, whether any of its losses was
    skipped: int = 0
    flos: float | None = None  # at its start
    started: float = field(default_factory=time.perf_counter)
    paused: float = 0.0


class TrainingMeter(TrainerCallback, ExportableState):
    """
    Counts what each source has contributed. The totals travel in `trainer_state.json` and survive a resume.

    Args:
        sources (`Sequence[str]`):
            Names of the sources; one nameless source, which is counted but not logged, for one plain dataset.
    """

    def __init__(self, sources: Sequence[str] = ("",)):
        self.sources = list(sources)
        self._begin(dict.fromkeys(self.sources, 0), 0, 0)

    def _begin(
        self, trained_tokens: dict[str, int], inner_steps_skipped: float, windows_dropped: int, unit: str = "tokens"
    ) -> None:
        self.trained_tokens = trained_tokens
        self.unit = unit  # "rows" where labels are not one per token
        self.inner_steps_skipped = inner_steps_skipped
        self.windows_dropped = windows_dropped
        self._interval = _Interval()
        self._window: list[Callable[[], None]] = []  # what to count once the optimizer has stepped

    def state(self) -> dict:
        """The totals up to the last [`settle`], for `trainer_state.json`."""
        totals = ("trained_tokens", "inner_steps_skipped", "windows_dropped", "unit")
        return {"args": {"sources": self.sources}, "attributes": {name: getattr(self, name) for name in totals}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start from the resumed checkpoint's totals, or from nothing."""
        totals: dict[str, Any] = {"trained_tokens": {}, "inner_steps_skipped": 0, "windows_dropped": 0}
        if state.global_step and (saved := state.stateful_callbacks.get(type(self).__name__)):
            totals |= saved["attributes"]
        # A resumed mixture may have gained sources, or lost some.
        known = totals["trained_tokens"]
        self._begin(**totals | {"trained_tokens": {source: known.get(source, 0) for source in self.sources}})

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Forget a window that was broken off."""
        self._window.clear()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Count the window; a checkpoint saved before this step repeats it, and must not count it twice."""
        for count in self._window:
            count()
        self._window.clear()

    def add_micro_batch(self, source: str, loss: Tensor, tokens: Tensor) -> None:
        """Note one trained micro-batch: `loss` is the sum over its tokens on this rank, both 0-d tensors."""
        self._window.append(partial(self._count_micro_batch, source, loss, tokens))

    def add_window(
        self, pseudo_gradient_norm: Tensor | None, steps_taken: int, steps_skipped: int, finite: Tensor
    ) -> None:
        """Note one outer step; `finite` (0-d bool) says whether any of its losses was."""
        self._window.append(partial(self._count_window, pseudo_gradient_norm, steps_taken, steps_skipped, finite))

    def _count_micro_batch(self, source: str, loss: Tensor, tokens: Tensor) -> None:
        interval = self._interval
        interval.loss[source] = interval.loss[source] + loss
        interval.tokens[source] = interval.tokens[source] + tokens
        interval.unsettled[source] = interval.unsettled[source] + tokens

    def _count_window(
        self, pseudo_gradient_norm: Tensor | None, steps_taken: int, steps_skipped: int, finite: Tensor
    ) -> None:
        self._interval.skipped += steps_skipped
        self._interval.finite.append(finite)
        if pseudo_gradient_norm is None:
            return
        self._interval.norms.append(pseudo_gradient_norm)
        if (k := steps_taken) > 1:
            self._interval.cosines.append((k * pseudo_gradient_norm**2 - 1) / (k - 1))

    def pause(self, seconds: float) -> None:
        """Leave a stretch of wall time (evaluation, saving) out of the throughput."""
        self._interval.paused += seconds

    def settle(self, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """
        Bring the totals up to date. All ranks must call it.

        Args:
            sum_over_ranks (`Callable[[Tensor], Tensor]`):
                Adds a 1-d tensor up over the ranks.
            device (`torch.device`):
                Where that tensor has to live.
        """
        interval = self._interval
        tokens = [interval.unsettled[source] for source in self.sources]
        *counts, skipped, ranks = sum_over_ranks(_stack([*tokens, interval.skipped, 1], device)).tolist()
        for source, count in zip(self.sources, counts, strict=True):
            self.trained_tokens[source] += round(count)
        self.inner_steps_skipped += skipped / ranks  # on average over the ranks, which may differ in local mode
        interval.unsettled.clear()
        interval.skipped = 0

    def read(
        self, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device, total_flos: float = 0.0
    ) -> dict[str, float]:
        """
        Settle, then return the figures since the last call. All ranks must call it.

        Args:
            sum_over_ranks (`Callable[[Tensor], Tensor]`), device (`torch.device`):
                As in [`settle`].
            total_flos (`float`, *optional*, defaults to 0):
                Floating-point operations of all ranks so far.

        Returns:
            `dict[str, float]`: `loss/<source>` for the sources met, `tokens/<source>` for all (tokens that carried
            loss, since the beginning; rows where labels are not one per token), `path_cosine`, `pseudo_gradient_norm`,
            `inner_steps_skipped` (since the beginning), `tokens_per_second` (or rows), and `mfu` where the device's
            peak is known. `loss` is among them, as NaN, if windows ran and none of their losses was finite.
        """
        self.settle(sum_over_ranks, device)
        interval, self._interval = self._interval, _Interval()
        seconds = time.perf_counter() - interval.started - interval.paused
        sums = [interval.loss[s] for s in self.sources] + [interval.tokens[s] for s in self.sources]
        # On one rank a window may have taken no step: sums and counts, not means, are what adds up.
        lists = [interval.cosines, interval.norms, interval.finite]
        sums += [x for values in lists for x in (sum(values), len(values))]
        *sums, cosine, cosines, norm, norms, finite, windows, ranks = sum_over_ranks(
            _stack([*sums, 1], device)
        ).tolist()
        losses, tokens = sums[: len(self.sources)], sums[len(self.sources) :]
        logs = {f"loss/{s}": x / n for s, x, n in zip(self.sources, losses, tokens, strict=True) if s and n}
        logs |= {f"tokens/{s}": count for s, count in self.trained_tokens.items() if s}
        if cosines:
            logs["path_cosine"] = cosine / cosines
        if norms:
            logs["pseudo_gradient_norm"] = norm / norms
        if windows:
            logs["inner_steps_skipped"] = self.inner_steps_skipped
            if not finite:
                logs["loss"] = math.nan
        if sum(tokens):
            logs["tokens_per_second"] = sum(tokens) / seconds
        if (peak := peak_flops(device)) and interval.flos is not None:
            logs["mfu"] = (total_flos - interval.flos) / seconds / (peak * ranks)
        self._interval.flos = total_flos
        return logs


def _stack(values: list, device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64  # float64 keeps token counts exact
    return torch.stack([torch.as_tensor(value, device=device).to(dtype) for value in values])
