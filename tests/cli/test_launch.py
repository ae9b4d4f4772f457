"""`hf-nexus train --devices N` and `--accelerate_config FILE` start their launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_nexus.cli import app as cli
from tests.support.tiny_config import STEPS, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The arguments of the launcher, which is not started."""
    found: list[str] = []

    def execv(path: str, argv: list[str]) -> None:
        found.extend(argv)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    return found


def test_devices_start_torchrun(launched):
    with pytest.raises(SystemExit):
        cli.main(["train", "demo", "--devices", "2", "--max_steps", "3", "--use_cpu"])
    assert " ".join(launched[1:]) == (
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m hf_nexus.cli train demo --max_steps 3 --use_cpu"
    )


def test_a_file_of_accelerate_starts_its_launcher(launched, tmp_path):
    from accelerate.commands.launch import launch_command_parser

    (tmp_path / "two.yaml").write_text("num_processes: 2")
    with pytest.raises(SystemExit):
        cli.main(["train", "demo", "--accelerate_config", str(tmp_path / "two.yaml"), "--max_steps", "3"])
    assert launched[1:3] == ["-m", "accelerate.commands.launch"]
    parsed = launch_command_parser().parse_args(launched[3:])
    assert parsed.module and parsed.training_script == "hf_nexus.cli"
    assert parsed.training_script_args == ["train", "demo", "--max_steps", "3"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--devices 2 --max_step 3", "Did you mean '--max_steps'"),
        ("--devices 8", "--devices 8: this machine has 4"),
        ("--accelerate_config none.yaml", "there is no file 'none.yaml'"),
    ],
)
def test_a_mistake_is_one_line_before_the_launch(launched, monkeypatch, flags, words):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "demo", *flags.split()])
    message = str(stop.value.code)
    assert message.startswith("error: ") and words in message and "\n" not in message and not launched


def test_a_dry_run_plans_for_the_devices(launched, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "130m", "--dry_run", "--devices", "2"])
    assert not stop.value.code and not launched
    assert "DDP gradient buckets" in capsys.readouterr().out


def test_train_prints_before_it_loads_torch():
    code = (
        "import sys; from hf_nexus.cli.app import main\n"
        "class Stream:\n"
        "    def write(self, text): assert 'torch' not in sys.modules; sys.__stdout__.write(text); raise SystemExit\n"
        "    def flush(self): pass\n"
        "    def isatty(self): return False\n"
        "sys.stderr = Stream()\n"
        "main(['train', 'demo'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "train demo" in done.stdout, done.stderr


def start(config: Path, output: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_nexus.cli", "train", str(config), "--output_dir", str(output), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_train_and_a_failure_is_kept(tmp_path):
    config = write_config(tmp_path)
    run = start(config, tmp_path / "out", "--devices", "2", "--save_strategy", "no")
    stdout, stderr = run.communicate(timeout=600)
    assert run.returncode == 0, stderr[-3000:]
    assert stdout.count("Plan of") == 1
    assert re.search(r"devices +│ 2 ", stdout)
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == STEPS
    broken = start(config, tmp_path / "out", "--devices", "2", "--resume_from_checkpoint", "last")
    _, stderr = broken.communicate(timeout=600)
    assert broken.returncode != 0 and "error: " in stderr


@pytest.mark.slow
def test_sigterm_reaches_the_processes_and_saves_a_checkpoint(tmp_path):
    flags = ["--devices", "2", "--max_steps", "100000", "--enable_jit_checkpoint", "True"]
    run = start(write_config(tmp_path), tmp_path / "out", *flags)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out/checkpoint-3").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode != 0
    printed = " ".join(stdout.split())
    assert "Terminated after step" in printed and "--resume_from_checkpoint last" in printed, stderr[-3000:]
