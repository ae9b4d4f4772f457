"""Search for the minimizer of each source from the end of a run, by training on that source alone."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..evaluation.held_out import held_out_sets
from ..evaluation.landscape import minima_landscape
from ..lock import locked
from ..mixture.loading import load_mixture
from ..pretrain.parsing import parse_arguments
from ..trainer.config import NexusConfig
from ..trainer.mixin import NexusTrainer
from .config import MinimaSearch
from .records import Minima, RunRecord
from .runs import MINIMA_NAME, SETTINGS_NAME, Run, shared_settings

if TYPE_CHECKING:
    from ..mixture.loading import Mixture

__all__ = ["search_minima"]

Parameters = dict[str, Tensor]

# Arguments that all searches take over from the baseline.
_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_FROM_BASELINE = (*_BATCHES, "adam_beta1", "adam_beta2", "max_grad_norm", "bf16", "use_cpu", "dataloader_pin_memory")


def search_minima(run: Run) -> RunRecord:
    """
    Search the minimizers of a run's sources, measure distances and losses between them, and add these to its record.

    All searches of a comparison use AdamW without weight decay, a constant learning rate, and for each source the same
    rows in the same order. The record of a run that diverged has no `minima`, since there is no minimum nearby.

    Raises:
        ValueError: another process trains or measures the run.
    """
    with locked(run.folder):
        return _search_minima(run)


def _search_minima(run: Run) -> RunRecord:
    wanted = run.config.minima
    assert wanted is not None
    record = RunRecord.load(run.folder)
    if record.diverged:
        return record
    arguments = parse_arguments(["--config", str(run.folder / SETTINGS_NAME)])
    if arguments.training.cpu_threads is not None:
        torch.set_num_threads(arguments.training.cpu_threads)
    tokenizer = AutoTokenizer.from_pretrained(run.folder, trust_remote_code=False)
    # A search is not the run that these limits are for: it trains on one source alone.
    unlimited = {name: replace(source, max_epochs=None) for name, source in arguments.mixture.sources.items()}
    mixture = load_mixture(replace(arguments.mixture, sources=unlimited), tokenizer)
    sources = wanted.sources or list(mixture.train)
    held_out = {name: mixture.eval[name].take(min(wanted.eval_rows, len(mixture.eval[name]))) for name in sources}
    attention = arguments.model.attn_implementation
    model: Any = AutoModelForCausalLM.from_pretrained(
        run.folder, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    model.to(arguments.training.device)
    parameters = dict(model.named_parameters())  # tied parameters once
    start = _copy(parameters)
    searches = {}
    for name in sources:
        _move(parameters, start)
        single = replace(mixture, train={name: mixture.train[name]}, eval={name: held_out[name]})
        searches[name] = _search(model, single, shared_settings(run.config, _FROM_BASELINE), wanted)
    _move(parameters, start)
    rows = held_out_sets(model.eval(), replace(mixture, eval=held_out), arguments.training.per_device_eval_batch_size)
    found = minima_landscape(
        parameters,
        {name: search.best for name, search in searches.items()},
        {name: rows[name].loss for name in sources},
        positions=wanted.grid,
        resolution=wanted.grid,
    )
    record.minima = Minima(
        steps={name: search.step for name, search in searches.items()},
        converged={name: search.converged for name, search in searches.items()},
        **found,
    )
    run.write([MINIMA_NAME])
    record.save(run.folder)
    return record


@dataclass
class _Search(TrainerCallback):
    """Keeps the parameters with the lowest held-out loss, and stops the search when the loss stops falling."""

    parameters: Mapping[str, Tensor]
    patience: int
    best: Parameters = field(default_factory=dict)
    loss: float = float("inf")
    step: int = 0
    since_best: int = 0
    converged: bool = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        loss = (metrics or {})["eval_loss"]
        if loss < self.loss or not self.best:
            self.best, self.loss, self.step, self.since_best = _copy(self.parameters), loss, state.global_step, 0
            return
        self.since_best += 1
        if self.since_best >= self.patience:
            self.converged = self.step > 0  # not if the loss only rose
            control.should_training_stop = True


def _search(model: torch.nn.Module, mixture: "Mixture", shared: Mapping[str, Any], wanted: MinimaSearch) -> _Search:
    """Train on the one source of `mixture` with plain AdamW, on one device with `shared` arguments."""
    with tempfile.TemporaryDirectory() as folder:
        args = NexusConfig(
            output_dir=folder,
            nexus=False,
            mixture_weights=dict.fromkeys(mixture.train, 1.0),
            learning_rate=wanted.learning_rate,
            lr_scheduler_type="constant",
            max_steps=wanted.max_steps,
            eval_strategy="steps",
            eval_steps=wanted.eval_steps,
            eval_on_start=True,
            prediction_loss_only=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
            seed=0,
            **shared,
        )
        trainer = NexusTrainer(model=model, args=args, train_dataset=mixture)
        trainer.remove_callback(PrinterCallback)
        search = _Search(dict(model.named_parameters()), wanted.patience)
        trainer.add_callback(search)
        trainer.train()
    return search


@torch.no_grad()
def _move(parameters: Parameters, point: Parameters) -> None:
    torch._foreach_copy_(list(parameters.values()), list(point.values()))


def _copy(parameters: Mapping[str, Tensor]) -> Parameters:
    return {name: p.detach().clone() for name, p in parameters.items()}
