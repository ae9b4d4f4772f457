"""The minimizer of each source near the end of a run, found by training on that source alone."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..evaluation.held_out import HeldOut, held_out_rows
from ..evaluation.landscape import minima_landscape
from ..mixture.loading import load_mixture
from ..pretrain.parsing import parse_arguments
from ..trainer.config import NexusConfig
from ..trainer.mixin import NexusTrainer
from .parts import MinimaSearch
from .records import Minima, RunRecord
from .runs import CONFIG_NAME, Run

if TYPE_CHECKING:
    from datasets import Dataset

    from ..mixture.loading import Mixture
    from ..pretrain.fields import PretrainArguments

__all__ = ["search_minima"]

Parameters = dict[str, Tensor]


def search_minima(run: Run) -> RunRecord:
    """
    Search the minimizers of a run's sources from its end on, measure what lies between them, and save that in the
    run's record.

    All searches of a comparison are alike: AdamW without weight decay, a constant learning rate, fresh moments, and
    for a source the same rows in the same order whichever the arm.

    Args:
        run ([`Run`]):
            One that has its record; its configuration asks for minima.

    Returns:
        [`RunRecord`]: with `minima`.
    """
    wanted = run.config.minima
    assert wanted is not None
    record = RunRecord.load(run.folder)
    if not math.isfinite(record.end.train_loss):
        return record  # a diverged run has no minima nearby
    arguments = parse_arguments(["--config", str(run.folder / CONFIG_NAME)])
    if arguments.training.cpu_threads is not None:
        torch.set_num_threads(arguments.training.cpu_threads)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    mixture = load_mixture(arguments.mixture, tokenizer)
    sources = wanted.sources or list(mixture.train)
    held_out = {name: _first(mixture.eval[name], wanted.eval_rows) for name in sources}
    attention = arguments.model.attn_implementation
    model: Any = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32, attn_implementation=attention)
    model.to(arguments.training.device)
    parameters = dict(model.named_parameters())  # tied ones once
    start = _copy(parameters)
    searches = {}
    for name in sources:
        _move(parameters, start)
        one = replace(mixture, train={name: mixture.train[name]}, eval={name: held_out[name]})
        searches[name] = _search(model, one, arguments, wanted)
    _move(parameters, start)
    rows = held_out_rows(model.eval(), replace(mixture, eval=held_out), arguments.training.per_device_eval_batch_size)
    found = minima_landscape(
        parameters,
        start,
        {name: search.best for name, search in searches.items()},
        {name: partial(_mean, rows[name]) for name in sources},
        positions=[i / (wanted.grid - 1) for i in range(wanted.grid)],
        plane=sources[:3] if len(sources) >= 3 else (),
        resolution=wanted.grid,
    )
    record.minima = Minima(
        steps={name: search.step for name, search in searches.items()},
        converged={name: search.converged for name, search in searches.items()},
        **found,
    )
    run.note_minima()
    record.save(run.folder)
    return record


@dataclass
class _Search(TrainerCallback):
    """Keeps the parameters of the lowest held-out loss, and ends the search when it stops falling."""

    parameters: Mapping[str, Tensor]
    patience: int
    best: Parameters = field(default_factory=dict)
    loss: float = float("inf")
    step: int = 0
    waited: int = 0
    converged: bool = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        """Compare the present loss with the best one."""
        loss = (metrics or {})["eval_loss"]
        if loss < self.loss or not self.best:
            self.best, self.loss, self.step, self.waited = _copy(self.parameters), loss, state.global_step, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.converged = self.step > 0  # one that only went up has found nothing
            control.should_training_stop = True


def _search(
    model: torch.nn.Module, mixture: "Mixture", arguments: "PretrainArguments", wanted: MinimaSearch
) -> _Search:
    """Train on the one source of `mixture` by plain AdamW, with the batches, precision and device of the run."""
    base = arguments.training
    with tempfile.TemporaryDirectory() as folder:
        args = NexusConfig(
            output_dir=folder,
            nexus=False,
            mixture_weights=dict.fromkeys(mixture.train, 1.0),
            learning_rate=wanted.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=base.adam_beta1,
            adam_beta2=base.adam_beta2,
            per_device_train_batch_size=base.per_device_train_batch_size,
            per_device_eval_batch_size=base.per_device_eval_batch_size,
            gradient_accumulation_steps=base.gradient_accumulation_steps,
            max_grad_norm=base.max_grad_norm,
            bf16=base.bf16,
            use_cpu=base.use_cpu,
            max_steps=wanted.max_steps,
            eval_strategy="steps",
            eval_steps=wanted.eval_steps,
            eval_on_start=True,
            prediction_loss_only=True,
            save_strategy="no",
            logging_strategy="no",
            dataloader_pin_memory=base.dataloader_pin_memory,
            disable_tqdm=True,
            report_to="none",
            seed=0,
        )
        trainer = NexusTrainer(model=model, args=args, train_dataset=mixture)
        trainer.remove_callback(PrinterCallback)
        search = _Search(dict(model.named_parameters()), wanted.patience)
        trainer.add_callback(search)
        trainer.train()
    return search


def _first(dataset: "Dataset", rows: int) -> "Dataset":
    return dataset.select(range(min(rows, len(dataset))))


def _mean(rows: HeldOut) -> float:
    return rows.mean()[0]


@torch.no_grad()
def _move(parameters: Parameters, point: Parameters) -> None:
    torch._foreach_copy_(list(parameters.values()), list(point.values()))


def _copy(parameters: Mapping[str, Tensor]) -> Parameters:
    return {name: p.detach().clone() for name, p in parameters.items()}
