"""The card of a run: the facts of a trainer, and the summary that the card shows."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..hub.card import save_card
from ..hub.facts import (
    describe_hardware,
    find_commit,
    find_origin,
    find_pipeline_tag,
    hub_id,
    installed_versions,
    public_path,
)
from ..hub.results import RESULTS_NAME, HeldOutLoss, save_results
from ..hub.run_summary import LANGUAGE_MODEL, SUMMARY_NAME, MixtureRow, RunSummary
from ..mixture.training_data import TrainingData
from ..plots.run import COSINES_PLOT, TRAINING_PLOT, plot_run

if TYPE_CHECKING:
    from ..mixture.loading import Mixture

__all__ = ["CARD_FILES", "RunFacts", "evaluations", "summarize", "write_card"]

# The files that `write_card` may write. All belong to a published model.
CARD_FILES = ("README.md", SUMMARY_NAME, TRAINING_PLOT, COSINES_PLOT, RESULTS_NAME)

_NUMBERS = ("path_cosine", "pseudo_gradient_norm", "inner_lr", "inner_steps_skipped", "tokens_per_second", "mfu")
# Keys of a log under `eval_` that are not metrics of the user.
_NO_METRIC = re.compile(r".*_(loss|runtime|per_second|time)")


@dataclass(frozen=True)
class RunFacts:
    """
    What a trainer tells the card of its run. Only the main process asks for it, so what all ranks know is gathered
    before training.
    """

    args: Any  # the training arguments
    model: nn.Module  # not wrapped
    log_history: Sequence[Mapping[str, Any]]
    data: TrainingData
    evaluation: Any  # the evaluation sets
    trained_tokens: Mapping[str, int]  # of each source so far
    rows: Mapping[str, int]  # of each source so far
    unit: str  # "tokens" or "rows" that were trained on
    nexus: dict[str, Any]  # the resolved Nexus fields
    seconds: float = 0.0  # of training so far, over all sessions
    dynamic_weights: bool = False  # whether mixture weights are decided while training
    # The outer step of the best checkpoint, if its weights were loaded at the end, and how long the log was then.
    best: tuple[int, int] | None = None
    labels_are_tokens: bool | None = None  # of evaluations; `None` if this process has not evaluated
    cosine_rows: int | None = None  # of each source, for `gradient_cosine_steps`
    chat: bool = False  # whether the model was trained on messages

    @property
    def per_token(self) -> bool:
        """
        Whether losses are in nats per token. If this process has not evaluated, the resumed training and its log tell.
        """
        if self.args.label_smoothing_factor:
            return False
        if self.labels_are_tokens is not None:
            return self.labels_are_tokens
        # Rows are also the unit of language models that take no number of loss tokens.
        return self.unit == "tokens" or any(key.endswith("_perplexity") for entry in self.log_history for key in entry)


def summarize(facts: RunFacts, **known: Any) -> RunSummary:
    """
    Summarize a run for its card, up to now. `known` are fields of [`RunSummary`] that a trainer
    cannot know (`license`, `languages`, `benchmarks`, ...), or that replace what it knows.
    """
    args, log, model, mixture = facts.args, facts.log_history, facts.model, facts.data.mixture
    last = {key: value for entry in log for key, value in entry.items()}
    if facts.best is not None:  # the losses of later weights, which are not published, are left out
        step, length = facts.best
        log = [entry for i, entry in enumerate(log) if i >= length or entry.get("step", 0) <= step]
        evaluated = {key: value for entry in log for key, value in entry.items() if key.startswith("eval_")}
        last = {key: value for key, value in last.items() if not key.startswith("eval_")} | evaluated
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    parameters, trainable = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    rows, purpose = _mixture_rows(facts), find_pipeline_tag(model)
    has_perplexity = purpose["auto_class"] == LANGUAGE_MODEL and facts.per_token  # which is shown instead of metrics
    metrics = [] if has_perplexity else [key for key in last if _is_metric(key, last[key])]
    config: Any = model.config
    found: dict[str, Any] = {
        "model_name": known.get("repo_id") or args.hub_model_id or Path(args.output_dir).resolve().name,
        "model_type": config.model_type,
        "parameters": parameters,
        "nexus": facts.nexus,
        "mixture": rows,
        "unit": facts.unit,
        "stages": facts.data.stages,
        "evaluations": evaluations(log, facts.data.names, facts.evaluation, _paths(mixture)),
        **_hyperparameters(args),
        "numbers": {key: float(last[key]) for key in (*_NUMBERS, *metrics) if key in last},
        **purpose,
        **({"chat": True, "prompt": "What can you do?"} if facts.chat else {}),
        "per_token": facts.per_token,
        "best_step": None if facts.best is None else facts.best[0],
        "repo_id": args.hub_model_id,
        "trainable_parameters": trainable if trainable < parameters else None,
        "datasets": [row.dataset for row in rows if row.dataset and hub_id(row.dataset)],
        "hardware": describe_hardware(args.device.type, args.world_size),
        "commit": find_commit(),
        "seconds": facts.seconds or None,
        "tokens_per_second": last.get("tokens_per_second"),
        "versions": installed_versions(),
        **find_origin(model),
    }
    return RunSummary(**found | known)


def write_card(facts: RunFacts, folder: str | Path, *, plots: bool = True, **known: Any) -> RunSummary:
    """
    Write the card of a run and everything that it shows into a folder: `CARD_FILES`. Text of the user in an
    existing `README.md` is kept. A card without `plots` does not mention them. `known` is as for [`summarize`].

    Raises:
        ValueError: the existing README is damaged, or the card would be invalid (an unknown licence, for example).
    """
    summary = summarize(facts, **known)
    if plots:
        drawn = {path.name for path in plot_run(facts.log_history, facts.data.names, folder, facts.per_token)}
        summary.plot = TRAINING_PLOT if TRAINING_PLOT in drawn else None
        summary.cosine_plot = COSINES_PLOT if COSINES_PLOT in drawn else None
        summary.cosine_rows = facts.cosine_rows if summary.cosine_plot else None
    save_card(summary, folder)
    save_results(summary.benchmarks, folder)
    summary.save(folder)
    return summary


def evaluations(
    log_history: Sequence[Mapping[str, Any]], sources: Sequence[str], eval_sets: Any, paths: Mapping[str, str]
) -> list[HeldOutLoss]:
    """
    First and last loss of every evaluation set, in the order sources, macro, OOD sources, their mean.

    A set that is named like a source holds rows of that source. `paths` are the known paths of the sources, OOD ones
    among them. Other sets are OOD beside sets of sources. Without these, they may hold rows of what was trained on.
    """
    if not isinstance(eval_sets, Mapping):
        rows: list[tuple[str, str, Any]] = [("held-out rows", "eval_loss", "held_out")]
    else:
        trained = [name for name in eval_sets if name in sources]
        ood = [name for name in eval_sets if name not in sources and (trained or name in paths)]
        roles = {name: "train" if name in trained else "held_out" for name in eval_sets if name not in ood}
        rows = [(name, f"eval_{name}_loss", role) for name, role in roles.items()]
        rows.append(("macro", "eval_loss", "macro"))
        rows += [(name, f"eval_{name}_loss", "ood") for name in ood]
        rows.append(("macro over OOD", "eval_ood_loss", "macro"))
    found = []
    log_history = sorted(log_history, key=lambda entry: entry.get("step", 0))
    for name, key, role in rows:
        losses = [entry[key] for entry in log_history if key in entry]
        if losses:
            first = losses[0] if len(losses) > 1 else None
            found.append(HeldOutLoss(name, role, first, losses[-1], hub_id(paths.get(name))))
    return found


def _mixture_rows(facts: RunFacts) -> list[MixtureRow]:
    data, mixture = facts.data, facts.data.mixture
    if not data.has_sources:  # one plain dataset
        return []
    tokens = {name: facts.trained_tokens[name] for name in data.names}
    lengths = [end - start for start, end in pairwise([0.0, *(stage.until for stage in data.stages)])]
    weights: dict[str, float | None] = dict.fromkeys(data.names)
    if not facts.dynamic_weights:
        stages = list(zip(lengths, data.stages, strict=True))
        weights |= {name: fsum(length * stage.weights[name] for length, stage in stages) for name in data.names}
    paths = _paths(mixture)
    return [
        MixtureRow(
            source=name,
            weight=weights[name],
            share=tokens[name] / max(1, sum(tokens.values())),
            epochs=None if mixture is None else _epochs(facts.rows[name], mixture.tokens[name], mixture),
            tokens=tokens[name],
            license=None if mixture is None else mixture.licenses[name],
            dataset=public_path(paths[name]) if name in paths else None,
        )
        for name in data.names
    ]


def _epochs(rows: int, tokens: int | None, mixture: "Mixture") -> float | None:
    """Passes over a source of a number of tokens."""
    return rows * mixture.config.sequence_length / tokens if tokens else None


def _size(parameter: nn.Parameter) -> int:
    """Number of weights. bitsandbytes packs two of 4 bits into a byte."""
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


def _is_metric(key: str, value: Any) -> bool:
    return key.startswith("eval_") and not _NO_METRIC.fullmatch(key) and isinstance(value, int | float)


def _hyperparameters(args: Any) -> dict[str, Any]:
    """All training arguments, and those that differ from their defaults, as plain data."""
    plain = copy.copy(args)  # new arguments would set up the devices again, during training
    for f in fields(args):
        if f.init and f.name != "output_dir":
            setattr(plain, f.name, f.default if f.default_factory is MISSING else f.default_factory())
    # TRL's defaults have bf16=True, which is allowed on a CPU only if a CPU is asked for.
    plain.use_cpu = args.device.type == "cpu"
    plain.__post_init__()
    plain.use_cpu, plain.dataloader_pin_memory = False, not args.use_cpu
    plain.accelerator_config.pop("use_configured_state", None)  # as the set-up of the devices does
    if args.nexus:
        plain.logging_nan_inf_filter = args.logging_nan_inf_filter  # set by the trainer, not by the user
    values, defaults = args.to_dict(), plain.to_dict()
    changed = {name: value for name, value in values.items() if value != defaults.get(name)}
    return {"hyperparameters": values, "changed_hyperparameters": changed}


def _paths(mixture: "Mixture | None") -> dict[str, str]:
    return {} if mixture is None else {name: source.path for name, source in mixture.config.sources.items()}
