"""Results in the Hub's formats: losses and scores in the `model-index` of the card, scores in `.eval_results/`."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ..evaluation.lm_eval.scores import BenchmarkScore
from ..files import write_atomic
from ..strict import dump_yaml

__all__ = ["RESULTS_NAME", "ROLES", "BenchmarkScore", "HeldOutLoss", "merge_index", "model_index", "save_results"]

RESULTS_NAME = ".eval_results/hf_nexus.yaml"  # other tools have other files in this folder
# These names identify our entries: losses of language models, losses of other models, and scores.
_LM_LOSSES, _LOSSES, _SCORES = "Held-out language modelling", "Held-out loss (hf_nexus)", "Benchmark (hf_nexus)"

ROLES = {
    "train": "training source",
    "ood": "OOD source, never trained on",
    "macro": "mean over sets",
    "held_out": "evaluation set",
}


@dataclass(frozen=True)
class HeldOutLoss:
    """
    First and last held-out loss of an evaluation set at restored weights. Both are in nats per token if the run has
    [`RunSummary.has_perplexity`].
    """

    name: str  # unique within a run
    # Held-out rows of a training source, an OOD source, a mean over sets, or the sets of a run of which none is named
    # like a source.
    role: Literal["train", "ood", "macro", "held_out"]
    first_loss: float | None
    last_loss: float
    dataset: str | None = None  # Hub id of the data
    arm_loss: float | None = None  # last loss of the other arm, see [`RunSummary.against`]

    @property
    def perplexity(self) -> float:
        """`exp(last_loss)`, infinite if it exceeds the range of a float."""
        return math.exp(self.last_loss) if self.last_loss < 709 or math.isnan(self.last_loss) else math.inf


def _rounded(value: float) -> float:
    """Three significant digits, and all digits before the point."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


def model_index(
    losses: Iterable[HeldOutLoss],
    scores: Iterable[BenchmarkScore],
    pipeline_tag: str | None = "text-generation",
    perplexities: bool = True,
) -> list[EvalResult]:
    """
    Entries of `model-index`: the loss and optionally the perplexity of each evaluation set, and the scores.

    The Hub accepts only finite numbers, so others are left out. Each entry needs a task of the Hub, so losses are left
    out if `pipeline_tag` is `None`.
    """
    entries = [
        EvalResult(
            task_type=pipeline_tag,
            task_name=_LM_LOSSES if perplexities else _LOSSES,
            dataset_type=row.dataset or row.name,
            dataset_name=row.name,
            dataset_config=row.name,  # distinguishes sets from the same dataset
            dataset_split="held-out",
            dataset_args={"role": row.role},
            metric_type=metric,
            metric_value=_rounded(value) if metric == "perplexity" else float(value),
        )
        for row in losses
        for metric, value in (("loss", round(row.last_loss, 4)), ("perplexity", row.perplexity))[: 1 + perplexities]
        if pipeline_tag is not None and math.isfinite(value)
    ]
    return entries + [
        EvalResult(
            task_type="text-generation",
            task_name=_SCORES,
            dataset_type=score.dataset,
            dataset_name=score.name,
            dataset_config=score.name,  # distinguishes tasks on the same dataset
            dataset_revision=score.revision,
            metric_type=score.metric,
            metric_value=float(score.value),
            metric_args=None if score.notes is None else {"notes": score.notes},
        )
        for score in scores
    ]


def merge_index(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """A `model-index` with our entries of the new one and other tools' entries of the old one."""
    try:
        results = [result for model in old or [] for result in model["results"]]
        foreign = [result for result in results if result["task"].get("name") not in (_LM_LOSSES, _LOSSES, _SCORES)]
        foreign = [result for result in foreign if not new or result not in new[0]["results"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The `model-index` of the existing card is malformed ({error!r}). Correct it or delete it."
        ) from error
    if not foreign:
        return list(new)
    first = new[0] if new else (old or [])[0]
    return [{"name": first["name"], "results": (new[0]["results"] if new else []) + foreign}]


def save_results(scores: Iterable[BenchmarkScore], folder: str | os.PathLike[str]) -> Path | None:
    """
    Write the scores with a `task_id` to `.eval_results/hf_nexus.yaml` in the folder of a model, which leaderboards
    read. Without such scores, an earlier file is deleted.
    """
    entries = [
        EvalResultEntry(
            dataset_id=score.dataset,
            task_id=score.task_id,
            value=float(score.value),
            dataset_revision=score.revision,
            date=score.date,
            notes=score.notes,
        )
        for score in scores
        if score.task_id is not None
    ]
    path = Path(folder, RESULTS_NAME)
    if path.parent.is_symlink():
        raise ValueError(f"{path.parent} is a link, which is not followed. Replace it by a folder.")
    if not entries:
        path.unlink(missing_ok=True)
        return None
    return write_atomic(path, dump_yaml(eval_result_entries_to_yaml(entries)))
