"""The recipes, run as their header says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_recipe(*arguments: str) -> dict[str, tuple[float, float]]:
    """Losses before and after that a recipe prints, by source."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = re.findall(r"^(\w+): loss ([\d.]+) -> ([\d.]+)$", done.stdout, re.MULTILINE)
    assert len(lines) == len({name for name, _, _ in lines}), done.stdout  # one process prints
    return {name: (float(before), float(after)) for name, before, after in lines}


def test_plain_accelerate_lowers_the_loss_of_every_source() -> None:
    losses = run_recipe("recipes/plain_accelerate.py", "--steps", "5")
    assert set(losses) == {"code", "mathematics", "reasoning"}
    for name, (before, after) in losses.items():
        assert after < before - 0.3, name


@pytest.mark.slow
def test_plain_accelerate_trains_on_two_processes_as_one() -> None:
    alone = run_recipe("recipes/plain_accelerate.py", "--steps", "5")
    losses = run_recipe(*TORCHRUN, "recipes/plain_accelerate.py", "--steps", "5")
    for name, (before, after) in losses.items():
        assert before == alone[name][0], name  # the same model, and text
        assert after < before - 0.3, name
    assert losses != alone  # the second process had rows of its own
