"""Evaluation: several sets at once, and losses weighted by tokens at any batch size and on any number of ranks."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch import Tensor
from transformers import ProgressCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler

from ..evaluation.losses import TokenMean, mean_losses, perplexities
from .distributed import sum_over_ranks
from .window import has_token_labels

__all__ = ["Evaluation", "held_back", "metric_of_set"]

# Labels that mark loss tokens. A collator that shifts `labels` adds `shift_labels`.
_LABELS = ("labels", "shift_labels")
# The key of the lengths of concatenated rows in a batch.
_LENGTHS = "nexus_row_lengths"
# What the Trainer adds to every line of the log: the place in the run, of no set.
_OF_RUN = ("epoch", "num_input_tokens_seen")
_SPEED = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class Evaluation:
    """
    The loss of an evaluation set as the sum of its token losses over the number of its loss tokens.

    The Trainer averages the mean losses of batches, each weighted by its rows. This depends on the batches if rows
    have different numbers of loss tokens. Its value stays if it does not count loss tokens: with a model that takes no
    `num_items_in_batch`. Labels that are one per row are weighted by rows, also on several ranks.
    """

    def __init__(self, args: Any):
        self._args = args
        self.filters_losses = args.logging_nan_inf_filter  # the user's choice, which the trainer changes for training
        self._loader: Any = None
        self.mean: TokenMean | None = None  # the token losses so far, while an evaluation is in progress
        # Whether the labels of the last evaluated batch with a loss were one per token; `None` before the first.
        self.labels_are_tokens: bool | None = None
        self.copies = 1  # number of ranks that read the same rows, as under tensor parallelism

    @contextmanager
    def loop(self, loader: Any) -> Iterator[TokenMean]:
        """One evaluation loop over a data loader."""
        outer = self.mean, self._loader
        self.mean, self._loader = TokenMean(), loader
        try:
            yield self.mean
        finally:
            self.mean, self._loader = outer

    def token_loss(self, mean: TokenMean) -> float | None:
        """Loss per token over all ranks; `None` if no token was counted. All ranks must call it."""
        sums = mean.sums.to(self._args.device) if self._args.world_size > 1 else mean.sums  # MPS has no float64
        total, tokens = sum_over_ranks(sums).tolist()
        return total / tokens if tokens else None

    def counting(self, collate: Callable[[list], Any], dataset: Any) -> Callable[[list], Any]:
        """A collator whose batches have the lengths of the rows that it concatenates, if rows may be repeated."""
        streamed = isinstance(dataset, torch.utils.data.IterableDataset)
        return collate if self._args.world_size == 1 or streamed else _RowLengths(collate)

    def step(
        self,
        inputs: Any,
        loss_only: bool,
        step: Callable[[Any, bool], tuple],
        again: Callable[[Any], tuple],
        count: Callable[[Any], Tensor | None],
    ) -> tuple:
        """
        Evaluate a batch and count its loss, without the rows that Accelerate has repeated to complete the last batch.

        These rows stay in the outputs: the ranks gather outputs of one shape, which the Trainer truncates.

        `step` gives the loss, the outputs and the labels of a batch, without the last two if `loss_only`. `again`
        gives all three of a batch whose loss was measured. `count` gives the number of loss tokens in a batch; `None`
        if the model takes none.
        """
        assert self.mean is not None
        lengths = None
        if isinstance(inputs, Mapping) and _LENGTHS in inputs:
            inputs = dict(inputs)
            lengths = inputs.pop(_LENGTHS)
        tokens = has_token_labels(inputs)
        if tokens and (lengths is not None or not _all_rows(inputs)):
            inputs = self._masked(inputs, lengths)
            output = step(inputs, loss_only)
            self.mean.add(output[0], count(inputs))
            return output
        rows, number = self._real_rows(inputs)
        output = step(rows, loss_only or rows is not inputs)
        self.mean.add(output[0], count(rows) if tokens and number != 0 else number)
        return output if loss_only or rows is inputs else again(inputs)

    def _real(self, rows: int) -> int | None:
        """The number of rows of the last batch that are not repeated; `None` in other batches."""
        loader = self._loader
        if self._args.world_size == 1 or not isinstance(loader, DataLoaderStateMixin):
            return None
        # `remainder` counts the real rows over all ranks in order; -1 if it is not known.
        if not loader.end_of_dataloader or loader.remainder < 1:
            return None
        return min(max(loader.remainder - rows * (self._args.process_index // self.copies), 0), rows)

    def _masked(self, inputs: Any, lengths: list[int] | None) -> Any:
        """A batch in which the labels of repeated rows are masked. `lengths` are those of concatenated rows."""
        real = self._real(len(inputs["labels"]) if lengths is None else len(lengths))
        if real is None:
            return inputs
        masked = {name: inputs[name].clone() for name in _LABELS if name in inputs}
        for labels in masked.values():
            if lengths is None:
                labels[real:] = -100
            else:
                labels[..., sum(lengths[:real]) :] = -100
        return {**inputs, **masked}

    def _real_rows(self, inputs: Any) -> tuple[Any, int | None]:
        """
        On several ranks, a batch without its repeated rows, and the number of its real rows. A rank without real rows
        keeps one, since all ranks call the model. `None` if not all tensors are rows.
        """
        if self._args.world_size == 1 or not _all_rows(inputs):
            return inputs, None
        rows = len(inputs["labels"])
        real = self._real(rows)
        if real is None:
            return inputs, rows
        kept = {name: value[: max(real, 1)] for name, value in inputs.items() if isinstance(value, Tensor)}
        return {**inputs, **kept}, real

    def each(
        self,
        sets: list[str],
        evaluate: Callable[[str, str], Mapping[str, float]],
        weights: Mapping[str, float],
        prefix: str,
    ) -> dict[str, float]:
        """
        Evaluate several sets, given a function of the name of a set and the prefix of its metrics.

        Returns:
            `dict[str, float]`: their metrics, the means over the sets, and perplexities if all labels are tokens, and
            not smoothed.
        """
        found: dict[str, Mapping[str, float]] = {}
        tokens = not self._args.label_smoothing_factor
        for name in sets:
            found[name] = evaluate(name, f"{prefix}_{name}")
            tokens = tokens and bool(self.labels_are_tokens)
        times = Counter(key for of_set in found.values() for key in of_set)
        metrics: dict[str, float] = {}
        for name, of_set in found.items():
            # sentence-transformers runs an evaluator once, with the first set: its metrics are of no set.
            metrics |= {key: value for key, value in of_set.items() if times[key] == 1}
            shared = [key for key in of_set if times[key] > 1 or len(sets) == 1]
            metrics |= {metric_of_set(key, f"{prefix}_{name}"): of_set[key] for key in shared}
        metrics |= mean_losses(metrics, sets, weights, prefix)
        return metrics | (perplexities(metrics, sets, prefix) if tokens else {})


def _all_rows(inputs: Any) -> bool:
    """Whether a batch has labels, and each of its tensors has one entry per row."""
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("labels"), Tensor):
        return False
    shape = inputs["labels"].shape[:1]
    return all(value.shape[:1] == shape for value in inputs.values() if isinstance(value, Tensor))


class _RowLengths:  # a class, not a closure: data loader workers may have to pickle it
    """A collator that adds the lengths of its rows to a batch in which they are concatenated, without padding."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, rows: list) -> Any:
        # Collators may change their rows.
        lengths = [len(row["input_ids"]) for row in rows if isinstance(row, Mapping) and "input_ids" in row]
        batch = self.collate(rows)
        if has_token_labels(batch) and len(batch["labels"]) == 1 < len(rows) == len(lengths):
            batch[_LENGTHS] = lengths
        return batch


def metric_of_set(key: str, prefix: str) -> str:
    """The key of a metric of the evaluation set whose metrics begin with `prefix`."""
    return key if key in _OF_RUN or key.startswith(f"{prefix}_") else f"{prefix}_{key.removeprefix('eval_')}"


def without_speed_of_sets(metrics: Mapping[str, float], sets: list[str], prefix: str) -> dict[str, float]:
    """Metrics without the run times of single sets, which would each be a column of a notebook's table."""
    speed = {f"{prefix}_{name}{what}" for name in sets for what in _SPEED}
    return {key: value for key, value in metrics.items() if key not in speed}


@contextmanager
def held_back(handler: CallbackHandler, log_history: list[dict[str, Any]]) -> Iterator[None]:
    """
    Hold back the log entries and events of the single evaluations inside the context.

    Several sets are one evaluation: callbacks must get it once, with its means. The Trainer logs each set and sends
    `on_evaluate` in one method and has no option to skip either. Progress bars get `on_predict` instead of
    `on_evaluate`, which closes the bar of the set.
    """
    entries = len(log_history)

    def close_bars(args: Any, state: Any, control: Any, metrics: Any) -> Any:
        for callback in handler.callbacks:
            if isinstance(callback, (ProgressCallback, DEFAULT_PROGRESS_CALLBACK)):
                callback.on_predict(args, state, control, metrics=metrics)
        return control

    def ignore(args: Any, state: Any, control: Any, logs: Any) -> Any:
        return control

    vars(handler).update(on_evaluate=close_bars, on_log=ignore)
    try:
        yield
    finally:
        del vars(handler)["on_evaluate"], vars(handler)["on_log"]  # the methods of the class are back
        del log_history[entries:]
