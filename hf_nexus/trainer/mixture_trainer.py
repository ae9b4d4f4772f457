"""Mixtures in a Trainer: one source per micro-batch, figures per source, one evaluation of them all."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..evaluation.losses import OOD, mean_losses, perplexities
from .data_trainer import DataTrainerMixin
from .evaluation import TokenWeightedMixin, has_token_labels
from .meter import TrainingMeter
from .trackers import TrackerPlots

__all__ = ["MixtureTrainerMixin", "Window"]


@dataclass
class Window:
    """The micro-batches of one outer step, and for each its source, rows and counts of loss tokens, all shape (k,)."""

    batches: list = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # on this rank
    unit: str = "rows"  # of the figures per source; "tokens" where labels are one per token
    tokens: Tensor | None = None  # on this rank
    divisors: Tensor | None = None  # what the loss is divided by: over all ranks with average_tokens_across_devices
    items: Any = None  # the window's total, as upstream passes it around
    position: int = 0  # micro-batches seen by training_step

    def count(self, i: int, mean_loss: Tensor, ranks: int) -> tuple[str, Tensor, Tensor]:
        """Source, summed loss and tokens (or rows) on this rank of micro-batch `i`, given its mean loss."""
        if self.unit == "rows" or self.tokens is None or self.divisors is None:
            return self.sources[i], mean_loss * self.rows[i], torch.full_like(mean_loss, self.rows[i])
        # Upstream multiplies the loss by the number of ranks where it divides by the tokens of all of them.
        scale = 1 if self.divisors is self.tokens else ranks
        return self.sources[i], mean_loss * self.divisors[i] / scale, self.tokens[i]


class MixtureTrainerMixin(TokenWeightedMixin, DataTrainerMixin):
    """The half of [`NexusTrainerMixin`] that knows about sources and not about the update."""

    control: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self._window = Window()
        self._collecting = False
        super().__init__(*args, **kwargs)
        _check_eval_names(self.eval_dataset)
        if OOD in self.data.names:
            raise ValueError(f"The source name {OOD!r} is reserved for the mean over OOD sources; rename that source.")
        self.add_callback(TrainingMeter(self.data.names))
        TrackerPlots.attach(self)

    @property
    def meter(self) -> TrainingMeter:
        """What this run has trained on (upstream may replace the instance on resume)."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrainingMeter):
                return callback
        raise RuntimeError(
            "The callback TrainingMeter, which counts what each source has contributed, was removed. Remove only the "
            "callbacks that you mean: trainer.remove_callback(PrinterCallback), for example."
        )

    # ---- The end of a run ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The base class's epoch, but for a run that was resumed after its last step: that would train one more."""
        if self.state.global_step >= self.state.max_steps and (self.args.nexus or self.data.stages):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- Counts ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Fetch one window of micro-batches and note their sources."""
        self._window = window = Window()
        window.batches, window.items = super().get_batch_samples(epoch_iterator, num_batches, device)
        window.sources, window.rows = self._fetched.sources, self._fetched.rows
        if window.batches:
            counted = window.tokens is not None and has_token_labels(window.batches[0])
            window.unit = self.meter.unit = "tokens" if counted else "rows"
        return window.batches, window.items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count the window's loss tokens, and beside the total each micro-batch's own."""
        count = super()._get_num_items_in_batch
        if self._token_mean is not None:  # an evaluation's batch, of no window
            return count(batch_samples, device)
        self._agree_on_data()
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:  # local counts first: then one collective serves them all
            counts = [count([batch], device) for batch in batch_samples]
        finally:
            self.args.average_tokens_across_devices = average
        if not counts or any(not isinstance(n, Tensor) for n in counts):
            return count(batch_samples, device)
        self._window.tokens = self._window.divisors = torch.stack(counts)
        if average and self.args.world_size > 1:
            self._window.divisors = self.accelerator.reduce(self._window.tokens, "sum")
        return self._window.divisors.sum()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The base class's step, counted per source."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        window, i = self._window, self._window.position
        window.position += 1
        # Upstream has divided by the whole window's tokens, or by its length; the meter wants this micro-batch's mean.
        if window.divisors is None:
            mean = loss * self.current_gradient_accumulation_steps
        else:
            mean = loss * window.items / window.divisors[i]
        self.meter.add_micro_batch(*window.count(i, mean, self.args.world_size))
        return loss

    # ---- Logs and evaluation ----

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.args.world_size > 1 else tensor

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures per source to the training log line."""
        if self._collecting:  # base classes may add figures of theirs to `logs`, as those of TRL do
            kept = len(self.state.log_history)
            super().log(logs, start_time)
            del self.state.log_history[kept:]
            return
        if self.is_in_train and "loss" in logs:
            logs |= self.meter.read(self._sum_over_ranks, self.args.device, self.state.total_flos)
            logs |= self._skipped_rows()
        elif "train_loss" in logs:  # the end of training
            self.meter.settle(self._sum_over_ranks, self.args.device)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """
        Evaluate one set as the base class does, or several sets at once.

        The loss of a set is the sum of its token losses over the number of its loss tokens, in nats per token: the
        same at any batch size and on any number of ranks. (`dataloader_drop_last` leaves rows out, and an iterable
        evaluation set that is split by `dispatch_batches=False` repeats some on several ranks.) It takes the place of
        a `loss` among the results of `compute_metrics`. The base class's mean over rows stays for labels that are not
        one per token, for models that take no `num_items_in_batch`, and with `nexus=False` and one plain training
        set, where this is the base class.

        Several sets are logged and given to `on_evaluate` once, with two means over them: `<prefix>_loss`, the macro
        loss over the mixture's sources with the mixture's weights, and `<prefix>_ood_loss`, the plain mean over the
        others. If no set's name matches a source, `<prefix>_loss` covers all sets equally and `<prefix>_ood_loss` is
        absent. Beside each loss stands its perplexity, unless it is not finite, or labels are not one per token.
        What a base class adds to the log of an evaluation (TRL's `eval_rewards/accuracies`, for example) is there for
        each set, as `<prefix>_<name>_rewards/accuracies`.

        Args:
            eval_dataset (`Dataset`, `dict[str, Dataset]` or `str`, *optional*):
                As in [`~transformers.Trainer.evaluate`]. The name `ood` is reserved.
            **kwargs:
                Passed on to the base class (`Seq2SeqTrainer`'s generation arguments, for example).

        Returns:
            `dict[str, float]`: the metrics of all sets, `<prefix>_<name>_loss` and `<prefix>_<name>_perplexity`
            among them.
        """
        started = time.perf_counter()
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(sets, Mapping):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        else:
            _check_eval_names(sets)
            metrics, of_tokens = {}, True
            with self._collect_evaluations():
                for name, dataset in sets.items():
                    chosen = name if eval_dataset is None else dataset
                    own = f"{metric_key_prefix}_{name}"
                    found = super().evaluate(chosen, ignore_keys, own, **kwargs)
                    metrics |= {_of_set(key, own): value for key, value in found.items()}
                    of_tokens = of_tokens and self._labels_are_tokens
            metrics |= mean_losses(metrics, list(sets), self.mixture_weights or {}, metric_key_prefix)
            if of_tokens:
                metrics |= perplexities(metrics, list(sets), metric_key_prefix)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meter.pause(time.perf_counter() - started)
        return metrics

    @contextmanager
    def _collect_evaluations(self) -> Iterator[None]:
        """Hold back the log line and the event of each single evaluation."""
        handler = self.callback_handler
        handler.on_evaluate = lambda args, state, control, metrics: control
        handler.on_log = lambda args, state, control, logs: control
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False
            del handler.on_evaluate, handler.on_log  # uncovers the methods


def _of_set(key: str, own: str) -> str:
    """The name of a figure of the evaluation set whose metrics begin with `own`."""
    return key if key == "epoch" or key.startswith(f"{own}_") else f"{own}_{key.removeprefix('eval_')}"


def _check_eval_names(evaluation: Any) -> None:
    if isinstance(evaluation, Mapping) and OOD in evaluation:
        raise ValueError(
            f"The evaluation set name {OOD!r} is reserved for the mean over OOD sources; rename that set."
        )
