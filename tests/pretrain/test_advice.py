"""Warnings of a plan whose devices, batch size and steps do not fit its configuration."""

import pytest

from hf_nexus.pretrain.advice import warnings_of
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.plan import plan_run
from hf_nexus.pretrain.run import dry_run, prepare_run


def warnings(config: str, devices: int, *flags: str) -> str:
    arguments = parse_arguments(["--config", config, "--dry_run", *flags])
    return "\n".join(warnings_of(arguments, plan_run(arguments, devices)))


@pytest.mark.parametrize(("config", "devices"), [("demo", 1), ("3b", 64)])
def test_a_configuration_on_its_own_devices_fits(config, devices):
    assert warnings(config, devices) == ""


@pytest.mark.parametrize(
    ("devices", "flags", "run", "step"),
    [
        (8, [], "1/8 of", "1/8 of"),
        (8, ["--max_steps", "240000"], None, "1/8 of"),
        (8, ["--gradient_accumulation_steps", "64"], None, None),
        (64, ["--max_steps", "15000"], "1/2 of", None),
        (128, [], "2 times", "2 times"),
        (64, ["--max_steps", "10"], "0.0003333 of", None),
        (64, ["--max_steps", "29991"], "0.9997 of", None),
        (64, ["--max_steps", "29999"], None, None),
    ],
)
def test_tokens_are_compared_with_those_of_the_file(devices, flags, run, step):
    found = warnings("3b", devices, *flags)
    on = "" if devices == 64 else f" on {devices} devices instead of 64"
    for what, share in ((f"The run{on} has ", run), (f"A step{on} has ", step)):
        assert (f"{what}{share} the configuration's tokens" in found) if share else (what not in found)


def test_one_inner_step_is_named():
    assert "a window of one inner step" in warnings("demo", 1, "--gradient_accumulation_steps", "1")
    assert "inner step" not in warnings("demo", 1, "--gradient_accumulation_steps", "1", "--no_nexus")


def test_a_run_leaves_one_inner_step_to_the_trainer(config, tmp_path, capsys):
    flags = ["--config", str(config), "--gradient_accumulation_steps", "1"]
    dry_run(parse_arguments([*flags, "--dry_run"]))
    assert "a window of one inner step" in " ".join(capsys.readouterr().out.split())
    prepare_run(parse_arguments([*flags, "--output_dir", str(tmp_path)])).lock.close()
    assert "a window of one inner step" not in " ".join(capsys.readouterr().out.split())


def test_a_warmup_must_end_before_the_run():
    assert "rises for 20 of 10 steps" in warnings("demo", 1, "--max_steps", "10")
