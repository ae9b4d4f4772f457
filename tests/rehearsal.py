"""
Rehearse the large configurations whole, on stand-ins of the repositories that they name.

    python -m tests.rehearsal [130m 300m 1b 3b] [--folder runs/rehearsal]

For each configuration, `recipes/pretrain_3b.py` runs as a user would run it: the plan, training that is killed after a
checkpoint, the resumed run, the pushed model. `3b` also trains on two processes.

Reduced are the width and depth of the model, the steps (6), the rows of a micro-batch (1) and their length: 512
tokens, because the logits of 4096 tokens x 49152 entries take 2.4 GB. The device is a CPU, which computes in float32.
Everything else is the configuration's: sources, streams and stages, tokenizer and vocabulary, optimizer and schedule,
8 inner steps, 512 held-out documents of each source, and the processes of the data loader.
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
from contextlib import ExitStack
from pathlib import Path

from tests.support.hub.server import ALICE, HubServer
from tests.support.hub.stand_ins import upload_stand_ins

CONFIGS = ("130m", "300m", "1b", "3b")
SOURCES = ("text", "mathematics", "code", "reasoning", "books", "word_problems")
RECIPE = "recipes/pretrain_3b.py"
WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS = {
    "sequence_length": 512,
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
    """Run a Python command, and kill it and its children as soon as `path` exists."""
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output)
        while process.poll() is None and not path.exists():
            time.sleep(0.05)
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    if not path.exists():
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()}")


def descendants(pid: int) -> list[int]:
    """A process and its children, parents first. Launchers start their workers in sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(more for child in found for more in descendants(child))]


def rehearse(config: str, ranks: int, hub: HubServer, folder: Path, environment: dict[str, str]) -> None:
    """Plan, train, kill, resume, push and load one configuration."""
    name = config if ranks == 1 else f"{config}-{ranks}"
    repo_id, output = f"alice/nexus-{name}", folder / name
    options = ["--config", config, "--output_dir", str(output), *flags(WIDTH, STEPS, DEVICE)]
    train = [RECIPE, *options, "--push_to_hub", "True", "--hub_model_id", repo_id]
    if ranks > 1:
        train = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *train]
    started = time.monotonic()
    assert "tokens" in run([RECIPE, "--config", config, "--dry_run"], environment)
    run_until(output / "checkpoint-3", train, environment, folder / f"{name}.log")
    resumed = run([*train, "--resume_from_checkpoint", "last"], environment)
    (folder / f"{name}-resumed.log").write_text(resumed)
    assert "step 4/6" in resumed and "step 1/6" not in resumed, resumed
    check_repository(hub.files(repo_id))
    loaded = run(["-c", _LOAD, repo_id], environment)
    print(f"{name}: {time.monotonic() - started:.0f} s, {loaded.strip()}", flush=True)


def check_repository(files: dict[str, bytes]) -> None:
    """The pushed repository has the model and a card that shows the losses of all sources, before and after."""
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(files), sorted(files)
    evaluations = json.loads(files["run_summary.json"])["evaluations"]
    losses = {row["name"]: (row["first_loss"], row["last_loss"]) for row in evaluations}
    for source in SOURCES:
        assert all(isinstance(loss, float) for loss in losses[source]), losses
        assert source in files["README.md"].decode(), f"the card does not name {source}"


def main(argv: list[str] | None = None) -> None:
    """Rehearse the named configurations, or all."""
    parser = argparse.ArgumentParser(description="Rehearse the large configurations on stand-ins of their data.")
    parser.add_argument("configs", nargs="*", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--folder", type=Path, help="Keep the runs and the Hub in this folder.")
    options = parser.parse_args(argv)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(HubServer(folder / "hub"))
        upload_stand_ins(hub, folder / "stand_ins")
        told = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ALICE, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
        for config in options.configs:
            for ranks in (1, 2) if config == "3b" else (1,):
                rehearse(config, ranks, hub, folder, {**os.environ, **told})


if __name__ == "__main__":
    main()
