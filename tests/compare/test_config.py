"""The configuration of a comparison: errors name the key, and arms get equal budgets of tuning."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_nexus.compare.config import RESERVED, ComparisonConfig
from hf_nexus.pretrain.sections import load_config
from hf_nexus.strict import read

ARMS: dict[str, Any] = {"adamw": {"nexus": False}, "nexus": {"inner_lr": 0.05}}


def make(**changes: Any) -> ComparisonConfig:
    given = {
        "base": "demo",
        "arms": ARMS,
        "baseline": "adamw",
        "primary": {"arm": "nexus", "metric": "ood_loss"},
        "seeds": [1, 2, 3],
        "output_dir": "runs/x",
    }
    return read(ComparisonConfig, given | changes)


def test_the_folder_may_be_below_that_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    assert make(output_dir="~/runs/mine").output_dir == "/home/alice/runs/mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "arm: unknown key. Did you mean 'arms'"),
        ({"arms": {"adamw": {}}}, "arms: .* name two arms or more"),
        ({"arms": ARMS | {"a b": {}}}, "arms.a b: a name starts with"),
        ({"arms": ARMS | {"x": {"inner_Ir": 1}}}, "arms.x.inner_Ir: not a training field"),
        ({"arms": ARMS | {"x": {"inner_lrr": 1}}}, r"arms.x.inner_lrr: not a .*. Did you mean 'inner_lr'\?"),
        ({"arms": ARMS | {"x": {"inner_lr": "hello"}}}, "arms.x.inner_lr: 'hello' is not allowed"),
        ({"arms": ARMS | {"x": {"seed": 1}}}, "arms.x.seed: the comparison sets it for each run"),
        ({"training": {"run_name": "mine"}}, "training.run_name: the comparison sets it for each run"),
        ({"baseline": "adam"}, "baseline: 'adam' is not among"),
        ({"primary": {"arm": "adamw"}}, "primary.arm: 'adamw' is the baseline"),
        ({"primary": {"arm": "nexus", "metric": "odd_loss"}}, "primary.metric: 'odd_loss' is not known"),
        ({"primary": {"arm": "nexus", "metric": "ood/"}}, "primary.metric: 'ood/' is not known"),
        ({"primary": {"arm": "nexus", "where": "start"}}, "primary.where: 'start' .* 'end' or 'matched'"),
        (
            {"primary": {"arm": "nexus", "metric": "train_loss", "where": "matched"}},
            "primary.where: 'train_loss' has no value at matched",
        ),
        ({"family": [{"arm": "nexsu"}]}, "family: nexsu is not among the arms"),
        ({"family": [{"arm": "nexus", "versus": "a"}]}, "family: a is not among the arms"),
        ({"family": [{"arm": "nexus"}]}, "family: .* is the primary comparison"),
        (
            {"family": [{"arm": "adamw", "versus": "nexus"}]},
            "family: .* in reverse. .*Write {arm: nexus, versus: adamw}",
        ),
        (
            {"arms": ARMS | {"x": {}}, "family": [{"arm": "x", "versus": "nexus", "metric": "train_loss"}]},
            "family: .* in reverse. .*Write {arm: nexus, versus: x}",
        ),
        (
            {
                "arms": ARMS | {"x": {}, "y": {}},
                "family": [{"arm": "x", "versus": "y"}, {"arm": "y", "versus": "x"}],
            },
            "family: .* in reverse. .*Write {arm: x, versus: y}",
        ),
        ({"primary": {"arm": "nexus", "versus": "nexus"}}, "primary.versus: the primary arm is compared with the"),
        ({"equivalence_margin": 0}, "equivalence_margin: 0 "),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] .* each once"),
        ({"seeds": [1.5]}, r"seeds\[0\]: 1.5 .* a whole number"),
        ({"seeds": []}, "seeds: .* 1 or more"),
        ({"tuning": {"grid": {"learning_rate": 1e-3}}}, "tuning.grid.learning_rate: .* must be a list"),
        ({"tuning": {"grid": {"learning_rate": []}}}, "tuning.grid: .* each with its values"),
        ({"tuning": {"grid": {"learning_rate": [1e-3, "much"]}}}, "tuning.grid.learning_rate: 'much' is not allowed"),
        ({"tuning": {"grid": {"learning_rat": [1e-3]}}}, "tuning.grid.learning_rat: not a training field"),
        ({"tuning": {"grid": {"learning_rate": [1e-3]}, "seeds": [3]}}, "are seeds of the comparison, too"),
        ({"minima": {"seeds": [9]}}, "minima.seeds: .9. are not among"),
        ({"minima": {"arms": ["sgd"]}}, "minima.arms: .'sgd'. are not among the arms .'adamw'"),
        ({"minima": {"arms": []}}, "minima.arms: .*give 1 or more, each once"),
        ({"minima": {"sources": ["digits"]}}, "minima.sources: .* 2 or more, each once"),
        ({"minima": {"grid": 1}}, "minima.grid: 1"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat: unknown key"),
        ({"question_sets": {"quiz": {"path": "q.jsonl", "prompt": "Q:"}}}, "quiz.prompt: .* does not contain"),
        ({"workers": 0}, "workers: 0"),
        ({"arms": ["adamw", "nexus"]}, "arms: .* must be a mapping"),
        ({"arms": ARMS | {"x": 3}}, "arms.x: 3 .* must be a mapping"),
        ({"model": None}, "model: None .* must be a mapping"),
        ({"primary": None}, "primary: None .* must be a mapping"),
        ({"question_sets": ["a"]}, "question_sets: .* must be a mapping"),
        ({"training": {"output_dir": "x"}}, "training.output_dir: the comparison sets it"),
        (
            {
                "tuning": {"grid": {"learning_rate": [1e-3, 2e-3]}},
                "arms": ARMS | {"x": {"tuning": {"inner_lr": [0.1, 0.2, 0.3]}}},
            },
            "has 3 trials, and the common grid has 2",
        ),
        ({"tuning": {"grid": {"inner_lr": [0.1, 0.2]}}}, r"arms.nexus: \['inner_lr'\] are also in its tuning grid"),
        (
            {
                "tuning": {"grid": {"learning_rate": [1e-3, 2e-3]}},
                "arms": ARMS | {"x": {"inner_lr": 0.0, "tuning": {"inner_lr": [0.1, 0.2]}}},
            },
            r"arms.x: \['inner_lr'\] are also in its tuning grid",
        ),
    ],
)
def test_an_error_names_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_an_error_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("base: demo\narms: 3\nbaseline: a\nprimary: {arm: b}\nseeds: [1]\noutput_dir: x\n")
    with pytest.raises(ValueError, match=r"wrong\.yaml: arms: 3 is not allowed"):
        ComparisonConfig.load(str(path))
    with pytest.raises(ValueError, match=r"There is no comparison 'compar'\. Did you mean 'compare'"):
        ComparisonConfig.load("compar")


def test_declared_tests_have_the_defaults_of_the_comparison():
    family = [{"arm": "nexus", "metric": "validation_loss"}, {"arm": "nexus", "where": "matched", "versus": "adamw"}]
    tests = [("nexus", "adamw", "validation_loss", "end"), ("nexus", "adamw", "ood_loss", "matched")]
    analysis = make(family=family, equivalence_margin=0.01).analyse([])
    assert (analysis.family, analysis.margin, analysis.primary.where) == (tests, 0.01, "end")


def test_every_arm_has_as_many_trials():
    own = {"inner_lr": [0.1, 0.2]}
    config = make(tuning={"grid": {"learning_rate": [1, 2]}}, arms=ARMS | {"own": {"tuning": own, "nexus": True}})
    assert [list(config.trials(arm)) for arm in config.arms] == [
        [{"learning_rate": 1}, {"learning_rate": 2}],
        [{"learning_rate": 1}, {"learning_rate": 2}],
        [{"inner_lr": 0.1}, {"inner_lr": 0.2}],
    ]
    assert config.settings("own") == {"nexus": True}


def test_runs_take_no_field_of_a_single_run_from_the_base(tmp_path):
    """All would share the order of the data, and start from one checkpoint."""
    given = {"seed": 7, "data_seed": 7, "resume_from_checkpoint": "runs/one/checkpoint-9", "run_name": "one"}
    given |= {"hub_token": "hf_" + "x" * 34, "hub_model_id": "alice/one", "learning_rate": 0.5}
    base = load_config("demo")
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({**base, "training": base["training"] | given}))
    training = make(base=str(path)).run_config({"seed": 3})["training"]
    assert {key: training.get(key) for key in (*RESERVED, "learning_rate")} == {
        **dict.fromkeys(RESERVED),
        "seed": 3,
        "learning_rate": 0.5,
    }


def test_the_comparison_of_the_package_has_all_controls(tmp_path):
    config = ComparisonConfig.load("compare", output_dir=str(tmp_path))
    assert Path(config.output_dir) == tmp_path and len(config.seeds) >= 3
    settings = [config.settings(arm) for arm in config.arms]
    assert {"nexus": False} in settings and {"inner_lr": 0.0} in settings
    assert any(each.get("inner_direction") == "random" for each in settings)
    assert any(each.get("inner_lr_schedule") == "follow" for each in settings)
