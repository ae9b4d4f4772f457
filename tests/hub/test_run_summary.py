"""The facts about a run: consistent, comparable, and saved without secrets."""

import json
import math
from dataclasses import replace

import pytest

from hf_nexus.hub.card import run_card
from hf_nexus.hub.results import HeldOutLoss
from hf_nexus.hub.run_summary import MixtureRow, RunSummary
from tests.support.hub.summaries import full_run, make_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": [HeldOutLoss("else", "ood", None, 1.0)]}, "no common evaluation set"),
        ({"mixture": [MixtureRow("code", 1.0, 1.0, 1.0, 1_000)]}, "equal numbers"),
    ],
)
def test_unequal_runs_cannot_be_compared(changes, message):
    with pytest.raises(ValueError, match=message):
        make_run().against(make_run(**changes), "other")


def test_means_with_other_weights_are_not_compared():
    rows = [MixtureRow("code", 0.9, 0.9, 1.0, 1_200_000), MixtureRow("maths", 0.1, 0.1, 0.5, 800_000)]
    for other, compared in ((make_run(), True), (make_run(mixture=rows), False)):
        losses = {row.name: row.arm_loss for row in make_run().against(other, "other").evaluations}
        assert (losses.pop("macro") is not None) == compared and None not in losses.values()
    one = [row for row in make_run().evaluations if row.name == "code"]
    assert make_run().against(make_run(mixture=rows, evaluations=one), "other").evaluations[0].arm_loss is not None


def test_a_saved_summary_is_complete(tmp_path):
    run = full_run()
    run.save(tmp_path)
    assert RunSummary.load(tmp_path) == run
    diverged = make_run(evaluations=[HeldOutLoss("a", "train", math.inf, math.nan)], numbers={"a": math.nan})
    diverged.save(tmp_path)
    assert str(RunSummary.load(tmp_path)) == str(diverged)


SECRETS = {
    **{"hub_token": "s3cret", "output_dir": "/home/s3cret", "deepspeed": "/home/s3cret/ds.json"},
    **{
        "model_init_kwargs": {
            "token": "s3cret",
            "quantization": [{"offload_folder": "/data/s3cret/a", "api_key": "s3cret"}],
        }
    },
    **{
        "optim_args": "path=/home/s3cret/a,rank=4",
        "hub_kwargs": f"hf_{'s3cret' * 6}",
        "files": {"/s3cret/b/c.jsonl": 1},
    },
}


def test_neither_summary_nor_card_has_secrets_or_folders(tmp_path):
    """At any depth."""
    run = make_run(hyperparameters=SECRETS, changed_hyperparameters=SECRETS, base_model="/home/s3cret/base")
    run.save(tmp_path)
    assert "s3cret" not in (tmp_path / "run_summary.json").read_text() + str(run_card(run))
    kept = {"deepspeed": "ds.json", "model_init_kwargs": {"quantization": [{"offload_folder": "a"}]}}
    kept |= {"optim_args": "path=a,rank=4", "hub_kwargs": "<hidden>", "files": {"c.jsonl": 1}}
    assert run.hyperparameters == run.changed_hyperparameters == kept and run.base_model == "./base"
    assert make_run(hyperparameters={"eos_token": "</s>", "report_to": []}).hyperparameters["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("change", "message"), [({"value": math.nan}, "finite"), ({"dataset": "a/b/c"}, "not a Hub id")]
)
def test_an_impossible_score_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(full_run().benchmarks[0], **change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nexus": {"nexus": True}}, "lacks.*inner_lr"),
        ({"evaluations": [HeldOutLoss("a", "train", None, 1.0)] * 2}, "different names"),
        ({"evaluations": [HeldOutLoss("a", "test", None, 1.0)]}, "roles.*test.*Use one of"),
    ],
)
def test_an_impossible_summary_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({"parameters": "many"}, {"parameters": 10**400}, {"seconds": 1e300}, {"unit": "# words"}, {"tags": "one"}),
        *({"plot": "//elsewhere/pixel.png"}, {"plot": "a/b.png"}, {"auto_class": "os\nimport sys"}, {"nexus": []}),
        *(
            {"stages": [{"until": 1.0, "weights": "all"}]},
            {"stages": [{"until": 2.0, "weights": {"a": 1}}]},
            {"stages": 3},
            {"mixture": [{"source": "a"}]},
            {"numbers": {"a": "b"}},
        ),
        *({"evaluations": [{"name": "a", "role": "ood", "first_loss": None, "last_loss": "low"}]}, {"versions": [1]}),
    ],
    ids=str,
)
def test_a_summary_of_another_kind_is_an_error(tmp_path, changes):
    """`run_summary.json` may come from somebody else."""
    path = full_run().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"is not the summary of a run"):
        RunSummary.load(tmp_path)
    for text in ("", "[]", "7", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"is not the summary of a run"):
            RunSummary.load(tmp_path)
