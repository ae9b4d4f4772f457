"""Checks of a configuration before anything is loaded, the same for a plan and for a run."""

from contextlib import suppress
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from ..files import nearest
from ..hub.publisher import check_repo_id
from ..mixture.config import MixtureConfig
from ..trainer.checks import check_arguments, check_fsdp
from .fields import ModelArguments, PretrainConfig
from .model import build_model, model_config

__all__ = ["check_run"]


def check_run(model: ModelArguments, mixture: MixtureConfig, training: PretrainConfig, here: bool) -> None:
    """
    Refuse what a run would refuse after its data is tokenized, or in its first step. A run that starts `here` needs
    the packages on this machine.

    Raises:
        ValueError: a value that is not allowed, or values that exclude each other.
        ImportError: a package is missing.
    """
    sources = mixture.train_sources
    streams = [name for name, source in sources.items() if source.streaming]
    check_arguments(
        training,
        sources=True,
        streams=bool(streams),
        unread=[name for name in streams if sources[name].eval_rows is None and sources[name].eval_split is None],
        isolated=mixture.isolate_documents is not False,
    )
    if training.fsdp:
        check_fsdp(training, version=2)
    if not str(training.output_dir).strip():
        raise ValueError("output_dir: '' is not allowed; name a folder.")
    if model.tokenizer == "train" and any(source.tokens_column for source in mixture.sources.values()):
        raise ValueError("tokenizer='train' cannot read a tokens_column. Set model.tokenizer to that of the tokens.")
    if full := [name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(training, name)]:
        # The Trainer casts the model itself, only in an evaluation after training, and the model is saved after it.
        raise ValueError(f"{full[0]}=True would round the weights before they are saved. Use bf16=True, or remove it.")
    if training.max_steps == 0 or (training.max_steps < 0 and training.num_train_epochs <= 0):
        raise ValueError("max_steps: the run has no steps. Set it above 0, or to -1 and num_train_epochs above 0.")
    if training.save_strategy == SaveStrategy.BEST and training.metric_for_best_model is None:
        raise ValueError("metric_for_best_model: missing, and save_strategy is 'best'. Set it, to loss for example.")
    _check_metric(training.metric_for_best_model, mixture, smoothed=training.label_smoothing_factor > 0)
    if training.push_to_hub and training.hub_model_id is not None:
        check_repo_id(training.hub_model_id)
    backends = {backend.lower(): backend for backend in DynamoBackend.list()}
    if (backend := training.torch_compile_backend) is not None and backend.lower() not in backends:
        hint = nearest(backend, backends)
        raise ValueError(f"torch_compile_backend: {backend!r} is not allowed.{hint} Use one of {', '.join(backends)}.")
    allowed = () if here else (ImportError,)  # a plan needs no packages of the run
    with suppress(*allowed):
        _try_trackers(training)
    with suppress(*allowed):
        if not model.continues:
            with torch.device("meta"):  # an attention that the model does not have is an error
                build_model(model_config(model, mixture.sequence_length), model.attn_implementation)
    with suppress(*allowed):
        _try_optimizer(training)


def _check_metric(metric: str | None, mixture: MixtureConfig, smoothed: bool = False) -> None:
    """Refuse a `metric_for_best_model` that no evaluation measures. It may begin with `eval_`."""
    held_out = [n for n, s in mixture.sources.items() if s.role == "ood" or s.eval_rows or s.eval_split]
    roles = {mixture.sources[name].role for name in held_out}
    means = ["", "ood_"] if roles == {"train", "ood"} else [""]  # OOD sources alone have one mean
    kinds = ["loss"] if smoothed else ["loss", "perplexity"]
    known = [f"{part}{kind}" for part in [*means, *(f"{n}_" for n in held_out)] for kind in kinds]
    if metric is not None and (name := metric.removeprefix("eval_")) not in known:
        raise ValueError(
            f"metric_for_best_model: {metric!r} is not measured.{nearest(name, known)} Use one of {', '.join(known)}."
        )


def _try_trackers(training: PretrainConfig) -> None:
    for tracker in get_reporting_integration_callbacks(training.report_to):
        try:
            tracker()
        except RuntimeError as error:  # names the missing package
            raise ImportError(f"report_to: {error}") from error


def _try_optimizer(training: PretrainConfig) -> None:
    """
    Build the optimizer and the learning rate schedule over one weight, to check their options. A plan needs no extra
    package.
    """
    options: Any = training.lr_scheduler_kwargs
    if isinstance(options, str):
        raise ValueError(f"lr_scheduler_kwargs: {options!r} is not allowed; it must be a mapping.")
    if any(part.count("=") != 1 for part in (training.optim_args or "=").split(",")):
        raise ValueError(f"optim_args: {training.optim_args!r} is not allowed; use name=value, joined by commas.")
    weight, steps = nn.Parameter(torch.zeros(1)), training.max_steps if training.max_steps > 0 else 1000
    optimizer: Any = torch.optim.SGD([weight], lr=training.learning_rate)
    if OptimizerNames(training.optim).value.startswith(("adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer = kind([weight], **settings)
    get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )
