"""The card of a planned run."""

from itertools import pairwise
from typing import Any

from ..hub.facts import hub_id, public_path
from ..hub.run_summary import MixtureRow, RunSummary
from ..trainer.config import nexus_settings
from .fields import PretrainArguments
from .model import model_config
from .plan import RunPlan

__all__ = ["planned_summary"]


def planned_summary(arguments: PretrainArguments, plan: RunPlan, **known: Any) -> RunSummary:
    """The facts of a card for a run that has not been started. `known` are further facts."""
    config, planned = arguments.mixture, plan.mixture or []
    total = max(1, sum(row.train_tokens for row in planned))
    rows = [
        MixtureRow(
            source=row.source,
            weight=row.share,
            share=row.train_tokens / total,
            epochs=row.epochs,
            tokens=row.train_tokens,
            license=config.sources[row.source].license,
            dataset=public_path(config.sources[row.source].path),
        )
        for row in planned
    ]
    starts = [*plan.stages, plan.steps or 1]
    shares = [{row.source: row.stage_shares[i] for row in planned} for i in range(len(plan.stages))]
    found: dict[str, Any] = {
        "model_name": arguments.training.hub_model_id or arguments.folder.name,
        "model_type": model_config(arguments.model, arguments.mixture.sequence_length).model_type,
        "parameters": plan.parameters,
        "nexus": nexus_settings(arguments.training),
        "planned": True,
        "mixture": rows,
        "stages": [(end / starts[-1], part) for (_, end), part in zip(pairwise(starts), shares, strict=True)],
        "hyperparameters": arguments.resolved["training"],
        "changed_hyperparameters": arguments.changed,
        "repo_id": arguments.training.hub_model_id,
        "datasets": [row.dataset for row in rows if row.dataset and hub_id(row.dataset)],
        "hardware": f"planned for {plan.devices} accelerator{'s' if plan.devices > 1 else ''}",
    }
    return RunSummary(**found | known)
