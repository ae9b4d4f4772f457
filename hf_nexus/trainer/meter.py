"""Totals of a run, and averages since the last log line."""

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..files import read_json
from ..mixture.step_effects import StepEffects
from ..nexus import Nexus
from .distributed import sum_over_ranks
from .window import Window

__all__ = ["TOTALS_NAME", "TrainingMeter", "peak_flops", "read_totals"]

logger = logging.get_logger(__name__)

TOTALS_NAME = "totals.json"

# Dense bfloat16 peak in FLOP/s, from the makers' data sheets. The name of a device may go on with its memory or form.
_PEAK_FLOPS = {
    "NVIDIA GB200": 2500e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or `None` if it is not known."""
    if device.type != "cuda":
        return None
    return _PEAK_FLOPS.get(re.sub(r"(-\S+| \d+GB?( \S+)?)$", "", torch.cuda.get_device_name(device)))


def read_totals(checkpoint: str | None) -> dict[str, Any]:
    """
    The [`~TrainingMeter.state`] in a checkpoint, empty if it has none, as one of the Trainer.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(checkpoint or "", TOTALS_NAME)
    if checkpoint is None or not path.is_file():
        return {}
    return dict(read_json(path, "Resume from another checkpoint."))


# One more number per source: with and without Nexus, the meter gets the rows of each micro-batch that took a step, and
# as 0-d tensors on the device its summed loss and its loss tokens (there may be none), all on its rank. `read` sums
# over ranks. The progress bar, plots, cards and tests of several ranks take chosen keys only. The number also needs,
# - if it is a maximum: `max_over_ranks(tensor)` from `trainer/distributed.py`, elementwise, of -inf on a rank that has
#   no value; a NaN may get lost;
# - if it counts inner steps: `add_walk` in place of `_count_micro_batch`;
# - if it is a count: the division by `_copies`, as of tokens; sources that were not seen have 0;
# - if it counts since the beginning: `update_totals`, `state` and `begin`, `tests/trainer/test_resume.py`,
#   `docs/checkpoints.md`;
# - if other counts of a micro-batch are needed: `trainer/window.py` (`summed`); if other content of its rows:
#   `mixture/tags.py` (`MicroBatchTag`); and their tests.
@dataclass
class _Interval:
    """
    Sums since the last log line, given to `add_*`, counted by `_count_*` and logged by `read`. Tensors stay on the
    device until then. Those of `new_*` are since the last update of the totals, which a checkpoint makes as well: a
    log line must not divide one of them by another sum.
    """

    loss: dict[str, Any] = field(default_factory=lambda: defaultdict(float))  # of micro-batches of one source
    tokens: dict[str, Any] = field(default_factory=lambda: defaultdict(int))  # of micro-batches of one source
    mixed_tokens: Any = 0  # of all other micro-batches
    new_tokens: dict[str, Any] = field(default_factory=lambda: defaultdict(int))
    new_rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    cosine: Any = 0  # of the paths of windows, of which these were `cosines`
    cosines: int = 0
    norm: Any = 0  # of their pseudo-gradients, of which these were `norms`
    norms: int = 0
    finite: Any = 0  # windows with a finite loss
    windows: int = 0
    new_skipped: int = 0  # inner steps
    flos: float | None = None  # at the start of the interval
    started: float = field(default_factory=time.perf_counter)
    paused: float = 0.0


class TrainingMeter:
    """
    Counts losses and tokens of each source. The totals are saved in `totals.json` of a checkpoint and resumed from it.

    A window counts after its optimizer step, as [`~hf_nexus.mixture.step_effects.StepEffects`].

    `masked` has the tokens of a row of each source that is trained on a part of its tokens. `copies` is the number of
    ranks that read the same rows, which count once.
    """

    def __init__(
        self,
        sources: Sequence[str],
        device: torch.device,
        masked: Mapping[str, int] | None = None,
        copies: int = 1,
    ):
        self.sources = list(sources)
        self._device = device
        self._masked, self._copies = masked or {}, copies
        self.begin({})
        self._began: float | None = None  # when training began, while it runs

    @property
    def seconds(self) -> float:
        """Wall time of training so far, over all sessions of the run."""
        return self._seconds if self._began is None else self._seconds + time.perf_counter() - self._began

    def state(self) -> dict[str, Any]:
        """The totals up to the last update, in the form that `totals.json` has."""
        totals = ("trained_tokens", "rows", "inner_steps_skipped", "unit", "seconds")
        return {name: getattr(self, name) for name in totals}

    def save(self, folder: str | Path) -> None:
        """Write the totals, which are those of all ranks, into a checkpoint."""
        Path(folder, TOTALS_NAME).write_text(json.dumps(self.state(), indent=1), encoding="utf-8")

    def begin(self, totals: Mapping[str, Any]) -> None:
        """Start from the [`~TrainingMeter.state`] of a checkpoint, or at zero."""
        # A resumed mixture may have more or fewer sources.
        self.trained_tokens: dict[str, int]  # loss tokens (or rows, see `unit`) of each source over all ranks
        self.rows: dict[str, int]  # rows of each source over all ranks; a plain dataset has the empty name
        self.trained_tokens, self.rows = (
            {source: totals.get(name, {}).get(source, 0) for source in self.sources}
            for name in ("trained_tokens", "rows")
        )
        # Inner steps whose gradient was zero or not finite, on average over the ranks; none without Nexus.
        self.inner_steps_skipped: float = totals.get("inner_steps_skipped", 0)
        self._seconds: float = totals.get("seconds", 0.0)  # of the sessions that have ended
        self._began = time.perf_counter()
        self.unit: str = totals.get("unit", "tokens")  # or "rows", where labels are not one per token
        self._interval = _Interval()
        self._pauses = 0  # of those that are not over, one inside the other
        self._effects = StepEffects()
        self._warned = False  # of a window without a usable gradient

    def end(self) -> None:
        """Stop the time of training."""
        self._seconds, self._began = self.seconds, None

    # ---- Counting ----

    def begin_window(self, step: int, unit: str) -> None:
        """
        Begin the window of an outer step, whose losses per source are of tokens or `"rows"`. An interrupted window of
        the same step is discarded.
        """
        self._effects.begin(step)
        self.unit = unit

    def add_micro_batch(self, rows: Mapping[str, int], loss: Tensor, tokens: Tensor) -> None:
        """
        Add a trained micro-batch: its rows by source, the sum of its loss over its loss tokens on this rank, and their
        number, both 0-d. The loss of a mixed one counts for no source, and its tokens in proportion to the rows.
        """
        self._effects.add(partial(self._count_micro_batch, rows, loss, tokens))

    def add_walk(self, window: Window, losses: Tensor, nexus: Nexus) -> None:
        """Add a window that was walked: its path, and its micro-batches with their mean losses, (k,)."""
        cosine = nexus.path_cosine if nexus.steps_taken > 1 else None
        path = nexus.pseudo_gradient_norm, cosine, len(losses) - nexus.steps_taken, losses.isfinite().any()
        self._effects.add(partial(self._count_path, *path))
        if not nexus.steps_taken and not self._warned:
            self._warned = True
            logger.warning(
                f"Step {self._effects.step}: no inner step had a usable gradient (zero or not finite), so the "
                "weights stay as they are. Further steps like this show up in inner_steps_skipped only."
            )
        for i, taken in enumerate(nexus.taken):
            if taken:
                self.add_micro_batch(*window.summed(i, losses[i]))

    def _count_micro_batch(self, rows: Mapping[str, int], loss: Tensor, tokens: Tensor) -> None:
        interval = self._interval
        for source, count in rows.items():
            share = tokens if len(rows) == 1 else tokens * (count / sum(rows.values()))
            interval.new_tokens[source] = interval.new_tokens[source] + share
            interval.new_rows[source] += count
        if len(rows) > 1:
            interval.mixed_tokens = interval.mixed_tokens + tokens
            return
        [source] = rows
        interval.loss[source] = interval.loss[source] + loss
        interval.tokens[source] = interval.tokens[source] + tokens

    def _count_path(self, norm: Tensor | None, cosine: Tensor | None, skipped: int, finite: Tensor) -> None:
        """`skipped` inner steps had no usable gradient; `finite` says whether any loss was finite (0-d bool)."""
        interval = self._interval
        interval.new_skipped += skipped
        interval.finite, interval.windows = interval.finite + finite, interval.windows + 1
        if norm is not None:
            interval.norm, interval.norms = interval.norm + norm, interval.norms + 1
        if cosine is not None:
            interval.cosine, interval.cosines = interval.cosine + cosine, interval.cosines + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the wall time inside the context (evaluation, saving) out of the throughput."""
        started = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:  # a callback may evaluate another set at the end of an evaluation
                self._interval.paused += time.perf_counter() - started

    # ---- Reading ----

    def update_totals(self, step: int) -> None:
        """Bring the totals up to date with all windows before an outer step. All ranks must call it."""
        self._effects.apply(step)
        interval = self._interval
        tokens, rows = ([new[source] for source in self.sources] for new in (interval.new_tokens, interval.new_rows))
        *counts, skipped, ranks = sum_over_ranks(self._stack([*tokens, *rows, interval.new_skipped, 1])).tolist()
        for i, source in enumerate(self.sources):
            self.trained_tokens[source] += round(counts[i] / self._copies)
            self.rows[source] += round(counts[len(self.sources) + i] / self._copies)
        self.inner_steps_skipped += skipped / ranks  # ranks may differ in local mode
        interval.new_tokens.clear()
        interval.new_rows.clear()
        interval.new_skipped = 0

    def read(self, step: int, total_flos: float = 0.0) -> dict[str, float]:
        """
        Update the totals, and return what is logged since the last call. All ranks must call it.

        Returns:
            `dict[str, float]`: `loss/<source>` for the sources since the last call (not of mixed micro-batches),
            `tokens/<source>` for all (since the beginning), `tokens_read/<source>` for those that are trained on a
            part of their tokens, `path_cosine`, `pseudo_gradient_norm`, `inner_steps_skipped` (since the beginning),
            `tokens_per_second` (or rows), and `mfu` if the device's peak is known. `loss` is NaN if windows ran and
            none of their losses was finite.
        """
        self.update_totals(step)
        interval, self._interval = self._interval, _Interval()
        seconds = time.perf_counter() - interval.started - interval.paused
        sums = [interval.loss[s] for s in self.sources] + [interval.tokens[s] for s in self.sources]
        # A rank may have windows without a step. Sums and counts can be added over ranks, but means cannot.
        sums += [interval.mixed_tokens, interval.cosine, interval.cosines, interval.norm, interval.norms]
        sums += [interval.finite, interval.windows]
        summed = sum_over_ranks(self._stack([*sums, 1])).tolist()
        *sums, mixed, cosine, cosines, norm, norms, finite, windows, ranks = summed
        losses, tokens = sums[: len(self.sources)], sums[len(self.sources) :]
        logs = {f"loss/{s}": x / n for s, x, n in zip(self.sources, losses, tokens, strict=True) if s and n}
        logs |= {f"tokens/{s}": count for s, count in self.trained_tokens.items() if s}
        logs |= {f"tokens_read/{s}": self.rows[s] * length for s, length in self._masked.items()}
        if cosines:
            logs["path_cosine"] = cosine / cosines
        if norms:
            logs["pseudo_gradient_norm"] = norm / norms
        if windows:
            logs["inner_steps_skipped"] = self.inner_steps_skipped
            if not finite:
                logs["loss"] = math.nan
        if total := sum(tokens) + mixed:
            logs["tokens_per_second"] = total / self._copies / seconds
        if (peak := peak_flops(self._device)) and interval.flos is not None:
            logs["mfu"] = (total_flos - interval.flos) / seconds / (peak * ranks * self._copies)
        self._interval.flos = total_flos
        return logs

    def _stack(self, values: list) -> Tensor:
        dtype = torch.float32 if self._device.type == "mps" else torch.float64  # float64 keeps token counts exact
        return torch.stack([torch.as_tensor(value, device=self._device).to(dtype) for value in values])
