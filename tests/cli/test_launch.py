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
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hf_nexus.cli import app as cli
from hf_nexus.trainer.checkpoints import is_complete
from tests.support.tiny_config import STEPS, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """The launcher changes this variable of its process, which ends with it."""
    monkeypatch.setenv("PYTHONSAFEPATH", "")


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The arguments of torchrun or `accelerate launch`, which start nothing."""
    found: list[str] = []
    monkeypatch.setattr("torch.distributed.run.main", found.extend)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: found.extend(vars(args).items()))
    return found


def test_devices_start_torchrun(launched):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "demo", "--devices", "2", "--max_steps", "3", "--use_cpu"])
    assert stop.value.code == 0
    assert " ".join(launched) == "--standalone --nproc_per_node 2 -m hf_nexus.cli train demo --max_steps 3 --use_cpu"
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_a_file_of_accelerate_starts_its_launcher(launched, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("num_processes: 2")
    with pytest.raises(SystemExit):
        cli.main(["train", "demo", "--accelerate_config", str(file), "--max_steps", "3"])
    parsed = dict(launched)
    assert parsed["config_file"] == str(file) and parsed["module"] and parsed["training_script"] == "hf_nexus.cli"
    assert parsed["training_script_args"] == ["train", "demo", "--max_steps", "3"]


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (SignalException("stopped", signal.SIGTERM), 143),
        (ChildFailedError("train", {0: ProcessFailure(0, 1, 3, "<N/A>")}), 3),
        (ChildFailedError("train", {1: ProcessFailure(1, 1, -signal.SIGKILL, "<N/A>")}), 137),
        (subprocess.CalledProcessError(3, "train"), 3),
    ],
)
def test_the_status_of_the_processes_is_that_of_the_command(monkeypatch, capsys, failure, status):
    def fail(args):
        raise failure

    monkeypatch.setattr("torch.distributed.run.main", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "demo", "--devices", "2", "--use_cpu"])
    assert stop.value.code == status
    assert ("error: rank 1 was ended by SIGKILL" in capsys.readouterr().err) == (status == 137)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--devices 2 --max_step 3", "Did you mean '--max_steps'"),
        ("--devices 8", "--devices 8: this machine has 4"),
        ("--accelerate_config none.yaml", "there is no file 'none.yaml'"),
        ("--accelerate_config two.yaml --dry_run", "a plan does not read it. Pass --devices and --sharding"),
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
    (config.parent / "queue.py").write_text("raise ImportError('the wrong module')")
    command = [sys.executable, "-P", "-m", "hf_nexus.cli", "train", str(config), "--output_dir", str(output), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=config.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    assert broken.returncode == 1 and "error: " in stderr and "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "flags", "word"),
    [(signal.SIGTERM, ["--enable_jit_checkpoint", "True"], "Terminated"), (signal.SIGINT, [], "Interrupted")],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_reaches_the_processes_which_save_a_checkpoint(tmp_path, number, flags, word):
    out = tmp_path / "out"
    flags = ["--max_steps", "100000", "--save_steps", "20", "--dataloader_num_workers", "2", *flags]
    run = start(write_config(tmp_path), out, "--devices", "2", *flags)
    deadline = time.monotonic() + 300
    while not (out / "checkpoint-20").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 128 + number and "Traceback" not in stderr, stderr[-3000:]
    printed = " ".join(stdout.split())
    assert "--resume_from_checkpoint last" in printed
    step = int(re.search(rf"{word} after step (\d+)", printed)[1])
    assert is_complete(out / f"checkpoint-{step}")
