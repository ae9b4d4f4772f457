"""
Rehearse the large configurations whole, on stand-ins of the repositories that they name.

    python -m tests.rehearsal [130m 300m 1b 3b paper]

For each configuration, `recipes/pretrain_3b.py` runs as a user would run it, only with a narrow model, 6 steps, one
row per micro-batch and on the CPU: the plan, training that is killed after a checkpoint, the resumed run, the pushed
model. `3b` also trains on two processes. `paper` is the comparison `recipes/paper.yaml`, with all of its arms at one
seed and short minima searches: tuning, runs, searches, report, and pushed cards that compare.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from hf_nexus.pretrain.sections import load_config
from tests.support.hub.server import ALICE, HubServer
from tests.support.hub.stand_ins import upload_stand_ins

CONFIGS = ("130m", "300m", "1b", "3b", "paper")
RECIPE = "recipes/pretrain_3b.py"
# Width, steps and device. Everything else is the configuration's.
WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS = {
    "max_steps": 6,
    "warmup_steps": 1,
    "lr_scheduler_kwargs": '{"num_decay_steps": 2, "decay_type": "1-sqrt", "min_lr_ratio": 0.0}',
    "eval_steps": 3,
    "save_steps": 3,
    "logging_steps": 1,
}
DEVICE = {
    "use_cpu": True,
    "accelerators": 0,
    "bf16": False,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
}
_LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
assert len(tokenizer) == model.config.vocab_size == 49152, len(tokenizer)
output = model.generate(**tokenizer("the history", return_tensors="pt"), max_new_tokens=3)
print("from_pretrained:", repr(tokenizer.decode(output[0])))
"""


def flags(*groups: dict[str, object]) -> list[str]:
    """Command-line flags of the given fields."""
    return [text for group in groups for name, value in group.items() for text in (f"--{name}", str(value))]


def run(command: Sequence[str], environment: dict[str, str]) -> str:
    """Run a Python command to its end and return its output; exit with the output if it fails."""
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def run_until(path: Path, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Run a Python command and kill it as soon as `path` exists."""
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output)
        while process.poll() is None and not path.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not path.exists():
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()}")


def rehearse(config: str, hub: HubServer, folder: Path, environment: dict[str, str]) -> None:
    """Plan, train, kill, resume, push and load one configuration."""
    repo_id, output = f"alice/nexus-{config}", folder / config
    options = [
        "--config",
        config,
        "--output_dir",
        str(output),
        *flags(WIDTH, STEPS, DEVICE),
        *("--push_to_hub", "True", "--hub_model_id", repo_id),
    ]
    train = [RECIPE, *options]
    started = time.monotonic()
    assert "tokens" in run([RECIPE, "--config", config, "--dry_run"], environment)
    run_until(output / "checkpoint-3", train, environment, folder / f"{config}.log")
    resumed = run([*train, "--resume_from_checkpoint", "last"], environment)
    assert "step 4/6" in resumed and "step 1/6" not in resumed, resumed
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(hub.files(repo_id)), sorted(hub.files(repo_id))
    card = hub.files(repo_id)["README.md"].decode()
    for source in ("text", "mathematics", "code", "reasoning", "books", "word_problems"):
        assert source in card, f"the card does not name {source}"
    loaded = run(["-c", _LOAD, repo_id], environment)
    if config == "3b":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        run([*launch, *train, "--output_dir", f"{output}-2", "--hub_model_id", f"{repo_id}-2"], environment)
    print(f"{config}: {time.monotonic() - started:.0f} s, {loaded.strip()}", flush=True)


def rehearse_comparison(hub: HubServer, folder: Path, environment: dict[str, str]) -> None:
    """Run all arms of the paper's comparison at one seed, with one trial each and few held-out rows, and push them."""
    config = yaml.safe_load(Path("recipes/paper.yaml").read_text(encoding="utf-8"))
    device = {name: value for name, value in DEVICE.items() if name != "accelerators"}
    decay = json.loads(str(STEPS["lr_scheduler_kwargs"]))
    for settings in ({"tuning": config["tuning"]["grid"]}, *config["arms"].values()):
        for name, values in settings.get("tuning", {}).items():
            settings["tuning"][name] = values[:1]
    sources = load_config(config["base"])["data"]["sources"]
    for source in sources.values():  # over a vocabulary of 49,152, evaluation takes most of the time
        source |= {"max_tokens": 1000} if source.get("role") == "ood" else {"eval_rows": 8}
    config |= {
        "output_dir": str(folder / "paper"),
        "seeds": [1],
        "push_to": "alice/paper",
        "model": {**WIDTH, "accelerators": 0},
        "data": {"sequence_length": 64, "sources": sources},
        "training": {**STEPS, **device, "lr_scheduler_kwargs": decay, "per_device_eval_batch_size": 8},
        "train_sample_rows": 2,
    }
    config["tuning"]["max_steps"] = 3
    config["minima"] |= {"max_steps": 2, "eval_steps": 1, "eval_rows": 2, "grid": 3}
    path, started = folder / "paper.yaml", time.monotonic()
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    output = run(["-m", "hf_nexus.cli", "compare", str(path)], environment)
    assert "runs: 0 of 16 done, 16 to do" in output, output
    for arm in config["arms"]:
        files = hub.files(f"alice/paper-{arm}-seed-1")
        assert {"model.safetensors", "record.json"} <= set(files), sorted(files)
        compared = arm.removeprefix("nexus-")
        assert compared == arm or f"compare with {compared}" in files["README.md"].decode(), f"the card of {arm}"
    loaded = run(["-c", _LOAD, "alice/paper-nexus-muon-cosine-skills-seed-1"], environment)
    print(f"paper: {time.monotonic() - started:.0f} s, {loaded.strip()}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Rehearse the named configurations, or all."""
    parser = argparse.ArgumentParser(description="Rehearse the large configurations on stand-ins of their data.")
    parser.add_argument("configs", nargs="*", choices=[*CONFIGS, "all"], default="all")
    named = parser.parse_args(argv).configs
    configs = CONFIGS if "all" in named else named
    with tempfile.TemporaryDirectory() as name, HubServer(Path(name, "hub")) as hub:
        folder = Path(name)
        upload_stand_ins(hub, folder / "stand_ins")
        told = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ALICE, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
        for config in configs:
            if config == "paper":
                rehearse_comparison(hub, folder, {**os.environ, **told})
            else:
                rehearse(config, hub, folder, {**os.environ, **told})


if __name__ == "__main__":
    main()
