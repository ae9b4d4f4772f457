"""`recipes/accelerate/slurm.sh` with stand-ins for the commands of Slurm and for the launcher."""

import os
import signal
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_nexus.pretrain.parsing import parse_arguments

ACCELERATE = Path(__file__).parents[2] / "recipes/accelerate"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" > requeued; fi',
    "srun": 'echo "$SRUN_CPUS_PER_TASK" > cores; SLURM_NODEID=1 exec "$@"',  # the second of two machines
    "accelerate": 'echo $$ > pid; printf "%s\\n" "$@" > launched; exec sleep "${TRAINING_TAKES:-0}"',
}


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    for name, body in STAND_INS.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/usr/bin/env bash\n{body}\n")
        script.chmod(0o755)

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        job = {
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_JOB_ID": "41",
            "SLURM_CPUS_PER_TASK": "64",
        }
        job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **environment}
        command = ["bash", str(ACCELERATE / "slurm.sh"), *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **job})

    return start


def launched(folder: Path) -> tuple[Namespace, list[str]]:
    """The arguments of the launcher and of the recipe."""
    from accelerate.commands.launch import launch_command_parser

    command, *rest = (folder / "launched").read_text().splitlines()
    assert command == "launch"
    arguments = launch_command_parser().parse_args(rest)
    return arguments, arguments.training_script_args


@pytest.mark.parametrize("file", ["multi_node.yaml", "fsdp2_multi_node.yaml"])
def test_a_machine_starts_eight_processes_and_meets_the_first(start, tmp_path, file):
    assert start(str(ACCELERATE / file), "--inner_lr", "0.1").wait(180) == 0
    launcher, recipe = launched(tmp_path)
    assert launcher.config_file == str(ACCELERATE / file)
    assert (launcher.machine_rank, launcher.num_machines, launcher.num_processes) == (1, 2, 16)
    assert launcher.main_process_ip == "node7"
    assert (tmp_path / "cores").read_text() == "64\n"
    assert launcher.training_script == "recipes/pretrain_3b.py"
    assert parse_arguments(["--dry_run", *recipe]).training.inner_lr == 0.1
    assert "--resume_from_checkpoint" not in recipe


@pytest.mark.parametrize("flag", [["--output_dir", "mine"], ["--output-dir=mine"]])
def test_a_folder_that_is_not_searched_is_refused(start, tmp_path, capfd, flag):
    assert start(str(ACCELERATE / "multi_node.yaml"), *flag).wait(180) == 2
    assert "OUTPUT_DIR" in capfd.readouterr().err and not (tmp_path / "launched").exists()


@pytest.mark.parametrize("saved", ["checkpoint-40/manifest.json", "_incomplete/checkpoint-40/manifest.json"])
def test_the_job_resumes_and_is_requeued_before_the_time_limit(start, tmp_path, saved):
    manifest = tmp_path / "mine" / saved
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    job = start(str(ACCELERATE / "multi_node.yaml"), OUTPUT_DIR="mine", TRAINING_TAKES="600")
    try:
        deadline = time.monotonic() + 180
        while not (tmp_path / "launched").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        job.wait(180)
        _, recipe = launched(tmp_path)
        assert " ".join(recipe).endswith("--output_dir mine --resume_from_checkpoint last")
        assert (tmp_path / "requeued").read_text().split() == ["requeue", "41"]
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_job_without_a_complete_checkpoint_starts_anew(start, tmp_path):
    (tmp_path / "mine" / "checkpoint-40").mkdir(parents=True)  # one that was copied in part, for example
    assert start(str(ACCELERATE / "multi_node.yaml"), OUTPUT_DIR="mine").wait(180) == 0
    assert "--resume_from_checkpoint" not in launched(tmp_path)[1]
