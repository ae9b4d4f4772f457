"""Evaluation: several sets at once, and losses weighted by tokens at any batch size and on any number of ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import DataLoaderStateMixin
from torch import Tensor
from transformers import ProgressCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler

from ..evaluation.losses import TokenMean, mask_rows, mean_losses, perplexities
from .distributed import sum_over_ranks
from .window import has_token_labels

__all__ = ["Evaluation", "held_back", "metric_of_set"]

# Labels that mark loss tokens. A collator that shifts `labels` adds `shift_labels`.
_LABELS = ("labels", "shift_labels")
_SPEED = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class Evaluation:
    """
    The loss of an evaluation set as the sum of its token losses over the number of its loss tokens.

    The Trainer averages the mean losses of batches, each weighted by its rows. This depends on the batches if rows
    have different numbers of loss tokens. Its value stays if labels are not one per token, or if it does not count
    loss tokens: with a model that takes no `num_items_in_batch`.

    Attributes:
        mean ([`TokenMean`], *optional*): The token losses so far, while an evaluation is in progress.
        labels_are_tokens (`bool`): Whether the labels of the last evaluated batch were one per token.
    """

    def __init__(self, args: Any):
        self._args = args
        self._loader: Any = None
        self.mean: TokenMean | None = None
        self.labels_are_tokens = False

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
        total, tokens = sum_over_ranks(mean.sums.to(self._args.device)).tolist()
        return total / tokens if tokens else None

    def real_rows(self, inputs: Any, flat: bool) -> Any:
        """
        A batch in which the rows that Accelerate has repeated to complete the last batch are masked. They stay in it,
        since the ranks gather outputs of one shape, which the Trainer truncates. `flat`: the rows are concatenated.
        """
        loader, ranks = self._loader, self._args.world_size
        if ranks == 1 or not isinstance(loader, DataLoaderStateMixin):
            return inputs
        # `remainder` counts the real rows over all ranks in order; -1 if it is not known.
        if not loader.end_of_dataloader or loader.remainder < 1:
            return inputs
        rows = loader.total_batch_size // ranks if flat else len(inputs["labels"])
        real = min(max(loader.remainder - rows * self._args.process_index, 0), rows)
        return {**inputs, **{name: mask_rows(inputs[name], rows, real) for name in _LABELS if name in inputs}}

    def note_labels(self, inputs: Any) -> bool:
        """Whether the labels of a batch are one per token."""
        self.labels_are_tokens = has_token_labels(inputs)
        return self.labels_are_tokens

    def add(self, loss: Tensor | None, tokens: Any) -> None:
        """Count a batch whose mean loss over `tokens` is known."""
        if self.mean is not None and loss is not None and isinstance(tokens, Tensor):
            self.mean.add(loss, tokens.sum())

    @staticmethod
    def summarize(
        metrics: Mapping[str, float], sets: list[str], weights: Mapping[str, float], prefix: str, tokens: bool
    ) -> dict[str, float]:
        """The means over the sets, and perplexities if all labels are tokens."""
        means = mean_losses(metrics, sets, weights, prefix)
        return means | (perplexities({**metrics, **means}, sets, prefix) if tokens else {})


def metric_of_set(key: str, prefix: str) -> str:
    """The key of a metric of the evaluation set whose metrics begin with `prefix`."""
    return key if key == "epoch" or key.startswith(f"{prefix}_") else f"{prefix}_{key.removeprefix('eval_')}"


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
