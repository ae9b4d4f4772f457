"""Feeding a Trainer from a mixture: micro-batches of one source each, resumed exactly."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, default_data_collator
from transformers.trainer_pt_utils import find_batch_size

from ..mixture.indexed import MixtureDataset, MixtureSampler
from ..mixture.isolation import IsolateDocuments, choose_isolation, needs_flat_rows
from ..mixture.schedule import SourceSchedule
from ..mixture.stages import stage_borders
from ..mixture.state import compare_data, describe_data, load_data_state, save_data_state
from ..mixture.stream.dataset import MicroBatchSampler, MixtureStream, StreamState
from ..mixture.stream.progress import StreamProgress, WeightsFunction
from ..mixture.stream.reader import SourceError
from ..mixture.tags import pop_tag, tag_micro_batches
from ..mixture.training_data import StageWeights, TrainingData, check_loader_settings, prepare_data
from .arguments import arguments_by_name, with_nexus_fields
from .checkpoints import CheckpointMixin
from .distributed import broadcast, max_over_ranks
from .publishing import PublishingMixin
from .trl import SourcePreparationMixin

__all__ = ["DataTrainerMixin"]

logger = logging.getLogger(__name__)


class DataTrainerMixin(CheckpointMixin, PublishingMixin, SourcePreparationMixin):
    """
    The part of [`NexusTrainerMixin`] that reads the data.

    Args:
        mixture_weights_function (`Callable[[int], Mapping[str, float]]`, *optional*):
            Gives the weights of the sources at an outer step, in place of fixed ones: a pure function of the step, or
            an object with `state_dict` and `load_state_dict`, which then travel with the checkpoint. It is asked once
            for each step, when the data loader sends for it; on several ranks the first one's answer counts.
    """

    data_collator: Any

    def __init__(self, *args: Any, mixture_weights_function: WeightsFunction | None = None, **kwargs: Any):
        kwargs = arguments_by_name(type(self), DataTrainerMixin, args, kwargs)
        settings = with_nexus_fields(kwargs.get("args"))
        self._weights_function = mixture_weights_function
        self._set_data(kwargs.get("train_dataset"), kwargs.get("eval_dataset"), settings)
        self._progress: StreamProgress | None = None
        self._sampler: MicroBatchSampler | None = None
        self._resumed_data: dict[str, Any] | None = None
        self._fetched = Fetched()
        self._began_at = 0
        given = {"args": settings, "train_dataset": self.data.dataset, "eval_dataset": self.data.evaluation}
        if self.data.mixture is not None and kwargs.get("data_collator") is None:
            # Rows of a mixture are full. The collator of the Trainer would ask the tokenizer for a padding token.
            given["data_collator"] = default_data_collator
        super().__init__(**kwargs | given)
        self._isolate_documents(self.data)
        self.add_callback(_BeginData(self))

    def _set_data(self, train: Any, evaluation: Any, settings: Any) -> None:
        seed = settings.seed if settings.data_seed is None else settings.data_seed
        self.data = prepare_data(train, evaluation, settings, self._weights_function is not None, seed)
        self.mixture_weights = self.data.weights
        if self.data.stages:
            check_loader_settings(settings, self.data.dataset)

    def _isolate_documents(self, data: TrainingData) -> None:
        """Keep the documents of packed rows apart, in training and evaluation."""
        if data.mixture is None:
            return
        attention = self.model.config._attn_implementation
        if choose_isolation(data.mixture.config.isolate_documents, attention):
            if self.args.use_cache:
                raise ValueError(
                    "use_cache=True would let the documents of a packed row attend to each other. Leave it at False, "
                    "or set isolate_documents to false."
                )
            flat = needs_flat_rows(attention)
            self.data_collator = IsolateDocuments(self.data_collator, data.mixture.eos_token_id, flat)

    # ---- Reading ----

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # Accelerate deals batches to the ranks in turn: as many in a row as there are ranks share their source.
        rows, k = self._train_batch_size * self.args.world_size, self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(dataset, MixtureStream):
            weights = self._weights_function or StageWeights(self.data.stages, self.args.max_steps)
            share = self._first_ranks_shares if self._weights_function and self.args.world_size > 1 else lambda s: s
            dataset.place(self.args.process_index, self.args.world_size, max(1, self.args.dataloader_num_workers))
            self._progress = StreamProgress(
                dataset, weights, k, seed, self.args.source_schedule, self.data.max_epochs, share
            )
            self._sampler = MicroBatchSampler(self._progress.source_of, self.args.max_steps * k, rows)
            return self._sampler
        if isinstance(dataset, MixtureDataset):
            epoch = max(1, len(dataset) // rows)
            windows = math.ceil(epoch / k)  # of an epoch, whose last one may be short
            steps = self.args.max_steps if self.args.max_steps > 0 else self.args.num_train_epochs * windows
            borders = [
                (step // windows * epoch + step % windows * k, shares)
                for step, shares in stage_borders(self.data.stages, math.ceil(steps), 1)
            ]
            return MixtureSampler(dataset, SourceSchedule(borders, seed, self.args.source_schedule), rows, seed)
        return super()._get_train_sampler(train_dataset)

    def _first_ranks_shares(self, shares: np.ndarray) -> np.ndarray:
        return broadcast(torch.from_numpy(shares), self.args.device).cpu().numpy()

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        collate = super()._get_collator_with_removed_columns(data_collator, description)
        if description == "Training" and self.data.stages:
            return tag_micro_batches(collate)
        return collate

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """
        Fetch one window of micro-batches and note their sources.

        Raises:
            SourceError: a source could not be read on, on this rank or another.
        """
        self._fetched = Fetched()
        return super().get_batch_samples(self._untag(epoch_iterator), num_batches, device)

    def _untag(self, batches: Iterator) -> Iterator:
        """The micro-batches without their tags, up to one that could not be read."""
        try:
            for batch in batches:
                tag = pop_tag(batch)
                if tag is None and self.data.stages:
                    raise ValueError(
                        "A micro-batch does not say which source it holds: the training data loader is not the "
                        "mixture's, or drops the tag. Leave get_train_dataloader() and get_batch_samples() to "
                        "NexusTrainer, or pass train_dataset as one plain dataset."
                    )
                self._fetched.sources.append("" if tag is None else tag.source)
                self._fetched.rows.append((find_batch_size(batch) or 1) if tag is None else tag.rows)
                if tag is not None and tag.state is not None:
                    self._fetched.states.append(tag.state)
                yield batch
        except SourceError as error:
            # A worker's has its traceback for a message, of which the last part is what it said.
            self._fetched.error = SourceError(str(error).rpartition("SourceError: ")[2].strip())

    def _agree_on_data(self) -> None:
        """Let all ranks know what one of them met in the window just fetched: an error, or the end of a source."""
        progress, fetched = self._progress, self._fetched
        if progress is None:
            return
        step, several = self.state.global_step, self.args.world_size > 1
        progress.fetched(step, fetched.states)
        if fetched.error is not None:
            # The others went on: they have sent for all that follows, and waited for the first rank's weights.
            ahead = self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)
            last = step + 1 + ahead // self.args.gradient_accumulation_steps
            for further in range(step, min(last, self.args.max_steps - 1) + 1):
                progress.decide(further)
        ended = set(progress.exhausted())
        facts = torch.tensor([fetched.error is not None, progress.sent, *(name in ended for name in self.data.names)])
        # Alone, there is no need to wait for the device.
        failed, sent, *ended_anywhere = max_over_ranks(facts.to(self.args.device) if several else facts).tolist()
        if failed:
            raise fetched.error or SourceError("Another rank could not read its data: see its message.")
        for name, is_ended in zip(self.data.names, ended_anywhere, strict=True):
            if is_ended:
                progress.retire(name, sent)

    def _skipped_rows(self) -> dict[str, int]:
        """`skipped_rows/<source>` for each source that has unusable rows, over all ranks."""
        if self._progress is None:
            return {}
        skipped = self._progress.skipped_rows(self.state.global_step)
        counts = torch.tensor(list(skipped.values()), device=self.args.device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        counted = zip(self.data.names, counts.tolist(), strict=True)
        return {f"skipped_rows/{name}": count for name, count in counted if count}

    # ---- Saving, resuming ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        Train as the base class does. If a source cannot be read on, a checkpoint is saved before the error is raised,
        unless it is the one that was resumed.

        Raises:
            SourceError: the network failed for too long, or a source has a row that cannot be used.
        """
        self._resumed_data = None
        try:
            return super().train(*args, **kwargs)
        except SourceError as error:
            self.is_in_train = False
            step = self.state.global_step
            if step == self._began_at:  # there is nothing new to save
                raise
            self._save_checkpoint(self.model, trial=None)
            raise SourceError(
                f"{error}\nTraining stopped after step {step}, and a checkpoint was saved in "
                f"{self.args.output_dir!r}: once the cause is mended, go on with resume_from_checkpoint=True."
            ) from error

    def _describe_data(self) -> dict[str, Any]:
        batch_size = None if self.args.auto_find_batch_size else self._train_batch_size
        return describe_data(self.data, self.args, batch_size, self.processing_class)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.data.stages:
            stream = None if self._progress is None else self._progress.state_dict(self.state.global_step)
            save_data_state(output_dir, self.args.process_index, self._describe_data(), stream)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self._resumed_data = self.check_data(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def check_data(self, checkpoint: str) -> dict[str, Any] | None:
        """
        Where the streams stood in a checkpoint; `None` if there are none, or if they are to be read from the start.

        Raises:
            ValueError: the data cannot be resumed exactly, and `allow_mixture_change` is off.
        """
        if not self.data.stages:
            return None
        rank, streams = self.args.process_index, isinstance(self.data.dataset, MixtureStream)
        saved = load_data_state(checkpoint, rank)
        differences = [] if saved is None else compare_data(saved["description"], self._describe_data())
        stream = None if saved is None else saved["stream"]
        if streams and stream is None and not differences:
            differences = [
                f"it has no data_state_{rank}.json (was it saved with save_only_model, or on another disk?)"
            ]
        if not differences:
            return stream
        found = f"{checkpoint} cannot be resumed exactly: {'; '.join(differences)}."
        if not self.args.allow_mixture_change:
            raise ValueError(
                f"{found} Put it back as it was, or pass allow_mixture_change=True (--allow_mixture_change True): the "
                "weights and the optimizer are resumed, streams are read from their beginning."
            )
        logger.warning("%s Going on with a fresh state of the data.", found)
        return None


@dataclass
class Fetched:
    """What came with the micro-batches of one window."""

    sources: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    states: list[StreamState] = field(default_factory=list)
    error: SourceError | None = None


class _BeginData(TrainerCallback):
    """Puts the streams where the run begins or goes on, before the data loader starts its workers."""

    def __init__(self, trainer: DataTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        trainer._began_at = state.global_step
        if trainer._progress is not None and trainer._sampler is not None:
            trainer._progress.begin(state.global_step, trainer._resumed_data if state.global_step else None)
