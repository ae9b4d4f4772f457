"""The recipe of the ladder, without its runs."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_nexus.compare import comparison

RECIPE = Path(__file__).parents[2] / "recipes" / "ladder.py"


def test_failed_runs_are_an_error_after_the_table(tmp_path, monkeypatch, capsys):
    done = SimpleNamespace(folder=tmp_path, check=lambda: None, run=lambda: None, failed=["nexus seed 1"])
    monkeypatch.setattr(comparison, "Comparison", lambda config, console: done)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--rungs", "0.03M"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1 runs failed; the same command"):
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert "| rung |" in capsys.readouterr().out
