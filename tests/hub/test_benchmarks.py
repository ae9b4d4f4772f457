"""Benchmark scores in the folder of a model: merged, on the card, and of one model."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_nexus.hub.benchmarks import SCORES_NAME, claim_scores, record_scores
from hf_nexus.hub.results import RESULTS_NAME, BenchmarkScore
from hf_nexus.hub.run_summary import RunSummary
from tests.support.lm_eval import load_scores

NEXUS = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient", "gradient_accumulation_steps": 4}


def score(task="gsm8k", value=41.2, limit=None, **more):
    fields = {"metric": "exact_match", "stderr": 1.4, "dataset": "openai/gsm8k", "task_id": None, "notes": "5-shot"}
    return BenchmarkScore(
        **({"task": task, "name": task, "value": value, "date": "2026-01-31", "limit": limit} | fields | more)
    )


def test_scores_are_merged_and_the_newest_of_a_task_wins(tmp_path):
    record_scores(tmp_path, [score("gsm8k", 1.0), score("bbh", 2.0)])
    record_scores(tmp_path, [score("gsm8k", 3.0)])
    assert [(row.name, row.value) for row in load_scores(tmp_path)] == [("bbh", 2.0), ("gsm8k", 3.0)]


def test_a_limited_score_never_replaces_a_whole_one(tmp_path):
    record_scores(tmp_path, [score(value=1.0, limit=5)])
    record_scores(tmp_path, [score(value=2.0, limit=9)])
    assert [(row.name, row.value) for row in load_scores(tmp_path)] == [("gsm8k", 2.0)]
    record_scores(tmp_path, [score(value=3.0)])
    assert [(row.name, row.value) for row in load_scores(tmp_path)] == [("gsm8k", 3.0)]
    record_scores(tmp_path, [score(value=4.0, limit=5)])
    assert [(row.name, row.value) for row in load_scores(tmp_path)] == [("gsm8k", 3.0), ("gsm8k", 4.0)]


def test_the_card_and_registered_results_show_the_scores(tmp_path):
    run = RunSummary("tiny", "llama", 1000, NEXUS)
    elsewhere = BenchmarkScore("ARC", "allenai/ai2_arc", "acc", 25.0)
    compared = BenchmarkScore("gsm8k", "openai/gsm8k", "exact_match", 1.0, notes="5-shot", arm_value=30.0)
    run.benchmarks = [elsewhere, compared]
    run.save(tmp_path)
    (tmp_path / "README.md").write_text("My words.\n")
    record_scores(tmp_path, [score(task_id="gsm8k"), score("sums/local", 50.0, dataset="sums_local")])
    text = (tmp_path / "README.md").read_text()
    assert "My words." in text and "| gsm8k | openai/gsm8k | exact_match | 41.2 | 1.4 |" in text
    results = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    values = {result["dataset"]["type"]: result["metrics"][0]["value"] for result in results}
    assert values == {"allenai/ai2_arc": 25.0, "openai/gsm8k": 41.2, "sums_local": 50.0}
    (entry,) = yaml.safe_load((tmp_path / RESULTS_NAME).read_text())
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 41.2
    saved = RunSummary.load(tmp_path).benchmarks
    assert saved[0] == elsewhere and saved[1].arm_value == 30.0
    record_scores(tmp_path, [score(value=42.0)])
    assert len(RunSummary.load(tmp_path).benchmarks) == 3  # none twice


def test_scores_of_earlier_weights_are_set_aside(make_trainer, sources, tmp_path):
    """By every training that has steps."""
    out = tmp_path / "out"
    for value in (1.0, 2.0):
        make_trainer(sources, save_strategy="steps", save_steps=2).train()
        record_scores(out, [score("gsm8k", value)])
        (out / "closeness.json").write_text("{}")
    make_trainer(sources).train(resume_from_checkpoint=True)  # has ended
    assert [(row.name, row.value) for row in load_scores(out)] == [("gsm8k", 2.0)]
    make_trainer(sources, max_steps=3).train(resume_from_checkpoint=True)
    record_scores(out, [score("bbh", 3.0)])
    assert [(row.name, row.value) for row in load_scores(out)] == [("bbh", 3.0)]
    kept = [json.loads((out / f"_benchmark_results-{i}.json").read_text())["scores"][0]["value"] for i in (1, 2)]
    assert kept == [1.0, 2.0] and (out / "_closeness-2.json").exists() and not (out / "closeness.json").exists()


def test_a_folder_never_mixes_two_models(tmp_path):
    claim_scores(tmp_path / "results", "org/one")
    record_scores(tmp_path / "results", [score()])
    assert json.loads((tmp_path / "results" / SCORES_NAME).read_text())["model"] == "org/one"
    claim_scores(tmp_path / "results", "org/one")
    with pytest.raises(ValueError, match="holds the scores of org/one"):
        claim_scores(tmp_path / "results", "org/two")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        pytest.param("[" * 100_000, id="nested"),
        '{"model": null}',
        '{"model": null, "scores": [{"name": "gsm8k"}]}',
    ],
)
def test_a_file_that_holds_no_scores_is_named(text, tmp_path):
    (tmp_path / SCORES_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{SCORES_NAME} was not written by hf-nexus: .* Move it away"):
        claim_scores(tmp_path, None)
