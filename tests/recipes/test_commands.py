"""The commands of the README and in the header of each recipe: they run on a CPU without a network."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import constants

from hf_nexus.pretrain.sections import load_config
from tests.support.hub.server import HubServer
from tests.support.hub.stand_ins import upload_benchmarks
from tests.trainer import test_publishing

hub = test_publishing.hub  # the fixture
ROOT = Path(__file__).parents[2]
# Commands that need several accelerators or machines, the Hub, files of the reader, or hours.
ELSEWHERE = ("--multi_gpu", "$HOST", "HuggingFaceTB/", "Qwen/", "mine.yaml", "ladder.py")


def header_commands(recipe: Path) -> list[str]:
    """The commands of the docstring. A line of flags only is added to the command before it."""
    text = recipe.read_text().split('"""')[1].replace("\\\\\n", " ")
    commands: list[str] = []
    for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
        commands.append(f"{commands[-1]} {line}" if line.startswith("--") else line)
    return [" ".join(command.split()) for command in commands if not any(mark in command for mark in ELSEWHERE)]


COMMANDS = {recipe.name: header_commands(recipe) for recipe in sorted((ROOT / "recipes").glob("*.py"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], tuple[str, Path]]:
    """`run(command)` returns its output and its working directory, which all commands share."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "docs"):
        (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(command: str) -> tuple[str, Path]:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout, folder

    return run


def losses(stdout: str) -> dict[str, tuple[float, float]]:
    """The losses before and after training that a recipe prints for each source."""
    lines = re.findall(r"^(\w+): loss ([\d.]+) -> ([\d.]+)$", stdout, re.MULTILINE)
    assert len(lines) == len({name for name, _, _ in lines}), stdout  # only one process prints
    return {name: (float(before), float(after)) for name, before, after in lines}


def test_every_command_of_the_headers_is_found():
    assert {name: len(commands) for name, commands in COMMANDS.items()} == {
        "compare.py": 1,
        "finetune.py": 3,
        "ladder.py": 0,
        "plain_accelerate.py": 3,
        "pretrain_3b.py": 2,
        "sft_with_trl.py": 2,
    }


# What the commands of the README run with here: fewer steps, and a smaller model where it has no own one.
FLAGS = {
    "hf-nexus train": "--max_steps 4 --eval_steps 2",
    "torchrun": "--max_steps 4 --eval_strategy no --num_hidden_layers 1 --hidden_size 32 --intermediate_size 64",
}
TEXT = "what the quick fox of the lazy dog does "
ARMS = """
base: mine.yaml
arms: {adamw: {nexus: false}, nexus: {inner_lr: 0.1}}
baseline: adamw
primary: {arm: nexus}
seeds: [1, 2]
output_dir: runs/arms
training: {max_steps: 4, eval_steps: 2}
"""


def readme_commands() -> list[str]:
    """The commands of the README in order, without their comments, and without those that install."""
    lines = [
        " ".join(line.partition(" #")[0].split())
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        for line in block.splitlines()
    ]
    return [line for line in lines if line and not line.startswith(("#", "pip install"))]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(run):
    *commands, benchmark = readme_commands()
    assert len(commands) == 7 and benchmark.startswith("hf-nexus benchmark")  # the next test
    folder = run("mkdir data")[1]
    rows = {name: [{"text": f"{name} {i}: " + TEXT * (i % 7)} for i in range(400)] for name in ("code", "docs", "law")}
    for name in ("code", "docs"):
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[name])))
    Dataset.from_list(rows["law"]).to_parquet(folder / "law.parquet")
    (folder / "arms.yaml").write_text(ARMS)
    outputs = [
        run(" ".join([command, *(flags for start, flags in FLAGS.items() if command.startswith(start))]))[0]
        for command in commands
    ]
    assert (folder / "runs/mine/model.safetensors").exists() and (folder / "runs/arms/report.html").exists()
    assert "Saved in runs/nexus-demo/closeness.json" in outputs[-1]


@pytest.mark.slow
def test_the_benchmarks_of_the_readme(run, hub: HubServer, tmp_path, monkeypatch):
    """The last command of the README, with real tasks of lm-eval on stand-ins of their data."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install '.[eval]'")
    _, folder = run("mkdir -p runs")
    if not (folder / "runs/nexus-demo").exists():
        run("hf-nexus train demo " + FLAGS["torchrun"])
    tasks = Path(lm_eval.__path__[0], "tasks/mmlu/default").glob("mmlu_*.yaml")
    subjects = sorted(yaml.safe_load(task.read_text())["dataset_name"] for task in tasks)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    upload_benchmarks(hub, tmp_path / "data", subjects)
    run(readme_commands()[-1])
    card = (folder / "runs/nexus-demo/README.md").read_text()
    assert "| GSM8K |" in card and "| MMLU |" in card


@pytest.mark.slow
def test_finetune_trains_and_resumes(run):
    for command, step in zip(COMMANDS["finetune.py"][:2], (40, 60), strict=True):
        _, folder = run(command)
        assert json.loads((folder / "runs/finetune/trainer_state.json").read_text())["global_step"] == step
        results = json.loads((folder / "runs/finetune/all_results.json").read_text())
        assert results["eval_loss"] < 5  # 5.95 = log(384) untrained
    assert (folder / "runs/finetune/README.md").exists()


@pytest.mark.slow
def test_finetune_trains_on_a_mixture(run):
    _, folder = run(COMMANDS["finetune.py"][2])
    results = json.loads((folder / "runs/finetune-mixture/all_results.json").read_text())
    assert results["eval_code_loss"] < 5 and results["eval_records_loss"] < 5


@pytest.mark.slow
def test_the_plan_of_3b(run):
    stdout, _ = run(COMMANDS["pretrain_3b.py"][0])
    text = " ".join(stdout.split())
    assert "2,969,742,336" in text  # parameters, counted on the meta device
    for source in load_config("3b")["data"]["sources"]:
        assert source in text


@pytest.mark.slow
def test_the_demo_with_a_flag(run):
    _, folder = run(COMMANDS["pretrain_3b.py"][1])
    assert json.loads((folder / "runs/nexus-demo/trainer_state.json").read_text())["global_step"] > 100
    assert "inner_lr: 0.1" in (folder / "runs/nexus-demo/nexus.yaml").read_text()
    assert (folder / "runs/nexus-demo/training.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_sft_lowers_the_loss_of_both_sources(run, packing):
    pytest.importorskip("trl")
    stdout, folder = run(COMMANDS["sft_with_trl.py"][packing])
    found = losses(stdout)
    assert set(found) == {"mathematics", "reasoning"}
    for name, (before, after) in found.items():
        assert after < before - 1, name
    assert (folder / ("runs/sft-packed" if packing else "runs/sft") / "model.safetensors").exists()


@pytest.mark.slow
def test_plain_accelerate_lowers_every_loss(run):
    found = losses(run(COMMANDS["plain_accelerate.py"][0])[0])
    assert set(found) == {"code", "mathematics", "reasoning"}
    for name, (before, after) in found.items():
        assert after < before - 0.3, name


@pytest.mark.slow
def test_plain_accelerate_starts_equal_on_two_processes(run):
    alone, longer, two = [losses(run(command)[0]) for command in COMMANDS["plain_accelerate.py"]]
    for name, (before, after) in alone.items():
        assert longer[name][0] == two[name][0] == before, name  # the same model and text
        assert longer[name][1] < after, name
        assert two[name][1] < before - 0.3, name
    assert two != alone  # the second process has other rows


@pytest.mark.slow
def test_compare(run):
    _, folder = run(COMMANDS["compare.py"][0])
    report = (folder / "runs/compare/report.md").read_text()
    pictures = {path.name for path in (folder / "runs/compare").glob("*.png")}
    assert len(pictures) == 6 and all(name in report for name in pictures)
