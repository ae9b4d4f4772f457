"""A control differs from the primary arm in one ingredient and in nothing else."""

import pytest

from hf_nexus.compare.controls import find_controls
from tests.support.comparison import make_comparison, make_record
from tests.support.tiny_config import write_config

PRIMARY = {"inner_lr": 0.2}


@pytest.mark.parametrize(
    ("arm", "kind"),
    [
        ({"inner_lr": 0.0}, "gamma 0"),
        ({"inner_lr": 0.2, "inner_direction": "random"}, "random direction"),
        ({"inner_lr": 0.2, "source_schedule": "mixed"}, "source mixing"),
        ({"inner_lr": 0.2, "source_schedule": "blocked"}, "source blocking"),
        ({"inner_lr": 0.2, "inner_lr_schedule": "follow"}, "following gamma"),
        ({"inner_lr": 0.2, "source_schedule": "stratified"}, None),
        ({"inner_lr": 0.05}, None),
        ({"nexus": False, "source_schedule": "mixed"}, None),
    ],
)
def test_an_arm_without_one_ingredient_is_a_control(arm, kind):
    controls, unclean = find_controls({"primary": PRIMARY, "arm": arm}, "primary")
    assert controls == ({} if kind is None else {"arm": kind}) and unclean == {}


@pytest.mark.parametrize(
    ("arm", "kind", "others"),
    [
        ({"inner_lr": 0.05, "inner_direction": "random"}, "random direction", ["inner_lr"]),
        ({"inner_lr": 0, "source_schedule": "mixed"}, "gamma 0", ["source_schedule"]),
        ({"inner_lr": 0.2, "source_schedule": "mixed", "optim": "sgd", "seq": 1}, "source mixing", ["optim", "seq"]),
    ],
)
def test_an_arm_that_differs_in_more_is_no_control(arm, kind, others):
    assert find_controls({"primary": PRIMARY, "arm": arm}, "primary") == ({}, {"arm": (kind, others)})


def test_tuned_fields_and_defaults_do_not_count():
    arms = {
        "primary": PRIMARY | {"learning_rate": 0.01},
        "arm": {"inner_lr": 0.0, "learning_rate": 0.02, "source_schedule": "random"},
    }
    tuned = {key: ["learning_rate"] for key in arms}
    assert find_controls(arms, "primary", tuned) == ({"arm": "gamma 0"}, {})


def test_the_primary_arm_may_tune_the_field_of_a_control():
    arms = {"primary": {}, "arm": {"inner_lr": 0.0}}
    tuned = {"primary": ["inner_lr", "learning_rate"], "arm": ["learning_rate"]}
    assert find_controls(arms, "primary", tuned) == ({"arm": "gamma 0"}, {})


@pytest.mark.parametrize(
    ("tuned", "others"),
    [
        ({"other": ["weight_decay"]}, ["weight_decay"]),
        ({"arm": ["weight_decay"]}, ["weight_decay"]),
        ({"arm": ["learning_rate"], "primary": ["optim_args"]}, ["learning_rate", "optim_args", "weight_decay"]),
    ],
    ids=["another arm tunes it", "only the control tunes it", "each tunes another field"],
)
def test_only_fields_that_both_arms_tune_may_differ(tuned, others):
    arms = {"primary": PRIMARY, "arm": {"inner_lr": 0.0, "weight_decay": 0.5}, "other": {}}
    assert find_controls(arms, "primary", tuned) == ({}, {"arm": ("gamma 0", others)})


def test_the_grids_of_a_comparison_belong_to_their_arms(tmp_path):
    arms = {
        "adamw": {"nexus": False, "tuning": {"weight_decay": [0.1, 0.2]}},
        "gamma-0": {"inner_lr": 0.0, "weight_decay": 0.5},
        "random": {"inner_direction": "random"},
        "nexus": {},
    }
    tuning = {"grid": {"learning_rate": [1e-3, 1e-2]}}
    config = make_comparison(write_config(tmp_path), tmp_path / "out", arms=arms, tuning=tuning)
    analysis = config.analyse([])
    assert analysis.controls == {"random": "random direction"} and analysis.unclean == {
        "gamma-0": ("gamma 0", ["weight_decay"])
    }


def test_without_a_path_its_schedule_does_not_matter():
    arms = {"primary": PRIMARY | {"inner_lr_schedule": "follow"}, "arm": {"inner_lr": 0.0}}
    assert find_controls(arms, "primary")[0] == {"arm": "gamma 0"}


def test_an_arm_without_the_update_is_no_control(tmp_path):
    """The base or `training` may switch it off for all arms."""
    arms = {"adamw": {}, "mixed": {"source_schedule": "mixed"}, "nexus": {"nexus": True}}
    base = write_config(tmp_path)
    for training, found in (({"nexus": False}, {}), ({}, {"mixed": "source mixing"})):
        config = make_comparison(base, tmp_path / "out", arms=arms, training=training)
        records = [make_record(arm, 1) for arm in arms]
        for record in records:
            record.settings = config.settings(record.arm)
        assert config.analyse(records).controls == found
