"""The Trainer extension: one Nexus window per optimizer step, the rest is the Trainer's."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..nexus import Nexus
from .config import nexus_settings
from .cosines import check_measurable, source_cosines
from .distributed import Shards, average_pseudo_gradients, check_supported, reshard
from .mixture_trainer import MixtureTrainerMixin, Window
from .optimizers import check_optimizer, create_muon_with_adamw
from .precision import check_weights, warn_of_short_steps

__all__ = ["SETTINGS_NAME", "NexusTrainer", "NexusTrainerMixin"]

logger = logging.get_logger(__name__)

# The Nexus settings, saved beside each model.
SETTINGS_NAME = "nexus.yaml"


class NexusTrainerMixin(MixtureTrainerMixin):
    """
    Trains any [`~transformers.Trainer`] subclass with the Nexus update: `class MyTrainer(NexusTrainerMixin, Base)`.

    Beyond the base class's, `train_dataset` may be a dict or `DatasetDict` of sources, a [`Mixture`], or a dataset
    with a
    `source` column. Every micro-batch then holds one source, the same on all ranks. A plain dataset is loaded as
    always, and its micro-batches play the sources.

    The whole window of k = `gradient_accumulation_steps` micro-batches runs inside its last `training_step`, so that
    no displaced weight exists outside that call. The logged `loss` is a *path loss*: micro-batch m is evaluated at
    weights already moved by the ones before it. Compare runs by `evaluate`, never by it.

    Raises:
        ValueError: an unsupported launch or precision, or a mixture that cannot be sampled; see
        docs/troubleshooting.md.
    """

    current_gradient_accumulation_steps: Any
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self._nexus: Nexus | None = None
        super().__init__(*args, **kwargs)
        check_measurable(self)
        check_optimizer(self)
        if not self.args.nexus:
            return
        check_supported(self)
        if self.train_dataset is not None:
            check_weights(self.model)
        # It would synchronise at each of the window's zero losses, and let one NaN micro-batch replace them all.
        self.args.logging_nan_inf_filter = False
        if self.args.gradient_accumulation_steps == 1:
            logger.warning(
                "gradient_accumulation_steps=1: a window of one inner step is a normalized gradient, and there is "
                "nothing to align. Set it to 4 or more (and divide per_device_train_batch_size) to use Nexus."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The base class's optimizer, or with `matrix_optimizer` its AdamW joined with Muon."""
        if self.optimizer is None and self.args.matrix_optimizer is not None:
            self.optimizer = create_muon_with_adamw(self, self.model if model is None else model)
        return super().create_optimizer(model)

    # ---- The window ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """
        One micro-batch of the base class's loop. All but the window's last are kept; the last runs the whole window.

        Returns:
            `Tensor`: 0-d. Zero for the kept ones, then the token-weighted mean path loss of the window.
        """
        window = self._window
        if window.position >= len(window.batches):
            raise RuntimeError("training_step() runs inside train() only: a window is fetched as a whole before it.")
        if window.position == 0:
            self._random_states.begin_window()
            self._measure_cosines()
        if not self.args.nexus:
            return super().training_step(model, inputs, num_items_in_batch)
        window.batches[window.position] = inputs  # a subclass may have changed them
        window.position += 1
        if window.position == len(window.batches):
            if self.accelerator.gradient_state.sync_gradients:
                return self._run_window(model, window)
            # The stream ended inside the window: the Trainer will not step, and neither do we.
            self.meter.windows_dropped += 1
            logger.warning(f"The data ended inside a window: its {len(window.batches)} micro-batches were dropped.")
        return torch.zeros((), device=self.args.device)

    def _run_window(self, model: nn.Module, window: Window) -> Tensor:
        nexus = self._prepare_nexus(model)
        local = self.args.inner_sync == "local" and self.args.world_size > 1
        losses: list[Tensor] = []
        # Each micro-batch is a mean of its own: upstream must not divide it by the window's length as well.
        steps, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        # A schedule-free optimizer keeps other weights for evaluation; it must not swap them inside the window.
        self.optimizer.train()
        try:
            with nexus.window():
                for i, inputs in enumerate(window.batches):
                    items = None if window.divisors is None else window.divisors[i]
                    with self.accelerator.no_sync(model) if local else nullcontext():
                        # past MixtureTrainerMixin, whose accounting is for accumulated micro-batches
                        losses.append(super(MixtureTrainerMixin, self).training_step(model, inputs, items))
                    nexus.inner_step()
        except BaseException:
            reshard(model)
            raise
        finally:
            nexus.restore()  # should a signal have kept the window from being left
            self.current_gradient_accumulation_steps = steps
        skipped = len(losses) - nexus.steps_taken
        self.meter.add_window(
            nexus.pseudo_gradient_norm, nexus.steps_taken, skipped, torch.stack(losses).isfinite().any()
        )
        if not nexus.steps_taken:
            logger.warning_once(
                f"Step {self.state.global_step}: no inner step had a usable gradient (zero or not finite), so the "
                "weights stay as they are. Further steps like this show up in inner_steps_skipped only."
            )
        for i, taken in enumerate(nexus.taken):
            if taken:
                self.meter.add_micro_batch(*window.count(i, losses[i], self.args.world_size))
        if local:
            average_pseudo_gradients(nexus.params, nexus.steps_taken > 0)
        return self._window_loss(torch.stack(losses), window)

    def _prepare_nexus(self, model: nn.Module) -> Nexus:
        """The walker with this step's settings."""
        if self._nexus is None:
            params = [p for p in model.parameters() if p.requires_grad]
            shards = Shards(params)
            # Ranks that walk one path together need the same random directions, those that walk their own do not.
            walker = self.args.process_index if self.args.inner_sync == "local" else shards.index
            self._nexus = Nexus(
                params,
                self.args.inner_lr,
                direction=self.args.inner_direction,
                snapshot_device=self.args.snapshot_device,
                reduce_norm=shards.norm,
                key=(self.args.seed, walker),
            )
            warn_of_short_steps(self._nexus, autocast=self.accelerator.mixed_precision == "bf16")
        self._nexus.outer_step = self.state.global_step
        self._nexus.inner_lr = self.args.inner_lr * self._schedule_factor()
        return self._nexus

    def _schedule_factor(self) -> float:
        if self.args.inner_lr_schedule == "constant":
            return 1.0
        group = self.optimizer.param_groups[0]
        # Schedulers start from `initial_lr`; OneCycleLR climbs from there to `max_lr`.
        peak = max(group["lr"], group.get("max_lr", group.get("initial_lr", self.args.learning_rate)))
        return float(group["lr"]) / float(peak) if peak else 0.0

    def _window_loss(self, losses: Tensor, window: Window) -> Tensor:
        """
        Token-weighted mean of the finite losses (k,). Without any, the running mean of the log interval, since a NaN
        would stay in upstream's sum for ever; that the interval had none at all is logged as NaN.
        """
        weights = torch.ones_like(losses) if window.divisors is None else window.divisors.to(losses.dtype)
        finite = losses.isfinite()
        total = torch.where(finite, weights, 0).sum()
        mean = torch.where(finite, losses * weights, 0).sum() / total
        running = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(total > 0, mean, running)

    def _restore(self) -> None:
        """Weights are only ever displaced inside a window; this also covers one whose own restore was broken off."""
        if self._nexus is not None:
            self._nexus.restore()

    def _at_start(self) -> AbstractContextManager[None]:
        return nullcontext() if self._nexus is None else self._nexus.at_start()

    def _measure_cosines(self) -> None:
        every = self.args.gradient_cosine_steps
        if not every or self.state.global_step % every:
            return
        started = time.perf_counter()
        self.log({f"cosine/{a}-{b}": value for (a, b), value in source_cosines(self).items()})
        self.meter.pause(time.perf_counter() - started)

    # ---- Logging, saving, resuming ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's figures to the training log line."""
        if self.is_in_train and "loss" in logs and self._nexus is not None:
            logs["inner_lr"] = self._nexus.effective_inner_lr
        super().log(logs, start_time)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._restore()
        self._nexus = None  # the wrapped model and its parameters may be new
        return super()._prepare_for_training(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        self.meter.settle(self._sum_over_ranks, self.args.device)
        with self._at_start():
            super()._save_checkpoint(*args, **kwargs)
        self.meter.pause(time.perf_counter() - started)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the restored weights, and the resolved Nexus settings beside them."""
        with self._at_start():
            super().save_model(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate at the restored weights."""
        with self._at_start():
            return super().evaluate(*args, **kwargs)

    evaluate.__doc__ = MixtureTrainerMixin.evaluate.__doc__

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict at the restored weights."""
        with self._at_start():
            return super().predict(*args, **kwargs)

    def nexus_settings(self) -> dict[str, Any]:
        """The resolved Nexus fields, mixture weights included, as plain data."""
        return {**nexus_settings(self.args), "mixture_weights": self.mixture_weights}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir, SETTINGS_NAME)
            path.write_text(yaml.safe_dump(self.nexus_settings(), sort_keys=False))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        path = Path(resume_from_checkpoint, SETTINGS_NAME)
        saved = yaml.safe_load(path.read_text()) if path.is_file() else {}
        for name, value in self.nexus_settings().items():
            if name in saved and saved[name] != value:
                logger.warning(f"Resuming with {name}={value!r}; the checkpoint was trained with {saved[name]!r}.")


class NexusTrainer(NexusTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] with the Nexus update; see [`NexusTrainerMixin`].

    Example:

    ```python
    trainer = NexusTrainer(
        model=model,
        args=NexusConfig(output_dir="out", gradient_accumulation_steps=4, inner_lr=0.05),
        train_dataset={"text": text, "code": code},
        eval_dataset={"text": text_held_out, "law": law},  # "law" is not trained on: it is OOD
        processing_class=tokenizer,
    )
    trainer.train()
    ```
    """
