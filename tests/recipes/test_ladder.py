"""The recipe of the ladder, without its runs."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_nexus.compare import comparison
from hf_nexus.pretrain.command_line import from_sections
from hf_nexus.pretrain.parsing import resolve

RECIPE = Path(__file__).parents[2] / "recipes" / "ladder.py"


def test_failed_runs_are_an_error_after_the_table(tmp_path, monkeypatch, capsys):
    done = SimpleNamespace(folder=tmp_path, check=lambda: None, run=lambda: None, failed=["nexus seed 1"])
    monkeypatch.setattr(comparison, "Comparison", lambda config, console: done)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--rungs", "0.03M"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1 runs failed; the same command"):
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert "| rung |" in capsys.readouterr().out


def test_rungs_are_the_same_comparison_at_other_sizes():
    """Evaluations, warm-up and decay keep their fractions, except where a rung says otherwise."""
    recipe = runpy.run_path(str(RECIPE))
    configs = {rung: recipe["comparison"](rung, None) for rung in recipe["RUNGS"]}
    for rung, config in configs.items():
        training = config.run_config({})["training"]
        steps, decay = training["max_steps"], training["lr_scheduler_kwargs"]["num_decay_steps"]
        assert (steps, len(config.seeds)) == (recipe["RUNGS"][rung]["steps"], len({*config.seeds}))
        assert training["warmup_steps"] / steps == pytest.approx(5 / 75, abs=1e-3)
        assert decay / steps == pytest.approx(20 / 75, abs=1e-3)
        assert (steps / training["eval_steps"] == pytest.approx(15, abs=0.1)) == ("0.1M" not in rung)
        assert (config.minima is None) == (rung != "0.03M")
        assert (config.equivalence_margin == 0.012) == ("0.1M" in rung)
        assert config.arms.items() <= configs["0.03M"].arms.items()
        assert (len(config.arms) == 4) == (config.tuning is None) == (rung == "0.1M-rate")
        resolve(from_sections(rung, config.run_config(config.settings("adamw")), dry_run=True))


def test_the_rung_of_one_rate_differs_in_that_alone():
    recipe = runpy.run_path(str(RECIPE))
    tuned, of_one = recipe["comparison"]("0.1M", None), recipe["comparison"]("0.1M-rate", None)
    assert not {*tuned.seeds} & {*of_one.seeds}
    for arm in of_one.arms:
        one, other = (config.run_config(config.settings(arm)) for config in (of_one, tuned))
        assert one["training"].pop("learning_rate") == 2e-2
        other["training"].pop("learning_rate", None)
        assert one == other
