"""Summaries of made-up runs, for the tests of cards."""

from dataclasses import replace
from typing import Any

from hf_nexus.hub.results import BenchmarkScore, HeldOutLoss
from hf_nexus.hub.run_summary import MixtureRow, RunSummary
from hf_nexus.mixture.stages import Stage

NEXUS = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient", "gradient_accumulation_steps": 4}


def make_run(**changes: Any) -> RunSummary:
    """A run with a mixture, losses and most other facts; `changes` replace fields."""
    run = RunSummary(
        model_name="nexus-test",
        model_type="llama",
        parameters=1_234_567,
        nexus=dict(NEXUS),
        mixture=[
            MixtureRow("code", 0.6, 0.59375, 1.25, 1_200_000, "PSF-2.0", "builtin/code"),
            MixtureRow("maths", 0.4, 0.40625, 0.5, 800_000),
        ],
        evaluations=[
            HeldOutLoss("code", "train", 8.318742113, 3.00061234, "org/code"),
            HeldOutLoss("maths", "train", 8.31, 2.5),
            HeldOutLoss("cpp", "ood", None, 4.123456789),
            HeldOutLoss("macro", "macro", 8.3152, 2.8004),
        ],
        hyperparameters={"learning_rate": 2e-3, "weight_decay": 0.0, "report_to": ["none"]},
        changed_hyperparameters={"learning_rate": 2e-3},
        numbers={"path_cosine": 0.087654321, "inner_steps_skipped": 0, "learning_rate": 1.25e-5},
        repo_id="user/nexus-test",
        license="Apache-2.0",
        languages=["en", "code"],
        datasets=["org/code"],
        tags=["demo"],
        limitations=["Trained on an embedded corpus."],
        hardware="2 CPU cores",
        commit="0123abc",
        seconds=200.4,
        tokens_per_second=10_000.5,
        versions={"hf-nexus": "0.1.0", "torch": "2.13.0"},
        plot="training curves.png",
    )
    return replace(run, **changes)


def full_run() -> RunSummary:
    """A run whose card has every section."""
    run = make_run(
        stages=[Stage(0.75, {"code": 0.5, "maths": 0.5}), Stage(1.0, {"code": 0.9, "maths": 0.1})],
        benchmarks=[
            BenchmarkScore("GSM8K", "openai/gsm8k", "exact_match", 41.25, 1.4, "gsm8k", "abc", "2026-05-01", "8-shot"),
            BenchmarkScore("LAMBADA", "EleutherAI/lambada_openai", "acc", 12.5),
        ],
        cosine_plot="gradient_cosines.png",
        cosine_rows=8,
    )
    run.mixture.append(MixtureRow("web", None, 0.0, None, 0, "odc-by", "org/web"))
    other = replace(run, evaluations=[HeldOutLoss("code", "train", 8.3, 3.1), HeldOutLoss("cpp", "ood", None, 4.0)])
    other.benchmarks = [replace(run.benchmarks[0], value=40), replace(run.benchmarks[1], notes="another setting")]
    return run.against(other, "plain accumulation")
