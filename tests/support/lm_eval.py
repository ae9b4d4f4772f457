"""Stand-ins for lm-eval."""

import json
import textwrap
import time
from pathlib import Path

import pytest

from hf_nexus.evaluation.lm_eval import runner
from hf_nexus.hub.benchmarks import SCORES_NAME
from hf_nexus.hub.results import BenchmarkScore


def raw(task="gsm8k", key="exact_match,strict-match", value=0.412, shots=5, **more):
    """The parts of the results of lm-eval that are read."""
    metric, kind = key.split(",")
    row = {"alias": task, "sample_len": 10, key: value, f"{metric}_stderr,{kind}": 0.014}
    return {
        "results": {task: row},
        "configs": {task: {"dataset_path": "some/data"}},
        "n-shot": {task: shots},
        "date": 1.7e9,
        "lm_eval_version": "0.4.13",
    } | more


def load_scores(folder):
    """The scores that a folder holds."""
    return [BenchmarkScore(**row) for row in json.loads(Path(folder, SCORES_NAME).read_text())["scores"]]


@pytest.fixture
def model(tmp_path):
    """A folder with the files of a model that are looked at."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(code)` is run in place of lm-eval. `settings` and `succeed(results)` are defined there."""
    head = f"""
import json, os, signal, subprocess, sys, time
settings = json.load(sys.stdin)
def succeed(results={json.dumps(raw())}):
    json.dump(results, open(settings["results"], "w"))
"""

    def write(code):
        path = tmp_path / "stand_in.py"
        path.write_text(head + textwrap.dedent(code))
        monkeypatch.setattr(runner, "_CHILD", path)
        return path

    return write


def gone(pid):
    """Whether a process has ended. A zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
