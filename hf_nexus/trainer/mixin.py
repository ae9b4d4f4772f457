"""
The Trainer extension: one Nexus window per optimizer step.

[`NexusTrainerMixin`] overrides hooks of the Trainer, in the order in which a run calls them. Each hook hands over to a
collaborator that does not know the trainer: `Feed` (which rows come next), `Window` and `Walker` (one outer step),
`TrainingMeter` (counts and averages), `Evaluation`, `StagedCheckpoints` and `RandomStates`, `Publishing`.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from transformers import Trainer, default_data_collator
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import _is_peft_model, unwrap_peft_model
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, logging

from ..evaluation.cosines import gradient_cosines
from ..files import hidden, printable, require_folder, step_of, without_folders
from ..hub.benchmarks import set_aside
from ..hub.publisher import Publisher
from ..hub.run_summary import RunSummary
from ..hub.weights import convert_weights
from ..mixture.isolation import PackedRowCollator
from ..mixture.stream.progress import WeightsFunction
from ..mixture.stream.reader import SourceError
from ..mixture.tags import TaggingCollator
from ..mixture.training_data import TrainingData
from ..tensors import random_state_kept
from .arguments import adopt, arguments_by_name, changed, own_arguments, samples_sources
from .card import CARD_FILES, RunFacts, write_card
from .checkpoints import RandomStates, StagedCheckpoints
from .checks import (
    SAME_ON_RANKS,
    Launch,
    check_launch,
    check_predicted,
    check_sets,
    check_sharded,
    check_trainable,
    check_trl_arguments,
    check_vocabulary,
    choose_greater_is_better,
    refuse_unwalked,
    warn_of_one_inner_step,
    warn_of_shards,
)
from .config import nexus_settings, save_settings, warn_of_changes
from .distributed import count_paths, is_wrapped, parallelism_of, reduce_over
from .evaluation import Evaluation, held_back, without_speed_of_sets
from .feed import Feed
from .loader_workers import keep_signals_from_workers
from .meter import TrainingMeter, read_totals
from .optimizers import create_matrix_optimizer
from .precision import precision_is_chosen, widen_weights, with_state
from .publishing import Publishing, card_fields
from .sharded import is_sharded, load_model, load_optimizer
from .trackers import send_plots
from .trl import SourcePreparation, for_parent, is_of_trl, metrics_aside, naming_a_missing_template, trl_parent
from .window import Walker, Window, countable, has_token_labels, optimizer_settings

__all__ = ["NexusTrainer", "NexusTrainerMixin"]

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # the mixin is joined with any Trainer
    _Base = Trainer
else:
    _Base = object


class NexusTrainerMixin(_Base):
    """
    Trains any [`~transformers.Trainer`] subclass with the Nexus update: `class MyTrainer(NexusTrainerMixin, Base)`.

    `train_dataset` may also be a dict or `DatasetDict` of sources, a [`Mixture`], or a dataset with a `source` column.
    Every micro-batch then holds one source, the same on all ranks, unless `source_schedule` mixes them. A plain
    dataset is loaded as usual, and its micro-batches take the place of sources.

    The whole window of k = `gradient_accumulation_steps` micro-batches runs inside its last `training_step`: no
    displaced weight exists outside that call. The logged `loss` is a *path loss*: micro-batch m is evaluated at
    weights that the ones before it have moved. Compare runs by `evaluate`, never by it.

    Args:
        mixture_weights_function (`Callable[[int], Mapping[str, float]]`, *optional*):
            Gives the weights of the sources at an outer step, in place of fixed ones: a pure function of the step, or
            an object with `state_dict` and `load_state_dict`, which are then saved with the checkpoint. It is called
            once for each step, when the data loader asks for its micro-batches. On several ranks, the result of the
            first rank is used.

    Attributes:
        data ([`TrainingData`]):
            What is trained on.
        meter ([`TrainingMeter`]):
            What each source has contributed.
        card_details (`dict[str, Any]`):
            Fields of [`RunSummary`] that a trainer cannot know, such as `license` or `languages`. Every card has them.
        wait_after_training (`bool`):
            Whether `train()` of a single process waits for the Hub, up to `hub_flush_timeout`. If not, the end of the
            process waits.

    Raises:
        ValueError: an unsupported launch or precision, or a mixture that cannot be sampled; see
        docs/troubleshooting.md.
    """

    model: Any
    optimizer: Any
    hub_model_id: Any
    current_gradient_accumulation_steps: Any
    _signature_columns: Any

    # ---- Construction ----

    def __init__(self, *args: Any, mixture_weights_function: WeightsFunction | None = None, **kwargs: Any):
        given = arguments_by_name(type(self), NexusTrainerMixin, args, kwargs)
        parent, users = trl_parent(type(self)), given.get("args")
        converted = parent is not None and not is_of_trl(users)
        self._own_args = settings = own_arguments(users, converted)
        if users is not None:
            given["args"] = for_parent(settings) if converted else settings
        self._precision_is_chosen = precision_is_chosen(settings)
        whole = samples_sources(type(self), NexusTrainerMixin)
        self._feed = Feed(given.get("train_dataset"), settings, mixture_weights_function, whole)
        evaluation, mixture = given.get("eval_dataset"), self.data.mixture
        if evaluation is None and mixture is not None:
            evaluation = mixture.eval
        self._window = Window()
        self._walker = Walker(settings)
        self._evaluation = Evaluation(settings)
        self._checkpoints = StagedCheckpoints(settings, self._after_save)
        self._random_states = RandomStates()
        self._publishing = Publishing(settings)
        self.card_details: dict[str, Any] = {}
        self.wait_after_training = True
        self._best: tuple[int, int] | None = None  # see `RunFacts`
        self.cosine_rows: int | None = None  # see `source_cosines`; other runs may be measured on as many
        if parent is not None:
            check_trl_arguments(parent, users, on=not self._plain)
        self._trl = SourcePreparation(self._feed, parent)
        optimizer = (given.get("optimizers") or (None,))[0] or given.get("optimizer_cls_and_kwargs")
        self._feed.check(evaluation, optimizer, trains=not self._awaits_data)
        shown = self.data.dataset if self._trl.shown is None else self._trl.shown
        sets = {"train_dataset": shown, "eval_dataset": evaluation}
        given |= {name: rows for name, rows in sets.items() if rows is not None}  # a constructor may not take both
        collate_packed = given.get("data_collator") or default_data_collator  # they are full: none is padded
        if self.data.all_packed and getattr(given.get("processing_class"), "pad_token", None) is None:
            # For evaluation rows that are not packed as well. The Trainer's own collator needs a padding token.
            given["data_collator"] = collate_packed
        folder = Path(settings.output_dir).absolute()
        if not self._plain and settings.should_save and not folder.is_dir():
            require_folder(next(filter(Path.exists, [folder, *folder.parents])))  # where the Trainer makes it
        super().__init__(**given)
        if self._trl.shown is not None:
            self.train_dataset = self.data.dataset  # TRL has prepared the sources, or had nothing to prepare
        # The number of ranks that read the same rows is known with the model.
        copies = self._feed.copies = self._evaluation.copies = self.get_tp_size()
        self.meter = TrainingMeter(self.data.names, self.args.device, self.data.masked, copies)
        if self.data.eos_token_id is not None:
            self._isolate_documents(collate_packed, self.data_collator)
        if not self._plain:
            self._shift_labels()
        self._check(trains=not self._awaits_data)
        choose_greater_is_better(self.args)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator once there is a model, whose weights decide in which type it computes."""
        self._awaits_model = self.model is None  # that of `model_init`
        if not self._awaits_model:
            self._widen_weights(trains=not self._awaits_data)
            if AcceleratorState._shared_state and AcceleratorState().mixed_precision != self.args.mixed_precision:
                AcceleratorState._reset_state()  # of another trainer with the same arguments
            with changed(self.args, parallelism_config=parallelism_of(self.args)):
                super().create_accelerator_and_postprocess()
            self._as_created = partial(with_state, self.accelerator, dict(vars(self.accelerator.state)))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model of `model_init`, in float32."""
        self.model = super().call_model_init(trial)
        if "_awaits_model" not in vars(self):  # sentence-transformers calls it before the constructor of the Trainer
            return self.model
        if self._awaits_model:
            self.create_accelerator_and_postprocess()
        self._widen_weights(trains=not self._awaits_data)
        collator = getattr(self, "data_collator", None)  # there is none yet in the constructor
        if isinstance(collator, PackedRowCollator):
            self._isolate_documents(collator.collate, collator.others)
        return self.model

    def _widen_weights(self, trains: bool = True) -> None:
        if self.args.nexus and trains:
            widen_weights(self.model, self.args, self._precision_is_chosen)
        self._precision_is_chosen = True  # later than the accelerator, the type in which it computes is chosen

    def _shift_labels(self) -> None:
        """
        Compare the outputs of a causal model with the next tokens. The Trainer knows such a model by the name of its
        class, which FSDP2 changes, and a subclass does not have.
        """
        unwrapped: Any = unwrap_peft_model(self.model)
        names = {base.__name__ for base in type(unwrapped).__mro__} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        if getattr(unwrapped, "loss_type", None) is None:
            self._loss_shifts_labels |= any(name.endswith("ForCausalLM") for name in names)
        if names and self.label_smoother is not None:
            shifting: Any = partial(self.label_smoother, shift_labels=True)
            self.label_smoother = shifting

    def _check(self, trains: bool = True) -> None:
        """Refuse launches and names that are not supported, also for training if the trainer `trains`."""
        if not self._plain:
            check_sets(self.data.names, self.eval_dataset)
        if self.data.mixture is not None:
            check_vocabulary(self._feed.first_rows(1, self.eval_dataset), self.model)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        launch = Launch(
            kind=self.accelerator.distributed_type,
            fsdp_version=None if plugin is None else plugin.fsdp_version,
            spread_at_load=self.is_model_parallel,
            sharded_at_load=self._sharded_at_load,
            tensor_size=self.get_tp_size(),
            pipeline_size=self.model.config.distributed_config.pp_size if self._sharded_at_load else 1,
            sequence_sizes=self.get_cp_size() * self.get_sp_size(),
            adapters=_is_peft_model(self.model),
            has_sources=self.data.has_sources,
            trains=trains,
        )
        check_launch(self.args, launch)

    def _isolate_documents(self, collate: Any, others: Any) -> None:
        """Keep the documents of packed rows, which `collate` collates, apart in training and evaluation."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.data_collator = self._feed.isolating(collate, others, model, self.processing_class)
        self._set_signature_columns_if_needed()  # the collator takes the positions that a model does not know
        self._signature_columns.append("position_ids")

    @property
    def args(self) -> Any:
        """The training arguments with the Nexus fields: one object, which collaborators share."""
        return self._own_args

    @args.setter
    def args(self, args: Any) -> None:
        adopt(self._own_args, args)

    @property
    def _sharded_at_load(self) -> bool:
        """Whether transformers has sharded the model (`distributed_config`)."""
        return bool(self.is_distributed_loading_by_transformers)

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded, by transformers or Accelerate."""
        return self.is_fsdp_enabled or self._sharded_at_load

    @property
    def _shards(self) -> int:
        """The largest number of ranks over which a parameter is sharded, 1 if none is."""
        config = self.accelerator.parallelism_config
        replicas = 1 if config is None else config.dp_replicate_size
        return self.args.world_size // replicas if self.sharded else 1

    @property
    def _plain(self) -> bool:
        """Whether the run is the base class's: without the update, on data without sources."""
        return not self.args.nexus and not self.data.has_sources

    @property
    def _awaits_data(self) -> bool:
        """Whether the trainer was built without training data. It may only evaluate, or get them before `train()`."""
        return self.data.dataset is None and type(self).get_train_dataloader is Trainer.get_train_dataloader

    @property
    def data(self) -> TrainingData:
        """What is trained on."""
        return self._feed.data

    @property
    def mixture_weights(self) -> dict[str, float] | None:
        """Shares of the sources, in the last stage; `None` for a plain dataset."""
        return self.data.weights

    @property
    def publisher(self) -> Publisher | None:
        """On the main process, once there is a repository to push to."""
        return self._publishing.publisher

    @property
    def stopped_by_sigterm(self) -> bool:
        """Whether the Trainer's `enable_jit_checkpoint` has ended training."""
        return self._checkpoints.stopped_by_sigterm

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository and branch if missing, or later if the Hub is unreachable. All ranks must call it.

        Raises:
            ValueError: on all ranks, if the Hub refuses.
        """
        token = hidden(token)
        self.hub_model_id = self.card_details["repo_id"] = self._publishing.connect(token, private)

    def _prepare_dataset(self, *args: Any) -> Any:
        """TRL's preparation of a dataset. For the first source, prepare all sources."""
        prepare = naming_a_missing_template()(super()._prepare_dataset)  # type: ignore[misc]  # of TRL's trainers
        return self._trl.prepare(prepare, *args)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's log-probabilities of the reference model, for each source."""
        compute = super()._precompute_ref_logps  # type: ignore[misc]  # of TRL's trainers
        return self._trl.apply(dataset, lambda _, source: compute(source, name, batch_size), name)

    # ---- Before the first step ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as the base class does. `resume_from_checkpoint` may also be `"last"` or `"true"`, as on a command line.

        The folder of the run is locked. If a source cannot be read any more, a checkpoint is saved before the error is
        raised, unless nothing was trained since the last.

        Raises:
            ValueError: there is no complete checkpoint, or the given one is not complete, or another process trains in
                the same folder.
            SourceError: the network failed for too long, or a source has a row that cannot be used.
        """
        run_dir = self._get_output_dir(kwargs.get("trial", args[0] if args else None))
        with self._checkpoints.in_folder(run_dir, resume_from_checkpoint) as checkpoint, self._as_created():
            if self.publisher is not None:
                self.publisher.queue.clean()
            self._feed.resume(checkpoint)
            self._best = None
            try:
                return super().train(checkpoint, *args, **kwargs)
            except SourceError as error:
                self.is_in_train = False
                step = self.state.global_step
                if step == self._feed.first_step:  # there is nothing new to save
                    raise
                if not self._checkpoints.has_saved(step):
                    self._save_checkpoint(self.model, trial=None)
                raise SourceError(
                    f"{error}\nTraining stopped after step {step}, and a checkpoint was saved in "
                    f"{self.args.output_dir!r}. Fix the cause, then go on with resume_from_checkpoint=True."
                ) from error
            finally:
                self.meter.end()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Load a checkpoint, and warn of settings that have changed."""
        if self._reads_shards(resume_from_checkpoint):
            load_model(args[0] if args else self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        warn_of_changes(self.resolved_settings(), resume_from_checkpoint)

    def _reads_shards(self, checkpoint: str | None) -> bool:
        """Whether model and optimizer of a checkpoint are in sharded files. The Trainer reads those of adapters."""
        return checkpoint is not None and is_sharded(checkpoint) and not _is_peft_model(self.model)

    def check_data(self, checkpoint: str) -> None:
        """Raise `ValueError` unless the data is that of a checkpoint, or `allow_mixture_change` is on."""
        self._feed.resume(checkpoint)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """
        The base class's data loader, whose workers outlive a signal and read a window ahead. Batches of evaluations
        keep the lengths of concatenated rows.
        """
        if self._plain:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        if description == "Training":
            dataset = self._feed.apart(dataset)
            own = changed(self.args, dataloader_prefetch_factor=self._feed.prefetch_factor)
        else:
            own = changed(self, data_collator=self._evaluation.counting(self.data_collator, dataset))
        with own:
            loader = super()._get_dataloader(dataset, description, *args, **kwargs)
        if self.args.dataloader_num_workers:
            keep_signals_from_workers(loader, self.args)
        return loader

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """The base class's collator. Training micro-batches are tagged with their source."""
        collate = super()._get_collator_with_removed_columns(data_collator, description)
        return TaggingCollator(collate) if description == "Training" and self.data.has_sources else collate

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """The order of the sources and their rows."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = self._feed.sampler(dataset, self._train_batch_size)
        if sampler is None:
            sampler = super()._get_train_sampler(train_dataset)
        if not self._plain:
            self._feed.follow_epochs(sampler)
        return sampler

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """The state of a run, and where it goes on in the data: in passes, and in micro-batches of the next pass."""
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # The Trainer computes the place from the length of the loader. Without one, epochs have no limit.
        endless = num_train_epochs == sys.maxsize and not self._plain
        if endless and resume_from_checkpoint and self.state.global_step and not self.args.ignore_data_skip:
            place = self._feed.passes_before(resume_from_checkpoint)
        self._feed.take_loader(*place)
        return place

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wrap the model as the base class does, and start the collaborators at the current step."""
        step = self.state.global_step
        self._walker.reset()  # the wrapped model and its parameters may be new
        self._cosines_at = -1  # the step of the last source cosines: the last step may be logged twice
        self._widen_weights()  # those that were unfrozen since
        if not self._plain:
            self._check_start(max_steps)
        if self.args.world_size > 1 and not is_wrapped(self.model_wrapped):
            # An evaluation before training marks the model as prepared. Accelerate would not wrap it any more.
            bare: Any = self.accelerator.unwrap_model(self.model)
            bare._is_accelerate_prepared, self.model_wrapped = False, bare
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.nexus:
            # The filter waits for the device at each loss, also at the zeros before the last micro-batch of a window.
            # `_walk_window` replaces a window without a finite loss.
            self.args.logging_nan_inf_filter = False
            if self.is_fsdp_enabled:
                check_sharded(prepared[0])
            self._walker.begin(prepared[0], self.optimizer)
        else:
            reduce_over(prepared[0], None)
        self._feed.begin(step)
        self._random_states.begin()
        self._checkpoints.find_best(self.state)
        self.meter.begin(read_totals(resume_from_checkpoint))
        if self.args.should_save and step < max_steps:
            set_aside(self.args.output_dir)
        return prepared

    def _check_start(self, max_steps: int) -> None:
        """Refuse what is not supported, with the arguments of this moment, and ranks that differ."""
        self._feed.check(self.eval_dataset)
        self._check()
        warn_of_one_inner_step(self.args)
        if self._saves_shards:
            warn_of_shards(self.args)
        check_trainable(self.model)
        settings = nexus_settings(self.args) | {name: getattr(self.args, name) for name in SAME_ON_RANKS}
        del settings["mixture_weights"]  # their shares are compared
        trainable = {name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        settings |= {"steps": max_steps, "step": self.state.global_step, "trainable parameters": trainable}
        if self.optimizer is not None:  # it was given, or is that of an earlier training
            settings["optimizer"] = [type(self.optimizer).__name__, *optimizer_settings(self.optimizer)]
        self._feed.check_ranks(self._train_batch_size, self.eval_dataset, settings)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The base class's optimizer, or with `matrix_optimizer` its AdamW joined with that."""
        if self.optimizer is None and self.args.matrix_optimizer is not None:
            model = self.model if model is None else model
            _, adamw = self.get_optimizer_cls_and_kwargs(self.args)
            decaying = self.get_decay_parameter_names(model)
            self.optimizer = create_matrix_optimizer(model, self.args, adamw, decaying, self._shards)
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer as the base class does, or from sharded files."""
        if not self._reads_shards(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            assert checkpoint is not None and self.lr_scheduler is not None
            load_optimizer(self.model, self.optimizer, checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        """The base class's epoch. A run that is resumed after its last step trains no further."""
        if not self._plain:
            if self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
                return
            self._random_states.begin_epoch(self.state.global_step, self.state.epoch)
            self._feed.begin_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._random_states.loaded()

    # ---- One outer step ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Fetch the micro-batches of one window, note their sources, and count the loss tokens of each."""
        if self._plain:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        mixed, optimizer = self.args.source_schedule == "mixed", optimizer_settings(self.optimizer)
        self._window = window = Window(mixed=mixed, optimizer=optimizer)
        untagged = window.take(self._feed.in_order(epoch_iterator), tagged=self.data.has_sources)
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        count: Any = self._get_num_items_in_batch
        with self._without_averages():  # a rank with an error has fewer micro-batches, and joins in `agree` only
            batches, _ = super().get_batch_samples(untagged, num_batches, device)
            self._feed.agree(window, self.state.global_step)
            # The count of the whole window is for overrides of `training_step`. A micro-batch is divided by its own.
            return batches, window.count(batches, [count([batch], device) for batch in batches], ranks)

    def _without_averages(self) -> AbstractContextManager[None]:
        """
        Count loss tokens on this rank only, and multiply no loss by the number of ranks, inside the context. The
        Trainer does so with `average_tokens_across_devices` if the model takes a count, even if it ignores it.
        """
        return changed(self.args, average_tokens_across_devices=False)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The loss tokens of labels that the base class can count, on this rank."""
        if self._plain:
            return super()._get_num_items_in_batch(batch_samples, device)
        items = super()._get_num_items_in_batch([countable(batch, self.model) for batch in batch_samples], device)
        # The Trainer divides by the number of ranks that read the same rows, even if it counts on one rank only.
        return None if items is None else items * self._feed.copies

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """
        One micro-batch of the base class's loop. With Nexus, the micro-batches of a window are kept, and the last one
        runs the whole window.

        Returns:
            `Tensor`: 0-d. With Nexus, zero for all but the last, then the token-weighted mean path loss of the window.
        """
        window = self._window
        if window.complete:  # no window was fetched
            if not self.args.nexus:
                return super().training_step(model, inputs, num_items_in_batch)
            raise RuntimeError("training_step() runs inside train() only: a window is fetched as a whole before it.")
        if not window.inputs:
            self._random_states.begin_window(self.state.global_step)
            self.meter.begin_window(self.state.global_step, window.unit)
            # A schedule-free optimizer keeps other weights for evaluation, and must not swap them inside the window.
            self.optimizer.train()
            self._log_source_cosines(at_end=False)
        window.inputs.append(inputs)
        if not self.args.nexus:
            i = len(window.inputs) - 1
            loss = self._micro_step(model, i, whole=True)
            self.meter.add_micro_batch(*window.summed(i, window.mean_of_part(i, loss)))
            return loss
        if len(window.inputs) == len(window):
            if self.accelerator.gradient_state.sync_gradients:
                return self._walk_window(model)
            # The stream ended inside the window: the Trainer will not step.
            logger.warning(f"The data ended inside a window: its {len(window)} micro-batches were dropped.")
        return torch.zeros((), device=self.args.device)

    def _micro_step(self, model: nn.Module, i: int, whole: bool = False) -> Tensor:
        """
        The base class's `training_step` of micro-batch `i`, whose count is the mean over the ranks.

        Returns:
            `Tensor`: the mean loss, 0-d. With `whole`, its part of the window's loss.
        """
        divisors = self._window.divisors(i, differentiable=not self.sharded, whole=whole)
        alone = self.args.nexus and self._walker.groups.alone  # each rank walks its own path
        with (
            self.accelerator.no_sync(model) if alone else nullcontext(),
            self._without_averages(),
            changed(self, current_gradient_accumulation_steps=divisors.steps),
        ):
            return divisors.divide(super().training_step(model, self._window.inputs[i], divisors.items))

    def _walk_window(self, model: nn.Module) -> Tensor:
        """Run the window with the Nexus update."""
        window, step = self._window, self.state.global_step
        losses, nexus = self._walker.walk(model, window, self._micro_step, optimizer=self.optimizer, step=step)
        self.meter.add_walk(window, losses, nexus)
        # The base class adds losses up, and one NaN would spoil every later log. A window without a finite loss
        # returns the running mean; an interval of only such windows is logged as NaN by the meter.
        running = self._tr_loss / (1 + step - self._globalstep_last_logged)
        return window.mean_loss(losses, otherwise=running)

    def _log_source_cosines(self, at_end: bool) -> None:
        every, step = self.args.gradient_cosine_steps, self.state.global_step
        if not every or (step % every and not at_end) or self._cosines_at == step:
            return
        self._cosines_at = step
        with self.meter.paused(), metrics_aside(self):
            self.log({f"cosine/{a}/{b}": value for (a, b), value in self.source_cosines().items()})

    def source_cosines(self) -> dict[tuple[str, str], float]:
        """
        Gradient cosine of each pair of sources at the current weights, with dropout off. Neither the random states nor
        the gradients of the run change.

        Each gradient is taken on the first `cosine_rows` rows of the source's evaluation set, or of its training rows
        if it has none: the same on every rank. These are `per_device_train_batch_size` rows if it is unset.
        """
        collate = self._get_collator_with_removed_columns(self.data_collator)
        rows = self._feed.first_rows(self.cosine_rows or self.args.per_device_train_batch_size, self.eval_dataset)
        trained, device = [p for p in self.model.parameters() if p.requires_grad], self.args.device

        compute_loss: Any = self.compute_loss  # without the outputs

        def loss(batch: Any) -> Tensor:
            with self.compute_loss_context_manager(), self._without_averages():
                items = self._get_num_items_in_batch([batch], device)
                return compute_loss(self.model, dict(batch), num_items_in_batch=items)

        losses = {name: partial(loss, self._prepare_inputs(collate(of_source))) for name, of_source in rows.items()}
        self.model.eval()
        with random_state_kept(device), metrics_aside(self):
            cosines = gradient_cosines(losses, trained)
        self.model.train()
        return cosines

    def floating_point_ops(self, inputs: Any) -> int:
        """The base class's count, once per window and size of micro-batches: the Trainer's walks over all modules."""
        count: Any = super().floating_point_ops
        name = getattr(self.model, "main_input_name", "input_ids")
        main = inputs.get(name) if isinstance(inputs, Mapping) else None
        trainers = getattr(count, "__func__", None) is Trainer.floating_point_ops
        if self._plain or not trainers or not isinstance(main, Tensor):
            return count(inputs)
        if (size := main.numel()) not in self._window.flops:
            self._window.flops[size] = count(inputs)
        return self._window.flops[size]

    # ---- After an outer step ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as the base class does. `on_save` may change the new checkpoint."""
        if self.args.nexus and self.accelerator.gradient_state.sync_gradients and not self._window.complete:
            refuse_unwalked(len(self._window.inputs), len(self._window), type(self))
        self._checkpoints.report_completed()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._checkpoints.seal_again()
        if not self._plain and (self.state.global_step >= self.state.max_steps or self.control.should_training_stop):
            self._log_source_cosines(at_end=True)  # after the losses: a log line clears `should_log`

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the numbers of the window, the sources and the Hub in each training log line."""
        # A script may also log a loss, on one rank only, which would wait for a sum over all, or evaluate as "train".
        step, ours = self.state.global_step, self.is_in_train and not self._plain
        if ours and {"loss", "learning_rate"} <= logs.keys():
            if self._walker.nexus is not None:
                logs["inner_lr"] = self._walker.nexus.effective_inner_lr
            logs |= self.meter.read(step, self.state.total_flos)
            logs |= self._feed.skipped_rows(step)
            logs |= self._publishing.logs()
        ended = ours and {"train_loss", "total_flos"} <= logs.keys()
        if ended:
            self.meter.update_totals(step)
        super().log(logs, start_time)
        if ended:
            per_token = self.run_facts().per_token
            send_plots(self.callback_handler.callbacks, self.state, self.data.names, per_token)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether to save with `save_strategy="best"`: the best so far, or one that a callback asked to be saved."""
        return super()._determine_best_metric(metrics, trial) or self.control.should_save

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """
        Evaluate one set as the base class does, or several sets at once, at the restored weights.

        The loss of a set is the sum of its token losses over the number of its loss tokens, in nats per token: the
        same at any batch size and on any number of ranks. (`dataloader_drop_last` leaves rows out, and an iterable
        evaluation set that is split by `dispatch_batches=False` repeats some.) The base class's mean over rows stays
        for labels that are not one per token, for models that take no `num_items_in_batch`, and with `nexus=False` and
        one plain training set.

        Several sets are logged and given to `on_evaluate` once, with two means: `<prefix>_loss`, the macro loss over
        the mixture's sources with the mixture's weights, and `<prefix>_ood_loss`, the plain mean over the other sets.
        If no set is named like a source, `<prefix>_loss` covers all sets equally. Each token loss comes with its
        perplexity. What a base class adds to the log of an evaluation (TRL's `eval_rewards/accuracies`, for example)
        is there for each set, as `<prefix>_<name>_rewards/accuracies`.

        Args:
            eval_dataset (`Dataset`, `dict[str, Dataset]` or `str`, *optional*):
                As in [`~transformers.Trainer.evaluate`]. The names `ood` and `macro` are reserved.
            **kwargs:
                Passed on to the base class (`Seq2SeqTrainer`'s generation arguments, for example).

        Returns:
            `dict[str, float]`: the metrics of all sets.
        """
        sets: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        evaluate: Any = super().evaluate
        keeps = self._plain or eval_dataset is None or isinstance(eval_dataset, str)

        def evaluate_set(name: str, prefix: str) -> dict[str, float]:
            dataset = name if eval_dataset is None else sets[name]
            return evaluate(dataset, ignore_keys=ignore_keys, metric_key_prefix=prefix, **kwargs)

        # The Trainer would keep one loader with its workers for all sets that are given.
        own = changed(self.args, dataloader_persistent_workers=keeps and self.args.dataloader_persistent_workers)
        with self.meter.paused(), self._walker.at_start(), self._as_created(), own:
            if self._plain or not isinstance(sets, Mapping):
                return evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **kwargs)
            check_sets((), sets)
            self._feed.check_evaluation(sets)
            with held_back(self.callback_handler, self.state.log_history):
                weights = self.mixture_weights or {}
                metrics = self._evaluation.each(list(sets), evaluate_set, weights, metric_key_prefix)
            self.log(metrics)
            shown = without_speed_of_sets(metrics, list(sets), metric_key_prefix)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, shown)
            return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The base class's loop; its loss is replaced by the mean over tokens."""
        options: dict[str, Any] = {"prediction_loss_only": prediction_loss_only, "ignore_keys": ignore_keys}
        options |= {"description": description, "metric_key_prefix": metric_key_prefix}
        if self._plain:
            return super().evaluation_loop(dataloader, **options)
        filters = self._evaluation.filters_losses
        with changed(self.args, logging_nan_inf_filter=filters), self._evaluation.loop(dataloader) as mean:
            output = super().evaluation_loop(dataloader, **options)
        loss = self._evaluation.token_loss(mean)
        if loss is not None and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """The base class's step; the loss is the mean over this rank's rows, whose tokens are counted."""
        evaluation, base_step = self._evaluation, super().prediction_step

        def step(inputs: Any, loss_only: bool) -> tuple:
            output = base_step(model, inputs, loss_only, *args, **kwargs)
            if output[0] is not None:
                evaluation.labels_are_tokens = has_token_labels(inputs)
            return output

        if evaluation.mean is None:  # the base class unchanged
            return step(inputs, prediction_loss_only)

        def again(inputs: Any) -> tuple:
            with metrics_aside(self):  # TRL's were collected with the loss
                return step(inputs, False)

        with self._without_averages():
            count = self._get_num_items_in_batch
            return evaluation.step(
                inputs, prediction_loss_only, step, again, lambda rows: count([rows], self.args.device)
            )

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict one set at the restored weights."""
        check_predicted(test_dataset)
        with self._walker.at_start(), self._as_created():
            return super().predict(test_dataset, *args, **kwargs)

    # ---- Saving ----

    # A new file of the run is written here after the call of the base class, by the rank with `args.should_save`, and
    # not if `_plain`. What is summed over ranks is summed before. The folder is renamed when it is complete, with a
    # manifest of any files, also in folders. Checkpoints of older releases lack the file, or have it in its old place.
    # One that moves needs the module that writes it, the test of it, and what a search for its name finds; callers of
    # `write_checkpoint` take any files. A file also needs,
    # - if each rank has one: `_save_rng_state`;
    # - if it is a state of the data: `mixture/state.py` (`save_data_state`, `load_data_state`) for its place, and for
    #   its content `trainer/feed.py` (`resume`) and, of streams, `mixture/stream/progress.py`;
    #   `tests/trainer/test_resume.py`;
    # - if only checkpoints have it, and not `output_dir`: `hub/publisher.py` (`_RESUME_ONLY`, the starts of paths that
    #   the main folder of a repository does not have), `tests/hub/test_publisher.py`, `tests/support/hub/runs.py`
    #   (`write_checkpoint`). Pushed checkpoints have all files of their manifest;
    # - if a resume is refused without it: `trainer/checkpoints.py` (`_STATES`); if the manifest changes:
    #   `tests/trainer/test_checkpoints.py`.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint of the restored weights, complete or not at all, then push it."""
        with self.meter.paused():
            self.meter.update_totals(self.state.global_step)
            self._record_status()
            run_dir = self._get_output_dir(trial)
            with self._walker.at_start(), self._checkpoints.stage(run_dir, self.state) as folder:
                super()._save_checkpoint(model, trial)
                if self.args.should_save and not self._plain:
                    self.meter.save(folder)
                if self.args.checkpoint_async:
                    optimizer = None if self.args.save_only_model else self.optimizer
                    self._checkpoints.write_later(folder, self.model, optimizer)

    def _record_status(self) -> None:
        """Put the status of publishing into the part of the saved state for collaborators."""
        states: Any = self.state.stateful_callbacks
        self._publishing.record(states)

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of checkpoints, or of incomplete ones while a checkpoint is written."""
        return self._checkpoints.folder(super()._get_output_dir(trial))

    @property
    def _saves_shards(self) -> bool:
        """Whether FSDP saves checkpoints in sharded files."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return plugin is not None and plugin.state_dict_type != StateDictType.FULL_STATE_DICT

    @property
    def _weights_follow(self) -> bool:
        """Whether a checkpoint is being written whose weights follow in sharded files."""
        return self._checkpoints.staging and (self.args.checkpoint_async or self._saves_shards)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the restored weights. With `push_to_hub`, those of the output folder are queued as well."""
        with self._walker.at_start():
            if self._weights_follow:
                self._save(output_dir, {})
            elif self.is_fsdp_enabled and not self._checkpoints.staging:
                # The base class saves nothing with SHARDED_STATE_DICT. All ranks gather the whole weights.
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
            else:
                super().save_model(output_dir, _internal_call=True)
            if self.args.push_to_hub and not _internal_call:
                if Path(output_dir or self.args.output_dir) != Path(self.args.output_dir):
                    self.save_model(_internal_call=True)
                self._publish_run("Model save")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model, the arguments without what is private, and the Nexus settings."""
        output_dir = output_dir or self.args.output_dir
        given = vars(self.args)
        # Saved arguments are uploaded.
        public = {} if self.hub_model_id is None else without_folders(given)
        public = {name: value for name, value in public.items() if value != given[name]} | {"hub_token": None}
        # peft would write an empty template as the text of the user, or replace the tags of a card.
        methods: dict[str, Any] = {"create_or_update_model_card": lambda folder: None}
        # transformers writes the weights on the first rank only, and a machine without a shared disk needs them, too.
        if self.args.save_on_each_node and not self._sharded_at_load:
            methods["should_save_on_this_rank"] = lambda is_main_process: is_main_process
        model = vars(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        model |= methods
        try:
            with changed(self.args, **public):
                super()._save(output_dir, state_dict)
        finally:
            for name in methods:
                del model[name]  # the method of the class is back
        if self.args.should_save:
            if self._weights_follow:  # an empty file, for adapters and models that are not of transformers
                for name in (SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
                    Path(output_dir, name).unlink(missing_ok=True)
            dtype = None if self._checkpoints.staging else self.args.save_dtype
            # An evaluation with `bf16_full_eval` leaves a model of 16 bits.
            wide = self.args.nexus and any(p.dtype == torch.float32 for p in self.model.parameters())
            if dtype is not None or wide:
                convert_weights(Path(output_dir), Path(output_dir), dtype)
        if self.args.should_save and not self._plain:
            save_settings(self.resolved_settings(), output_dir)

    def resolved_settings(self) -> dict[str, Any]:
        """The resolved Nexus fields with the mixture weights, and the number of paths if several, as plain data."""
        paths = count_paths(self.args.inner_sync, self.args.node_size) if self.args.nexus else 1
        own = {"mixture_weights": self.mixture_weights} | ({"paths": paths} if paths > 1 else {})
        return {**nexus_settings(self.args), **own}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both as the base class does, or the scheduler if the optimizer follows in sharded files."""
        if not self.args.checkpoint_async:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states and the positions of the data from which the checkpoint is resumed."""
        step = self.state.global_step
        with self._random_states.to_save(step):
            super()._save_rng_state(output_dir)
        self._feed.save(output_dir, step, self._train_batch_size)

    def _after_save(self, checkpoint: str) -> None:
        """Push a checkpoint that is complete, and delete the oldest."""
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        self._checkpoints.rotate(checkpoint, self.state.best_model_checkpoint)

    def save_state(self) -> None:
        """Save `trainer_state.json`, with the status of publishing at this moment."""
        self._record_status()
        super().save_state()

    # ---- The end of training ----

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the last checkpoint, which a run that can go on keeps, then end as the base class does."""
        self._checkpoints.wait()
        # With a limit of 1, the base class deletes all checkpoints but the best.
        limit = self.args.save_total_limit if self.state.global_step >= self.state.max_steps else None
        with changed(self.args, save_total_limit=limit):
            return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        if self._reads_shards(best):
            load_model(self.model, best)
        else:
            super()._load_best_model()
        self._best = step_of(Path(best)), len(self.state.log_history)  # a later step may be better, and not saved

    def _finish_current_push(self) -> None:
        """Wait for the Hub after training, on a single process."""
        alone = self.args.world_size == 1  # the other ranks would wait at the next collective
        if self.wait_after_training and alone and self.args.hub_strategy != "end":
            self._publishing.wait("End of training")

    # ---- Cards and the Hub ----

    def run_facts(self) -> RunFacts:
        """The facts of this run for its card."""
        chats = self.data.has_messages or trl_parent(type(self)) is not None
        return RunFacts(
            args=self.args,
            model=self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
            log_history=self.state.log_history,
            data=self.data,
            evaluation=self.eval_dataset,
            trained_tokens=self.meter.trained_tokens,
            rows=self.meter.rows,
            unit=self.meter.unit,
            nexus=self.resolved_settings(),
            seconds=self.meter.seconds,
            dynamic_weights=self._feed.dynamic_weights,
            best=self._best,
            labels_are_tokens=self._evaluation.labels_are_tokens,
            cosine_rows=self.cosine_rows or self.args.per_device_train_batch_size,
            chat=chats and getattr(self.processing_class, "chat_template", None) is not None,
        )

    def write_card(self, folder: str | Path | None = None, *, plots: bool = True, **known: Any) -> RunSummary:
        """
        Write the card of the run so far into a folder (`output_dir` by default), on the main process.

        `plots=False` leaves out the plots, which take most of the time. `known` are fields of [`RunSummary`] that a
        trainer cannot know, such as `license`, `languages` or `benchmarks`.

        Raises:
            ValueError: the existing README is damaged, or the card would be invalid (an unknown licence, for example).

        Example:
            >>> trainer.write_card(license="apache-2.0", languages=["en"])  # doctest: +SKIP
        """
        known = {**self.card_details, **known}
        return write_card(self.run_facts(), folder or self.args.output_dir, plots=plots, **known)

    def create_model_card(self, *args: Any, **details: Any) -> None:
        """
        Write the card into the output folder, as [`~NexusTrainerMixin.write_card`]. If that fails, a warning says why.

        `details` are fields of [`RunSummary`], or `language`, `tags`, `tasks` and `model_name` as in
        [`~transformers.Trainer.create_model_card`]. The run itself knows the other arguments.
        """
        self.card_details |= card_fields(args, details)
        self._try_to_write_card(plots=not self._checkpoints.staging)  # TRL calls this for each checkpoint

    def _try_to_write_card(self, plots: bool) -> None:
        if not self.is_world_process_zero():
            return
        try:
            self.write_card(plots=plots)
        except Exception as error:  # a card must not cost a run
            logger.warning(f"The card could not be written: {printable(error)}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Queue a checkpoint once it is complete."""
        if self._checkpoints.staging or not self._publishing.pushes_checkpoints:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._try_to_write_card(plots=False)  # drawing would delay training; the last card has the plots
        step = int(checkpoint_folder.rpartition("-")[2])  # training may have gone on
        self._publishing.push_checkpoint(checkpoint_folder, step, CARD_FILES)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **details: Any,
    ) -> Any:
        """
        Save the model and push the output folder without its checkpoints. All ranks must call it.

        Arguments are those of [`~transformers.Trainer.push_to_hub`]; `private` is as for `init_hf_repo`, and `details`
        as for `create_model_card`. If `blocking`, the main process waits up to `args.hub_flush_timeout` seconds.

        Returns:
            `CommitInfo`, *optional*: on the main process, if it waited and everything is on the Hub. `None` is not an
            error: the rest stays on disk.

        Raises:
            ValueError: if there is no repository to push to yet, as `init_hf_repo`.

        Example:
            >>> trainer.push_to_hub(license="apache-2.0", language="en")  # doctest: +SKIP
        """
        token = hidden(token)
        if self.hub_model_id is None or token is not None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        message = commit_message or "End of training"
        self._publish_run(message, revision, **details)
        return self._publishing.wait(message) if blocking else None

    def _publish_run(self, commit_message: str, revision: str | None = None, **details: Any) -> None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card(**details)
        self.save_state()
        self.publish(commit_message, revision)

    def publish(self, commit_message: str, revision: str | None = None) -> None:
        """Queue the output folder as it is, without its checkpoints."""
        self._publishing.push_run(self.state.global_step, commit_message, revision)

    def end_publishing(self, seconds: float) -> None:
        """Wait for the Hub now, not when the process ends: at most `seconds`, and at most `hub_flush_timeout`."""
        self._publishing.end(seconds)


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
