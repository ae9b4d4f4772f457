"""The scripts in benchmarks/: their arms train as described, and each arm has a row in the table."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import distance

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arms(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import arms

    return arms


@pytest.fixture
def gpu_report(arms) -> Any:
    import gpu_report

    return gpu_report


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


def trained(arms: Any, arm: str, k: int = 4) -> torch.Tensor:
    """The change of the weights over three outer steps."""
    case = arms.Case("1M", 8, k)
    trainer = case.trainer(arm, case.sources(3), steps=3)
    before = weights(trainer)
    trainer.train()
    return weights(trainer) - before


def test_the_naive_implementation_is_the_same_update(arms):
    nexus = trained(arms, "Nexus, gamma 0.05")
    assert distance(trained(arms, "naive deep copies"), nexus) < 0.01
    assert distance(trained(arms, arms.PLAIN), nexus) > 0.1


def test_sam_without_ascent_is_plain_accumulation(arms, monkeypatch):
    plain = trained(arms, arms.PLAIN)
    assert distance(trained(arms, "SAM"), plain) > 0.1
    monkeypatch.setattr(arms.SharpnessAware, "rho", 0.0)
    assert torch.equal(trained(arms, "SAM"), plain)


def test_upgrad_of_one_source_is_plain_accumulation(arms):
    pytest.importorskip("torchjd")
    pytest.importorskip("qpsolvers", reason="needs torchjd[quadprog-projector]")
    assert distance(trained(arms, "UPGrad (TorchJD)", k=1), trained(arms, arms.PLAIN, k=1)) < 1e-4
    assert distance(trained(arms, "UPGrad (TorchJD)"), trained(arms, arms.PLAIN)) > 0.01


def rows_of(*groups: str) -> list[list[str]]:
    """The cells of the table for groups of arms in the smallest case."""
    command = ["benchmarks/step_overhead.py", "--models", "1M", "--tokens", "8", "--k", "2", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--groups", *groups], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@pytest.mark.slow
def test_each_arm_gets_a_row_and_nexus_holds_one_copy():
    plain, nexus = rows_of("nexus")
    assert (plain[2], nexus[2]) == ("plain accumulation", "Nexus, gamma 0.05")
    assert (plain[5], plain[7]) == ("1", "")
    assert float(nexus[7]) == pytest.approx(4, abs=0.01)  # bytes per parameter, and 5 KB of random states
    assert all(nexus)  # no empty cell


@pytest.mark.slow
def test_adapters_and_ranks_hold_one_copy_or_a_shard_of_it():
    pytest.importorskip("peft")
    rows = rows_of("lora", "ddp", "fsdp2")
    # Bytes per parameter. The 5 KB of random states are 0.06 of them for 82,000 parameters of adapters.
    assert [float(row[7]) for row in rows if row[7]] == pytest.approx([4.06, 4, 4, 2], abs=0.01)
    assert all("2 CPU processes" in row[2] for row in rows[2:])


# ---- The report of a GPU ----


def reported(gpu_report: Any, part: Any, folder: Path, memory: float = 1e12, seconds: float = 1e6) -> list[list[str]]:
    """The rows of a part of the report."""
    report = gpu_report.Report(folder / "report.md")
    gpu_report.measure_part(part, report, memory, time.monotonic() + seconds)
    return cells_of((folder / "report.md").read_text())


def cells_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_arms_without_memory_are_rows_and_the_rest_is_measured(gpu_report, arms, monkeypatch, tmp_path):
    def measure(case: Any, arms: list[str], *args: Any, **kwargs: Any) -> Any:
        if len(arms) > 1 or arms == [gpu_report.NEXUS]:
            raise gpu_report.OutOfMemory
        return gpu_report.Measurement([{arms[0]: (2.0, 2.0)}], {arms[0]: (12_000_000, 2**30)})

    monkeypatch.setattr(gpu_report, "measure_apart", measure)
    part = gpu_report.Part(arms.Case("1M", 64, 4), [arms.PLAIN, arms.NEXUS, arms.OFFLOAD])
    plain, nexus, offload = reported(gpu_report, part, tmp_path)
    assert plain[4:6] == ["2,000.0 ms", "1"]
    assert nexus[4] == "out of memory"
    assert offload[5] == "1.000, not paired"
    assert plain[7] == "1"  # GiB


def test_what_does_not_fit_or_has_no_time_is_left_out(gpu_report, arms, tmp_path):
    part = gpu_report.Part(arms.Case("1M", 512, 4), [arms.PLAIN, arms.NEXUS])
    case, groups = gpu_report.arrange(part, memory=42e6)
    assert case.settings == {"activation_checkpointing": True} and groups == [[arms.PLAIN], [arms.NEXUS]]
    part = gpu_report.Part(part.case, [arms.PLAIN])
    (row,) = reported(gpu_report, part, tmp_path, memory=1e6)
    assert row[4].startswith("left out: 0.0")
    (row,) = reported(gpu_report, part, tmp_path, seconds=1)
    assert row[4] == "left out: the time is over"


@pytest.mark.slow
def test_a_tiny_report_has_a_row_for_each_arm(gpu_report, tmp_path):
    path = tmp_path / "report.md"
    command = [sys.executable, "benchmarks/gpu_report.py", "--tiny", "--minutes", "60", "--output", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    _, _, *rows = cells_of(path.read_text())
    arms = rows[: len(rows) - 8]  # the table of the data follows
    assert len(arms) == sum(len(part.arms) for part in gpu_report.TINY_PARTS)
    for row in arms:
        if "flash" in row[2]:
            assert row[4] in ("left out: the package flash-attn is not installed", "failed, see the output")
        else:
            assert float(row[6]) == pytest.approx(12 if row[3].startswith("plain") else 16, abs=0.1)
            assert row[7] == "" or float(row[7]) == pytest.approx(float(row[8]), rel=0.25)
    assert rows[-1][0] == "streamed text"
