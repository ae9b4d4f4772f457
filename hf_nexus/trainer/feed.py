"""The data of a run: the order of the rows, agreement between ranks, and the state in checkpoints."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..mixture.digest import sample
from ..mixture.indexed import MixtureDataset, MixtureSampler
from ..mixture.isolation import (
    PackedRowCollator,
    attention_of,
    choose_isolation,
    isolation_problem,
    needs_flat_rows,
    text_config,
)
from ..mixture.plan import mixture_plan
from ..mixture.schedule import SourceSchedule, WindowCounts
from ..mixture.stages import StageWeights, stage_borders
from ..mixture.state import compare_data, describe_data, describe_sources, load_data_state, save_data_state
from ..mixture.stream.dataset import MixtureStream
from ..mixture.stream.lanes import Lanes
from ..mixture.stream.progress import MicroBatchSampler, StreamProgress, WeightsFunction, steps_ahead
from ..mixture.stream.reader import SourceError
from ..mixture.training_data import TrainingData, prepare_data
from .checks import check_arguments, check_exchange, check_same
from .distributed import broadcast, gather, max_over_ranks
from .window import Window

__all__ = ["Feed"]

logger = logging.getLogger(__name__)


class Feed:
    """
    Feeds a Trainer with micro-batches of one source each, or mixed ones. `weights_function` decides mixture weights
    while training.

    With `whole`, the training data is one dataset even if it is a dict: the base class samples its sets.
    """

    def __init__(
        self,
        train: Any,
        args: Any,
        weights_function: WeightsFunction | None = None,
        whole: bool = False,
    ):
        self._args = args
        self._whole = whole
        self._weights_function = weights_function
        # Of the last data loader, and of that of the training: a callback may make others.
        self._last_progress: StreamProgress | None = None
        self._progress: StreamProgress | None = None
        self._last_sampler: Any = None
        self._sampler: Any = None
        self._resumed: Mapping[str, Any] | None = None
        self._resumed_from: str | None = None  # the checkpoint that was compared for the next training
        self.first_step = 0  # the outer step at which training began or was resumed
        self.copies = 1  # number of ranks that read the same rows, as under tensor parallelism
        self._generator = torch.Generator()  # of the Trainer's samplers
        self.set_data(train)

    def set_data(self, train: Any) -> None:
        """Replace the data."""
        self._weights = self._args.mixture_weights
        self._sources: dict[str, Any] | None = None  # their description, for which rows are read
        self.data: TrainingData = prepare_data(train, self._weights, self.dynamic_weights, self._whole)
        self.refresh()

    def check(self, evaluation: Any, optimizer: Any = None, trains: bool = True) -> None:
        """Refuse arguments that cannot be combined, with each other, this data or an `optimizer` of the user."""
        data = self.data
        check_arguments(
            self._args,
            sources=data.has_sources,
            streams=isinstance(data.dataset, MixtureStream),
            unread=[name for name, rows in data.indexable(evaluation).items() if rows is None],
            unlike=data.eos_token_id is not None and not data.all_packed,
            isolated=data.eos_token_id is not None and data.isolate_documents is not False,
            optimizer=optimizer,
            trains=trains,
        )

    def refresh(self) -> None:
        """Follow arguments that were changed since they were read, by a hyperparameter search for example."""
        if self._args.mixture_weights != self._weights:
            self._weights = self._args.mixture_weights
            self.data = self.data.with_weights(self._weights)
        if isinstance(self.data.dataset, MixtureStream):
            self.data.dataset.seed = self._seed

    @property
    def _seed(self) -> int:
        args = self._args
        return args.seed if args.data_seed is None else args.data_seed

    @property
    def _ranks(self) -> int:
        """Number of ranks that read different rows."""
        return self._args.world_size // self.copies

    @property
    def _layout(self) -> list[int]:
        return [self._args.world_size, self._ranks]

    @property
    def dynamic_weights(self) -> bool:
        """Whether the mixture weights are decided while training."""
        return self._weights_function is not None

    # ---- Before the first step ----

    def apart(self, dataset: Any) -> Any:
        """A training set for one data loader: streams have a place, which other loaders do not move."""
        self.refresh()  # a copy does not follow
        return copy(dataset) if isinstance(dataset, MixtureStream) else dataset

    def sampler(self, dataset: Any, batch_size: int) -> torch.utils.data.Sampler | None:
        """The order of a training set; `None` for a plain dataset, which keeps the Trainer's order."""
        check_exchange(dataset)
        self.refresh()
        args = self._args
        # Accelerate distributes batches to the ranks in turn: W consecutive batches share a source on W ranks.
        rows, k = batch_size * self._ranks, args.gradient_accumulation_steps
        if isinstance(dataset, MixtureStream):
            staged = StageWeights(self.data.stages, args.max_steps)
            several = self.dynamic_weights and args.world_size > 1
            workers, mixed = max(1, args.dataloader_num_workers), args.source_schedule == "mixed"
            lanes = self._lanes(rows, workers)
            dataset.place(args.process_index // self.copies, self._ranks, workers, lanes, mixed)
            self._last_progress = progress = StreamProgress(
                dataset,
                self._weights_function or staged,
                k,
                kind=args.source_schedule,
                rows=rows,
                max_epochs=self.data.max_epochs,
                read_ahead=self._read_ahead,
                broadcast=self._shares_of_first_rank if several else None,
            )
            if not self.dynamic_weights:
                borders = [(step * k, shares) for step, shares in staged.borders]
                self._check_epochs(borders, args.max_steps * k, rows)
            return MicroBatchSampler(
                progress.index_of,
                args.max_steps * k,
                rows,
                dataset.owners,
                progress.ahead,
                first=lambda: progress.sent + 1,
            )
        if isinstance(dataset, MixtureDataset):
            windows, steps = self._windows(batch_size)
            borders = [(windows.micro_batches(s), shares) for s, shares in stage_borders(self.data.stages, steps)]
            schedule = SourceSchedule(borders, self._seed, args.source_schedule, windows, rows, self._ranks)
            sampler = MixtureSampler(dataset, schedule)
            self._check_epochs(borders, windows.micro_batches(steps), rows)
            return sampler
        return None

    def _check_epochs(self, borders: list[tuple[int, Any]], micro_batches: int, rows: int) -> None:
        """Raise `ValueError` if a run exceeds `max_epochs` of a source of known size. Borders are in micro-batches."""
        if (mixture := self.data.mixture) is not None:
            tokens = rows * mixture.config.sequence_length
            in_tokens = [(first * tokens, shares) for first, shares in borders]
            mixture_plan(mixture.tokens, in_tokens, micro_batches * tokens, self.data.max_epochs)

    def _lanes(self, rows: int, workers: int) -> Lanes:
        """The cut of the streams: that of the checkpoint that is resumed, or a new one."""
        saved = self._resumed
        if saved is None:
            return Lanes.of_run(rows, self._ranks, workers)
        if saved["rows"] != rows:
            raise ValueError(
                f"The checkpoint was saved with {saved['rows']} rows in a micro-batch of all ranks, and now there are "
                f"{rows}. Set per_device_train_batch_size to {saved['rows']} divided by the number of ranks."
            )
        lanes = Lanes(*saved["lanes"])
        if lanes.turns % workers:
            logger.warning(
                "dataloader_num_workers=%d does not divide the %d turns of the checkpoint: each worker tokenizes the "
                "documents of all. Set a number that divides it.",
                workers,
                lanes.turns,
            )
        return lanes

    @property
    def prefetch_factor(self) -> int | None:
        """Micro-batches that each worker of the data loader reads ahead. `None` without workers."""
        args = self._args
        given, workers = args.dataloader_prefetch_factor, args.dataloader_num_workers
        if given is not None or not workers:
            return given
        # Training takes k at once. With torch's 2, the workers would stop before that, and training wait for the rest.
        return max(2, math.ceil(args.gradient_accumulation_steps / workers))

    @property
    def _read_ahead(self) -> int:
        """Micro-batches that the workers of the data loader are asked for before it is their turn."""
        return self._args.dataloader_num_workers * (self.prefetch_factor or 0)

    def in_order(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Micro-batches of the data loader in the order of training."""
        return self._progress.in_order(batches) if self._progress and self._progress.ahead else batches

    def _windows(self, batch_size: int) -> tuple[WindowCounts, int]:
        """The windows of map-style sources, and their number in the run."""
        args = self._args
        epoch = max(1, len(self.data.dataset) // (batch_size * self._ranks))
        windows = WindowCounts(args.gradient_accumulation_steps, epoch)
        return windows, windows.count(args.max_steps, args.num_train_epochs)

    def _shares_of_first_rank(self, shares: np.ndarray) -> np.ndarray:
        return broadcast(torch.from_numpy(shares), self._args.device).cpu().numpy()

    def isolating(
        self, collate: Callable[[list], Any], others: Callable[[list], Any], model: nn.Module, tokenizer: Any
    ) -> Callable[[list], Any]:
        """
        A collator that keeps the documents of packed rows apart, if the mixture says so or the model allows it.
        `collate` is the collator of packed rows, and `others` of any other rows.
        """
        eos_token_id, wanted, problem = self.data.eos_token_id, self.data.isolate_documents, None
        assert eos_token_id is not None
        if wanted is not False:
            text_config(model).use_cache = False  # the Trainer sets that of the outer configuration only
            problem = gather(isolation_problem(model))[0]  # that of the first rank
        isolate = choose_isolation(wanted, problem)
        if wanted is None and problem is not None:
            logger.warning("The documents of a packed row attend to each other: %s.", problem)
        flatten = isolate and needs_flat_rows(attention_of(model))
        return PackedRowCollator(
            collate, eos_token_id, isolate, flatten, others, getattr(tokenizer, "bos_token_id", None)
        )

    def take_loader(self, epoch: int, micro_batch: int) -> None:
        """
        Train on the last data loader that was made, whatever others are made from now on, from a micro-batch of an
        epoch on.
        """
        self._progress, self._sampler = self._last_progress, self._last_sampler
        if isinstance(self._sampler, MixtureSampler):
            self._sampler.skip_to(epoch, micro_batch)

    def begin(self, step: int) -> None:
        """Start at the position of an outer step, before the data loader starts its workers."""
        self.first_step, self._resumed_from = step, None
        if self.data.has_sources:
            self._note_sources()
        if self._progress is not None:
            self._progress.begin(step, self._resumed)

    def follow_epochs(self, sampler: Any) -> None:
        """Let a sampler draw the order of each epoch from the seed and the epoch. It may be of any class."""
        self._last_sampler = sampler
        self._generator.manual_seed(self._seed)
        if hasattr(sampler, "generator") and sampler.generator is None:  # it would draw from the global random state
            sampler.generator = self._generator

    def begin_epoch(self, epoch: int) -> None:
        """Go to an epoch. On a resume, Accelerate may not, and random states are loaded after the order is drawn."""
        self._generator.manual_seed(self._seed + epoch)
        if (set_epoch := getattr(self._sampler, "set_epoch", None)) is not None:
            set_epoch(epoch)

    def check_ranks(self, batch_size: int, evaluation: Any, settings: dict[str, Any]) -> None:
        """
        Compare data and `settings` of the ranks before the first step, in one collective. All ranks must call it.

        Raises:
            ValueError: on all ranks, if they differ.
        """
        if self._args.world_size == 1:
            return
        size, dataset = _size(self.data.dataset), self.data.dataset
        described = self._describe(batch_size) if self.data.has_sources else {}
        if not self.data.has_sources and size is not None:
            described["sample"] = sample(dataset)
        own = {
            "rows": size,
            **_describe_sets(evaluation),
            **settings,
            **described,
        }
        _compare(own)

    def check_evaluation(self, sets: Any) -> None:
        """
        Compare the sets of an evaluation, as `check_ranks`: the ranks evaluate them in turn, and add up their losses.
        """
        if self._args.world_size > 1:
            _compare(_describe_sets(sets))

    # ---- During training ----

    def agree(self, window: Window, step: int) -> None:
        """
        Share between the ranks what each found in the fetched window: an error, the end of a source, or its mark.

        Raises:
            SourceError: a rank could not read a source.
            ValueError: the readers of a source do not see the same rows.
        """
        progress, args = self._progress, self._args
        if progress is None:
            return
        progress.note_window(step, window.states)
        if window.error is not None:
            # The other ranks continued: their loaders have requested more, and wait for the first rank's weights.
            for further in range(step, min(step + progress.steps_ahead, args.max_steps - 1) + 1):
                progress.decide_shares(further)
        ended, names = progress.exhausted(window.states), self.data.names
        marks = [[s.mark for s in window.states if s.source == name and s.mark is not None] for name in names]
        highest, lowest = ([max((sign * mark for mark in of), default=-(2**32)) for of in marks] for sign in (1, -1))
        own = [window.error is not None, *(name in ended for name in names), *highest, *lowest]
        if args.world_size > 1:
            own = max_over_ranks(torch.tensor(own, device=args.device)).tolist()
        failed, *of_sources = own
        if failed:
            raise window.error or SourceError("Another rank could not read its data: see its message.")
        for name, has_ended, high, low in zip(names, *np.array(of_sources).reshape(3, -1), strict=True):
            if high + low > 0:
                raise ValueError(
                    f"Source {name!r} gives other rows on each rank or worker: it splits itself, or is shuffled "
                    "without a seed. Pass a dataset that gives all of its rows in the same order everywhere: the "
                    "mixture distributes them."
                )
            if has_ended:
                progress.leave_out(name, step)

    def skipped_rows(self, step: int) -> dict[str, int]:
        """`skipped_rows/<source>` for each source with rows that could not be used, over all ranks."""
        own = {} if self._progress is None else self._progress.skipped_rows(step)
        if not own:
            return {}
        of_lanes = max_over_ranks(torch.tensor(list(own.values()), device=self._args.device))
        counted = zip(own, of_lanes.sum(dim=1).tolist(), strict=True)
        return {f"skipped_rows/{name}": count for name, count in counted if count}

    # ---- Saving and resuming ----

    def _note_sources(self) -> dict[str, Any]:
        """The description of the sources, made once: training can change the rows of a source."""
        if self._sources is None:
            self._sources = describe_sources(self.data)
        return self._sources

    def _describe(self, batch_size: int) -> dict[str, Any]:
        size = None if self._args.auto_find_batch_size else batch_size
        weights: Any = [(stage.until, stage.weights) for stage in self.data.stages]
        if self.dynamic_weights:
            weights = "decided during training"
        elif isinstance(self.data.dataset, MixtureStream):
            weights = stage_borders(self.data.stages, self._args.max_steps)
        elif size is not None:
            weights = stage_borders(self.data.stages, self._windows(size)[1])
        return describe_data(self.data, self._args, self._seed, size, weights, self._note_sources())

    def save(self, folder: str, step: int, batch_size: int) -> None:
        """Write the description of the data and the positions of this rank's streams into a checkpoint."""
        if self.data.has_sources:
            found = {"layout": self._layout, "rows": batch_size * self._ranks}
            stream = None if self._progress is None else found | self._progress.state_dict(step)
            save_data_state(folder, self._args.process_index, self._describe(batch_size), stream)

    def resume(self, checkpoint: str | None) -> None:
        """
        Take the positions of the streams from a checkpoint, or start from zero. Before training begins, a second call
        for the same checkpoint does nothing.

        Raises:
            ValueError: the data cannot be resumed exactly, and `allow_mixture_change` is off.
        """
        self.refresh()
        if checkpoint is None:
            self._resumed = None
        elif checkpoint != self._resumed_from:
            self._resumed = self._positions(checkpoint)
        self._resumed_from = checkpoint

    def _positions(self, checkpoint: str) -> Mapping[str, Any] | None:
        """The positions of a checkpoint; `None` if there are no streams, or if they are read from the start."""
        if not self.data.has_sources:
            if self._args.nexus:
                self._warn_of_other_rows(checkpoint)
            return None
        saved, missing = load_data_state(checkpoint, self._args.process_index, self._layout)
        differences = compare_data(saved["description"], self._describe(self._args.train_batch_size)) if saved else []
        if isinstance(self.data.dataset, MixtureStream) and missing and not differences:
            differences = [f"it has no {missing} (was it saved with save_only_model, or on another disk?)"]
        elif isinstance(self.data.dataset, MixtureStream) and saved and not differences:
            differences = self._reads_too_far(saved["stream"])
        if not differences:
            return saved.get("stream")
        found = f"{checkpoint} cannot be resumed exactly: {'; '.join(differences)}."
        if not self._args.allow_mixture_change:
            batch = " (per_device_train_batch_size times the ranks)" if "rows of a micro-batch" in found else ""
            raise ValueError(
                f"{found} Restore the data or setting{batch}, or pass allow_mixture_change=True "
                "(--allow_mixture_change True): weights and optimizer are resumed, and streams are read from their "
                "beginning."
            )
        streams = isinstance(self.data.dataset, MixtureStream)
        what = ", and streams are read from their beginning" if streams else " at the same place in the schedule"
        logger.warning("%s Training goes on%s.", found, what)
        return None

    def _warn_of_other_rows(self, checkpoint: str) -> None:
        """Warn if a plain dataset, which the Trainer samples, may go on with other rows."""
        args, size = self._args, _size(self.data.dataset)
        saved = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).train_batch_size
        if size is None or args.auto_find_batch_size or saved in (None, args.train_batch_size):
            return
        rows = args.train_batch_size * self._ranks  # of a micro-batch
        # Accelerate fills the last one with rows of the beginning, in the same way on any number of ranks but one.
        fills = size % rows and not args.dataloader_drop_last and rows in (saved, args.train_batch_size)
        if fills or args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            logger.warning(
                "%s was saved with %s rows per rank, and now there are %s: micro-batches may hold other rows. Pass "
                'train_dataset as a dict from the start: {"name": dataset}.',
                *(checkpoint, saved, args.train_batch_size),
            )

    def passes_before(self, checkpoint: str) -> tuple[int, int]:
        """Of data without a length: the passes before a checkpoint, and the micro-batches of the pass after them."""
        saved = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        passes, part = divmod(saved.epoch or 0.0, 1)
        # A pass over such data counts as one of all steps.
        return int(passes), round(part * saved.max_steps * self._args.gradient_accumulation_steps)

    def _reads_too_far(self, saved: Mapping[str, Any]) -> list[str]:
        """That a source with `max_epochs` would be left out later than in the saved run, in words."""
        args, workers = self._args, max(1, self._args.dataloader_num_workers)
        owners = 1 if args.source_schedule == "mixed" else Lanes(*saved["lanes"]).owners(workers)
        ahead = steps_ahead(owners, len(self.data.names), self._read_ahead, args.gradient_accumulation_steps)
        if not any(self.data.max_epochs.values()) or ahead < saved["until_left_out"]:
            return []
        return [
            f"with max_epochs, the data loader may read {saved['until_left_out'] - 1} steps ahead, and now reads "
            f"{ahead} (lower dataloader_num_workers or dataloader_prefetch_factor)"
        ]

    # ---- Rows at any time ----

    def first_rows(self, count: int, evaluation: Any) -> dict[str, list[Any]]:
        """The first rows of each source's evaluation set, or of its training rows. Streams have none."""
        sets = self.data.indexable(evaluation).items()
        return {name: [rows[i] for i in range(min(len(rows), count))] for name, rows in sets if rows is not None}


def _describe_sets(evaluation: Any) -> dict[str, Any]:
    sets = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    sizes = {name: _size(rows) for name, rows in sets.items()}
    samples = {name: None if sizes[name] is None else sample(rows) for name, rows in sets.items()}
    return {"evaluation sets": [*sets], "evaluation rows": sizes, "evaluation sample": samples}


def _compare(own: dict[str, Any]) -> None:
    given = gather(own)
    for rank, other in enumerate(given):
        check_same(rank, compare_data(given[0], other))


def _size(dataset: Any) -> int | None:
    return len(dataset) if isinstance(dataset, Sized) else None
