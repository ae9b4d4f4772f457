"""Scores read from results of lm-eval."""

import pytest

from hf_nexus.evaluation.lm_eval.scores import read_scores
from hf_nexus.evaluation.lm_eval.tasks import SUITE, Task
from tests.support.lm_eval import raw


def test_the_headline_metric_is_read_in_percent():
    (found,) = read_scores(Task("gsm8k", SUITE["gsm8k"]), raw())
    assert (found.name, found.metric, found.dataset, found.task_id) == (
        "GSM8K",
        "exact_match",
        "openai/gsm8k",
        "gsm8k",
    )
    assert (found.value, found.stderr) == (pytest.approx(41.2), pytest.approx(1.4))
    assert found.notes == "5-shot, strict-match, lm-eval 0.4.13" and found.date == "2023-11-14"


@pytest.mark.parametrize(
    ("task", "reported", "shown"),
    [("squadv2", 52.3, 52.3), ("squadv2", 0.8, 0.8), ("scrolls_qasper", 31.0, 31.0), ("coqa", 0.6, 60.0)],
)
def test_an_f1_is_shown_in_percent_once(task, reported, shown):
    (found,) = read_scores(Task(task), raw(task, "f1,none", reported))
    assert found.value == pytest.approx(shown)


@pytest.mark.parametrize(
    ("task", "metric", "unit"),
    [
        ("ifeval", "prompt_level_strict_acc", 100),
        ("ifeval", "inst_level_loose_acc", 100),
        ("drop", "em", 100),
        ("bbq_generate", "accuracy_amb", 100),
        ("humaneval_64", "pass@64", 100),
        ("scrolls_quality", "em", 1),  # in percent already
        ("scrolls_quality", "acc_norm", 100),
        ("squadv2", "HasAns_f1", 1),
        ("glue_cola", "mcc", 1),
        ("wikitext", "bits_per_byte", 1),
        ("truthfulqa_gen", "bleu_max", 1),
    ],
)
def test_a_fraction_is_known_by_a_part_of_its_name(task, metric, unit):
    (found,) = read_scores(Task(task), raw(task, f"{metric},none", 0.4))
    assert found.value == pytest.approx(0.4 * unit)


def test_a_limited_score_is_not_a_registered_result():
    (found,) = read_scores(Task("gsm8k", SUITE["gsm8k"], limit=10), raw())
    assert found.task_id is None and "first 10 examples" in found.notes


def test_a_score_has_the_data_and_shots_of_its_own_tasks():
    tree = {"many": ["arc", "mmlu"], "mmlu": ["mmlu_a", "mmlu_stem"], "mmlu_stem": ["mmlu_b"], "arc": []}
    data = {"arc": "allenai/ai2_arc", "mmlu_a": "cais/mmlu", "mmlu_b": "cais/mmlu"}
    rows = {name: {"acc,none": 0.5} for name in ("arc", "mmlu", "mmlu_stem", "mmlu_a", "mmlu_b")}
    found = raw(
        results=rows,
        group_subtasks=tree,
        configs={name: {"dataset_path": path} for name, path in data.items()},
        **{"n-shot": {"arc": 25, "mmlu_a": 5, "mmlu_b": 5}},
    )
    scores = {score.name: score for score in read_scores(Task("many", limit=3), found)}
    assert {name: score.dataset for name, score in scores.items()} == data | dict.fromkeys(
        ("mmlu", "mmlu_stem"), "cais/mmlu"
    )
    assert scores["arc"].notes.startswith("25-shot") and scores["mmlu"].notes.startswith("5-shot")
    assert ["per subtask" in scores[name].notes for name in ("arc", "mmlu", "mmlu_b")] == [False, True, False]
    (whole,) = read_scores(Task("many"), found | {"results": {"many": {"acc,none": 0.5}}})
    assert whole.dataset == "many" and whole.notes.startswith("5/25-shot")


def test_groups_tags_and_other_metrics_are_read():
    group = raw(
        "mmlu", "acc,none", 0.3, configs={"mmlu_a": {}, "mmlu_b": {}}, **{"n-shot": {"mmlu_a": 5, "mmlu_b": 5}}
    )
    group = group | {"groups": group["results"], "results": {"mmlu_a": {"acc,none": 1.0}, "mmlu_b": {"acc,none": 0.0}}}
    (found,) = read_scores(Task("mmlu", SUITE["mmlu"], limit=4), group)
    assert found.value == pytest.approx(30) and found.notes.startswith("5-shot, lm-eval")
    assert found.notes.endswith("first 4 examples per subtask")
    assert [row.name for row in read_scores(Task("a_tag"), group)] == ["mmlu_a", "mmlu_b", "mmlu"]
    bare = group | {"groups": {"a_group": {"alias": "a_group", "name": "a_group"}}}  # of a group without metrics
    assert [row.name for row in read_scores(Task("a_group"), bare)] == ["mmlu_a", "mmlu_b"]
    (other,) = read_scores(Task("wikitext"), raw("wikitext", "word_perplexity,none", 37.5))
    assert other.value == 37.5 and other.dataset == "some/data"  # not a fraction
    (local,) = read_scores(Task("sums/local"), raw("sums/local", configs={"sums/local": {"dataset_path": "json"}}))
    assert local.dataset == "sums_local"
    for name, path, dataset in (
        ("prüfung", "json", "pr_fung"),
        ("任务", "json", "local"),
        ("task", "data/my--set", "task"),
        ("a" * 95 + "_b", "json", "a" * 95),
    ):
        (named,) = read_scores(Task(name), raw(name, configs={name: {"dataset_path": path}}))
        assert named.dataset == dataset
    nothing = raw("wikitext", "word_perplexity,none", float("nan"))
    with pytest.raises(ValueError, match="no finite score"):
        read_scores(Task("wikitext"), nothing)
    with pytest.raises(ValueError, match="strict-match"):
        read_scores(Task("gsm8k", SUITE["gsm8k"]), raw(key="acc,none"))
