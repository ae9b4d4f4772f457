"""
Errors and warnings for unsupported launches and settings.

Each `check_` function raises a ValueError that names what is not supported and what to use instead.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..mixture.config import RESERVED_NAMES
from ..nexus import Nexus
from ..strict import Bound
from .config import NexusConfigMixin, lower_is_better
from .distributed import is_wrapped

__all__ = [
    "ONE_INNER_STEP",
    "SAME_ON_RANKS",
    "Launch",
    "check_arguments",
    "check_exchange",
    "check_fsdp",
    "check_launch",
    "check_one_gpu",
    "check_predicted",
    "check_same",
    "check_sets",
    "check_sharded",
    "check_trainable",
    "check_trained",
    "check_trl_arguments",
    "check_vocabulary",
    "check_windows",
    "choose_greater_is_better",
    "refuse_unwalked",
    "warn_of_buffers",
    "warn_of_one_inner_step",
    "warn_of_shards",
    "warn_of_short_steps",
]

logger = logging.get_logger(__name__)

# Root mean square of an inner step below which the noise of bfloat16 autocast hides a third of the path's signal.
AUTOCAST_FLOOR = 3e-6

ONE_INNER_STEP = (
    "gradient_accumulation_steps=1: a window of one inner step only normalizes the gradient. Set it to 4 or more (and "
    "divide per_device_train_batch_size) to use Nexus."
)

# Arguments that all ranks must share: they decide the steps, and when the ranks wait for each other.
SAME_ON_RANKS = (
    *("seed", "data_seed", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
    *("mixed_precision", "average_tokens_across_devices", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("logging_strategy", "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps"),
    *("logging_first_step", "eval_on_start", "eval_delay", "include_num_input_tokens_seen", "load_best_model_at_end"),
    *("train_sampling_strategy", "dataloader_drop_last", "checkpoint_async"),
)

_LAYERWISE = {name for name in OptimizerNames if name.value.endswith("_layerwise")}
_FUSED_BACKWARD = {OptimizerNames.LOMO, OptimizerNames.ADALOMO}
# Values of `optim` that can be combined with `matrix_optimizer`.
_ADAMW = {OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED}
# Devices and their names follow `torch.accelerator`. A device whose peak `trainer/meter.py` (`_PEAK_FLOPS`) does not
# know has no MFU in the log.
_DDP = {
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}

# Of arguments that the Trainer counts or divides with, and does not check.
_RANGES = {
    "gradient_accumulation_steps": Bound(least=1, most=10**6),
    "per_device_train_batch_size": Bound(least=1, most=10**6),
    "per_device_eval_batch_size": Bound(least=1, most=10**6),
    "max_steps": Bound(most=10**9),
    "num_train_epochs": Bound(least=0, most=10**6),
    "dataloader_num_workers": Bound(least=0, most=1000),
    "seed": Bound(least=0, most=2**32 - 1),
}


# ---- The model and the ranks ----


def check_trainable(model: nn.Module) -> None:
    """Refuse a model without trainable parameters."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "The model has no trainable parameters: all have requires_grad=False. Unfreeze some, or add adapters. "
            "Saved adapters load frozen: merge them into their base, or load them by peft with is_trainable=True."
        )


def check_trained(model: nn.Module, trained: Iterable[Tensor], ranks: int, changed: bool) -> None:
    """
    Refuse a wrapped model whose trainable parameters are not those of the optimizer, are not reduced over the ranks,
    or have `changed` since it was wrapped.
    """
    known, own = set(map(id, trained)), set(map(id, model.parameters()))
    if changed and ranks > 1:
        raise ValueError(
            "The trainable parameters changed after training began. On several ranks, DDP and FSDP2 reduce the "
            "gradients of those that were trainable at the start. Change them before, in a new trainer for each stage."
        )
    if ranks > 1 and not is_wrapped(model):
        raise ValueError(
            f"The model is not wrapped by DDP or FSDP2, so each of {ranks} ranks would train alone. Leave wrapping to "
            "the Trainer, and pass the bare model."
        )
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in known:
            raise ValueError(
                f"Parameter {name.removeprefix('module.')!r} is trainable, but the optimizer does not train it. Add "
                "it to a group (`optimizer.param_groups[0]['params'].append(p)`: schedulers of the learning rate take "
                "no new group), or freeze it with requires_grad_(False)."
            )
    if ranks > 1 and known - own:  # DDP does not reduce their gradients, so each rank would walk its own path
        raise ValueError(
            "The optimizer trains parameters that are not the model's (those of a loss function, for example). Nexus "
            "supports this on one rank only."
        )


def check_same(rank: int, differences: list[str]) -> None:
    """Refuse a rank with other data or settings than the first."""
    if differences:
        raise ValueError(
            f"The ranks were given different data or settings. From rank 0 to rank {rank}, {'; '.join(differences)}. "
            "Give all ranks the same."
        )


def check_windows(windows: list[tuple[list[str], list[dict[str, Any]]]]) -> None:
    """Refuse a window that has other sources, or other settings of the optimizer, on another rank."""
    sources, groups = windows[0]
    for rank, (others, of_rank) in enumerate(windows):
        if others != sources:
            raise ValueError(
                f"The ranks hold different sources in one window: rank 0 has {', '.join(sources)}, and rank {rank} "
                f"has {', '.join(others)}. Leave the sampler and the data loader of the training data to the trainer."
            )
        if of_rank != groups:
            pairs = zip(groups, of_rank, strict=False)
            keys = {key for own, other in pairs for key in own if own[key] != other.get(key)} or {"parameter groups"}
            raise ValueError(
                f"The optimizer of rank {rank} has another {', '.join(sorted(keys))} than that of rank 0. A callback "
                "that changes a setting of the optimizer must change it on all ranks alike."
            )


def refuse_unwalked(inputs: int, of: int, kind: type) -> None:
    """Refuse a `training_step` of a trainer of this `kind` that keeps micro-batches of a window from the update."""
    raise ValueError(
        f"training_step() of {kind.__name__} passed on {inputs} of {of} micro-batches, so the optimizer stepped "
        "without the Nexus update. Call super().training_step() for each, or let the mixin call yours: "
        "`class MyTrainer(NexusTrainerMixin, YourTrainer)`, where YourTrainer extends Trainer."
    )


def warn_of_buffers(changed: Iterable[str]) -> None:
    """Warn of state that is not a parameter, and changes while the parameters are displaced."""
    if names := list(changed):
        logger.warning(
            f"Buffer {names[0].removeprefix('module.')!r} changes while Nexus moves the weights, and is not restored: "
            "statistics such as those of BatchNorm come from displaced weights. Use a layer without running "
            "statistics, such as LayerNorm or GroupNorm, or keep the layer in evaluation mode."
        )


# ---- Arguments ----


def check_arguments(
    args: Any,
    *,
    sources: bool,
    streams: bool,
    unread: Iterable[str] = (),
    unlike: bool = False,
    isolated: bool = False,
    optimizer: Any = None,
    trains: bool = True,
) -> None:
    """
    Refuse training arguments that cannot be combined with each other or with the data. Plans are checked by it, too.

    `sources` and `streams` say whether the data has sources, and whether it is read as a stream. `unread` are sources
    without rows that can be read at any time. `unlike` says whether some sources are packed here and others are not,
    `isolated` whether documents of packed rows are kept apart. `optimizer` is one that was given to the trainer, which
    may be built to evaluate only, and not `trains`.
    """
    for name, bound in _RANGES.items():
        if not bound.holds(getattr(args, name)):
            raise ValueError(f"{name}: {getattr(args, name)} is not allowed; it must be a number {bound}.")
    if args.nexus and args.reduce_dtype and args.inner_sync == "local":
        raise ValueError(
            f"reduce_dtype={args.reduce_dtype!r} is for inner gradients, which inner_sync='local' does not send. "
            "Leave it out, or set inner_sync to 'node' or 'global'."
        )
    if args.checkpoint_async:
        _refuse_async(_async_problem(args))
    get_reporting_integration_callbacks(args.report_to)  # raises if one is not known
    _check_optimizer(args, optimizer)
    if not trains:
        return
    if args.nexus and args.mixed_precision == "fp16":  # also if a launcher has chosen it, which sets no field
        raise ValueError(
            "Nexus does not support fp16: inner steps are normalized, which gradient scaling does not allow. Use "
            "bf16=True over float32 weights, or `accelerate launch --mixed_precision bf16`."
        )
    if sources:
        _check_loader(args, streams)
    if unlike and args.source_schedule == "mixed":
        raise ValueError(
            "source_schedule='mixed' puts rows of all sources into one micro-batch, and some of these sources are "
            "streams of documents. Load all of them as one mixture, or tokenize all of them before."
        )
    if isolated and args.use_cache:
        raise ValueError(
            "use_cache=True would let the documents of a packed row attend to each other. Leave it at False, or set "
            "isolate_documents to false."
        )
    if args.gradient_cosine_steps:
        _check_cosines(args.gradient_cosine_steps, sources, unread)


def _check_cosines(steps: int, sources: bool, unread: Iterable[str]) -> None:
    """Refuse source cosines of data that cannot give the rows for them. Arguments are those of `check_arguments`."""
    if not sources:
        raise ValueError(
            f"gradient_cosine_steps={steps} needs a train_dataset of several sources. Pass a dict of them, or set it "
            "to 0."
        )
    for name in unread:
        raise ValueError(
            f"gradient_cosine_steps={steps} needs rows that can be read at any time, and source {name!r} is a stream. "
            "Give it a map-style evaluation set (eval_split or eval_rows), or set it to 0."
        )


def _check_optimizer(args: Any, optimizer: Any) -> None:
    """Refuse optimizers that cannot step on the pseudo-gradient of a window."""
    if args.matrix_optimizer is not None and (optimizer is not None or args.optim not in _ADAMW):
        given = (
            f"optim={OptimizerNames(args.optim).value!r}" if optimizer is None else "an optimizer given to the trainer"
        )
        raise ValueError(
            f"matrix_optimizer={args.matrix_optimizer!r} and {given} exclude each other: it extends "
            "optim='adamw_torch' or 'adamw_torch_fused'. Leave one of the two out."
        )
    if args.nexus and args.optim in _LAYERWISE | _FUSED_BACKWARD:
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} updates weights inside the backward pass, before the window "
            "ends. Use an ordinary optimizer such as optim='adamw_torch_fused'."
        )


def _refuse_async(problem: str | None) -> None:
    """Refuse checkpoints that are written while training goes on, if there is a problem."""
    if problem is not None:
        raise ValueError(f"checkpoint_async=True {problem}, or leave checkpoint_async out.")


def _async_problem(args: Any) -> str | None:
    """A setting that such checkpoints cannot meet, and what to set."""
    if OptimizerNames(args.optim).value.startswith("schedule_free"):
        optim = OptimizerNames(args.optim).value
        return f"does not support optim={optim!r}, whose state is not known at a resume. Set another optim"
    if args.save_on_each_node:
        return "needs a folder that all machines share. Set save_on_each_node to False"
    if args.push_to_hub and args.hub_strategy == "every_save":
        remedy = "Set hub_strategy to 'end', 'checkpoint' or 'all_checkpoints'"
        return f"writes no model that hub_strategy='every_save' could push. {remedy}"
    return None


def _check_loader(args: Any, streams: bool) -> None:
    """Refuse settings under which micro-batches would mix sources, or streams could not be resumed."""
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config.{name}=True would mix sources inside a micro-batch. Leave it out for a mixture, "
                "or pass one plain dataset."
            )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not possible for a mixture, whose order is "
            "set by source_schedule. Set it to 'random'. For KTO, whose default it is and whose loss needs it, pass "
            "one plain dataset."
        )
    if not streams:
        return
    if args.max_steps <= 0:
        raise ValueError(
            "max_steps: missing. A mixture with streaming sources, or with weights decided while training, has no "
            "end. Set it."
        )
    if not args.dataloader_in_order:
        raise ValueError("dataloader_in_order=False is not possible for streaming sources: leave it at True.")
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip=True is not possible for streaming sources, and not needed: they go on from their "
            "position without reading anything again. Leave it out."
        )


def warn_of_one_inner_step(args: Any) -> None:
    """Warn if the window has one inner step."""
    if args.nexus and args.gradient_accumulation_steps == 1:
        logger.warning(ONE_INNER_STEP)


# ---- Launch and precision ----


@dataclass(frozen=True)
class Launch:
    """How a trainer was started, as far as it matters to [`check_launch`]."""

    kind: DistributedType
    fsdp_version: int | None = None  # if FSDP is on
    spread_at_load: bool = False  # whether the model was spread over devices by `device_map`
    sharded_at_load: bool = False  # whether transformers has sharded the model (`distributed_config`)
    tensor_size: int = 1
    pipeline_size: int = 1
    sequence_sizes: int = 1  # product of the sizes of context and sequence parallelism
    has_sources: bool = False  # whether losses are counted by source, also without Nexus
    adapters: bool = False  # whether adapters are trained
    trains: bool = True  # whether there is something to train on


def check_one_gpu(args: TrainingArguments, command: str) -> None:
    """Refuse several GPUs in one process. `command` starts one for each of them."""
    if args.n_gpu > 1:
        raise ValueError(
            f"Nexus does not run under DataParallel ({args.n_gpu} GPUs in one process). Start a process per GPU with "
            f"`{command}`, or use one GPU: set CUDA_VISIBLE_DEVICES=0."
        )


def check_launch(args: Any, launch: Launch) -> None:
    """Refuse launches and settings that would not train with the Nexus update, or measure its cosines."""
    if args.nexus or launch.has_sources:  # losses of evaluations would be wrong as well
        check_one_gpu(args, f"torchrun --nproc_per_node {args.n_gpu} your_script.py ...")
    if not launch.trains:
        return
    if args.checkpoint_async:
        _refuse_async(_async_launch_problem(launch))
    if launch.fsdp_version is not None or launch.sharded_at_load:
        check_fsdp(args, launch.fsdp_version or 2)
    if not args.nexus:
        return
    if args.snapshot_device == "cpu" and args.device.type == "mps":
        raise ValueError(
            "snapshot_device='cpu' is not possible on an Apple GPU, which has its memory in common with the host: it "
            "would save none. Remove it."
        )
    if launch.spread_at_load:
        raise ValueError(
            "Nexus does not support models that are spread over devices by device_map, where one process has all "
            "layers. Load the model without it and start with `torchrun --nproc_per_node <GPUs> your_script.py ...`, "
            "or shard it with distributed_config."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"{launched} processes were launched, but each would train a model alone. Without a GPU, pass "
            "use_cpu=True."
        )
    if launch.fsdp_version is None and launch.kind not in _DDP | {DistributedType.NO}:
        why = ", whose engine reduces gradients by itself" if launch.kind == DistributedType.DEEPSPEED else ""
        raise ValueError(
            f"Nexus does not support {launch.kind.value}{why}. Use DDP (`torchrun --nproc_per_node <GPUs> "
            "your_script.py ...`) or FSDP2 (add `--fsdp --fsdp_config '{\"fsdp_version\": 2}'`)."
        )
    if launch.pipeline_size != 1:
        raise ValueError(
            "Nexus does not support pipeline parallelism, under which each rank has other layers and parameters. Load "
            "the model with tp_size and fsdp_size in place of pp_size."
        )
    if launch.tensor_size != 1 and not launch.sharded_at_load:
        raise ValueError(
            "Nexus supports tensor parallelism of models that transformers shards when it loads them. Load the model "
            "with distributed_config=DistributedConfig(tp_size=..., fsdp_size=...)."
        )
    if launch.sequence_sizes != 1:
        raise ValueError(
            "Nexus does not support context or sequence parallelism, which its tests cannot verify: torch's ring "
            "attention does not run on a CPU. Use FSDP2, or load the model with tp_size in a distributed_config."
        )


def _async_launch_problem(launch: Launch) -> str | None:
    """Why the files of such checkpoints would not be complete, and what to do."""
    if launch.kind not in _DDP | {DistributedType.NO} and launch.fsdp_version != 2:
        return f"does not support {launch.kind.value}. Use DDP, FSDP2 or a single process"
    if launch.spread_at_load or launch.sharded_at_load:
        return "does not support models that are spread over devices when they are loaded. Use DDP or FSDP2"
    if launch.adapters:
        return "does not support adapters, whose checkpoints are small. Train the whole model"
    return None


def check_fsdp(args: Any, version: int) -> None:
    """Refuse FSDP1, and settings of a sharded model that need whole parameters or gradients on a rank."""
    if steps := args.gradient_cosine_steps:
        raise ValueError(f"gradient_cosine_steps={steps} is not possible for a sharded model. Set it to 0.")
    if not args.nexus:
        return
    if version != 2:
        raise ValueError(
            "Nexus does not support FSDP1, whose flat parameters hide the weights. Use FSDP2: set fsdp_version to 2 "
            "in fsdp_config or in the accelerate configuration."
        )
    if args.reduce_dtype:
        raise ValueError(
            f"reduce_dtype={args.reduce_dtype!r} has no effect on a sharded model: FSDP2 reduces in the dtype of its "
            "mixed precision policy, which is bfloat16 with bf16=True. Leave it out."
        )
    if args.inner_sync == "local":
        raise ValueError(
            "inner_sync='local' is not possible for a sharded model, whose weights are spread over the ranks of a "
            "path. Use inner_sync='node' or 'global', or DDP."
        )


def check_sharded(model: nn.Module) -> None:
    """Refuse trainable parameters that FSDP2 does not shard."""
    for name, p in model.named_parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            raise ValueError(
                f"Parameter {name!r} is trainable, but FSDP2 does not shard it, so each rank would train its own "
                "copy. Wrap the whole model, adapters included, with FSDP2, or freeze the parameter."
            )


def warn_of_shards(args: Any) -> None:
    """Warn that no weights are pushed while training, of a run whose checkpoints hold them in sharded files."""
    if args.push_to_hub and args.hub_strategy == "every_save" and args.process_index == 0:
        logger.warning(
            "hub_strategy='every_save' pushes the model of each checkpoint, but with fsdp_state_dict_type "
            "SHARDED_STATE_DICT its weights are in sharded files, which are not pushed. The Hub gets them at the end. "
            "Set hub_strategy to 'checkpoint' or 'all_checkpoints', which push whole checkpoints, "
            "or use FULL_STATE_DICT."
        )


def warn_of_short_steps(nexus: Nexus, autocast: bool) -> None:
    """Warn if inner steps are too short to be told from rounding, or from the noise of bfloat16 autocast."""
    size = sum(p.numel() for p in nexus.params)
    per_weight = nexus.inner_lr / math.sqrt(size)
    if 0 < nexus.inner_lr < nexus.min_inner_lr:
        logger.warning(
            f"inner_lr={nexus.inner_lr} is below {nexus.min_inner_lr:.1e}, where rounding would hide the path of "
            f"{size:,} parameters: normalized gradients are averaged without moving instead."
        )
    elif autocast and 0 < per_weight < AUTOCAST_FLOOR:
        logger.warning(
            f"inner_lr={nexus.inner_lr} moves each of {size:,} weights by {per_weight:.1e} on average. At 3e-6, "
            "bfloat16 autocast was measured to keep 63 % of the path's signal, at 3e-7 only 8 %. Raise inner_lr to "
            f"{AUTOCAST_FLOOR * math.sqrt(size):.2g} or more."
        )


# ---- Data ----


def check_exchange(dataset: Any) -> None:
    """Refuse sources that replace the training data of a trainer."""
    if isinstance(dataset, Mapping):
        raise ValueError(
            "train_dataset was replaced by a dict of sources after the start. Build a new trainer for them."
        )


def check_predicted(dataset: Any) -> None:
    """Refuse to predict several sets at once."""
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"predict() takes one dataset, but got a dict of {', '.join(map(str, dataset))}. Pass one of them, "
            "or call evaluate(), which takes a dict."
        )


def choose_greater_is_better(args: Any) -> None:
    """
    Take the lowest perplexity as the best with arguments that are not Nexus's, which have chosen the highest.
    """
    metric = args.metric_for_best_model
    if args.greater_is_better and lower_is_better(metric) and not isinstance(args, NexusConfigMixin):
        args.greater_is_better = False
        logger.warning(f"metric_for_best_model={metric!r}: the lowest is taken as the best (greater_is_better=False).")


def check_sets(sources: Iterable[str], evaluation: Any) -> None:
    """Refuse sets without rows, and the names that logs and cards have for means, for a source or a set."""
    sets = evaluation if isinstance(evaluation, Mapping) else {}
    for kind, names in (("source", sources), ("evaluation set", sets)):
        for name in names:
            if name in (*RESERVED_NAMES, "macro over OOD"):
                raise ValueError(f"The {kind} name {name!r} is reserved for a mean over evaluation sets. Rename it.")
    for name, rows in sets.items():
        if isinstance(rows, Sized) and not len(rows):
            raise ValueError(f"The evaluation set {name!r} has no rows, so it has no loss. Remove it, or add rows.")


def check_vocabulary(rows: Mapping[str, list[Any]], model: nn.Module) -> None:
    """Refuse tokens of some rows of each source that a model has no embeddings for."""
    if not isinstance(model, PreTrainedModel):
        return
    embeddings: Any = model.get_input_embeddings()
    size = len(embeddings.weight)
    tokens = (int(torch.as_tensor(row["input_ids"]).max()) for of_source in rows.values() for row in of_source)
    if (token := max(tokens, default=0)) >= size:
        raise ValueError(
            f"The mixture holds the token {token}, but the model has embeddings for {size} tokens only. Load the "
            "mixture with the model's tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
        )


def check_trl_arguments(parent: type, args: Any, on: bool) -> None:
    """
    Refuse trainers of TRL that generate text while they train if Nexus or a mixture is `on`, and given arguments that
    the trainer does not convert.
    """
    # Other annotations name classes of packages that may be missing.
    annotated = SimpleNamespace(__annotations__={"args": parent.__init__.__annotations__["args"]})  # type: ignore[misc]
    allowed = get_args(get_type_hints(annotated, vars(sys.modules[parent.__module__]))["args"])
    # A trainer that samples completions has a temperature. Trainers on given data have none.
    if on and any("temperature" in {f.name for f in fields(c)} for c in allowed if is_dataclass(c)):
        raise ValueError(
            f"Nexus does not support {parent.__name__}: it generates text while it trains, which inside a window "
            f"would come from displaced weights. Use {parent.__name__} as it is (nexus=False and one plain dataset), "
            "or a trainer on given data, such as SFTTrainer or DPOTrainer."
        )
    if not isinstance(args, allowed) and TrainingArguments not in allowed:
        config = parent.__name__.replace("Trainer", "Config")
        raise ValueError(
            f"The arguments of {parent.__name__} must be a {config}, but got {type(args).__name__}. To set Nexus "
            f"fields, define `@dataclass class Nexus{config}(NexusConfigMixin, {config}): pass`."
        )
