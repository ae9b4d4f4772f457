"""
Trains tiny models in every setting that changes the numbers, and prints a hash of the weights and of the log of each.

    python -m tests.trajectories              # all settings
    python -m tests.trajectories lora resume  # some of them

Run it before and after a change that must not change what is trained, and compare the output. The hashes hold for one
machine and one set of library versions. The script uses only the public names of the package.
"""

import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from hf_nexus import MixtureConfig, NexusConfig, NexusTrainer, load_mixture

ROOT = Path(__file__).parents[1]
VOCAB, LENGTH = 320, 16
WEIGHTS = {"text": 0.5, "code": 0.3, "math": 0.2}
STAGES = [{"until": 0.5, "weights": WEIGHTS}, {"until": 1.0, "weights": {"text": 0.1, "code": 0.1, "math": 0.8}}]
# Log entries that depend on the clock.
CLOCK = ("runtime", "per_second", "mfu", "total_flos")


# ---- Models and data ----


def llama(seed: int = 0, dropout: float = 0.1) -> LlamaForCausalLM:
    """A Llama of about 20k parameters with dropout, whose results depend on the random states."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def lora() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    model = llama()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))


def table(rows: int, seed: int) -> Dataset:
    """Rows of `LENGTH` tokens. Each source has its own frequent tokens, and some rows end in ignored labels."""
    rng = random.Random(seed)
    ids = [[(rng.randrange(VOCAB // 4) + seed * 70) % VOCAB for _ in range(LENGTH)] for _ in range(rows)]
    labels = [row[: LENGTH - i % 5] + [-100] * (i % 5) for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("torch")


def tables() -> dict[str, Dataset]:
    return {"text": table(40, 0), "code": table(32, 1), "math": table(24, 2)}


def streams() -> dict[str, Any]:
    return {name: rows.to_iterable_dataset(3) for name, rows in tables().items()}


def held_out() -> dict[str, Dataset]:
    return {"text": table(6, 0), "code": table(5, 1), "law": table(4, 3)}


def documents(folder: Path) -> dict[str, Path]:
    """Three files with documents of random words, each with different letters."""
    files = {}
    for name, letters in (("text", "abcd"), ("code", "1234"), ("law", "+-*/")):
        rng = random.Random(name)
        texts = [" ".join("".join(rng.choices(letters, k=4)) for _ in range(rng.randrange(60))) for _ in range(50)]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that is trained on one line."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["abcd 1234 abab 1212"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def mixture(folder: Path, streaming: bool) -> Any:
    """A mixture from `load_mixture`: packed, with held-out rows and an OOD source."""
    files = documents(folder)
    train = {name: {"path": str(files[name]), "eval_rows": 6, "streaming": streaming} for name in ("text", "code")}
    weights = {"text": 0.6, "code": 0.4} if streaming else {}
    for name, weight in weights.items():
        train[name]["weight"] = weight
    sources = {**train, "law": {"path": str(files["law"]), "role": "ood"}}
    config = MixtureConfig.from_dict({"sources": sources, "sequence_length": LENGTH})
    return load_mixture(config, tokenizer(), cache_dir=folder / "cache")


# ---- Runs ----


def make(folder: Path, data: Any, model: torch.nn.Module | None = None, evaluate: bool = True, **config: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    processing = {"processing_class": tokenizer()} if hasattr(data, "config") else {}
    evaluation = {"eval_dataset": held_out()} if evaluate and not processing else {}
    set_seed(0)
    args = NexusConfig(**{**defaults, **config})
    trainer = NexusTrainer(llama() if model is None else model, args, train_dataset=data, **evaluation, **processing)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(trainer: Any, resume: str | None = None) -> tuple[str, str]:
    """Hashes of the weights and of the log after training."""
    trainer.train(resume_from_checkpoint=resume)
    digest = hashlib.sha256()
    for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        digest.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16], log_hash(trainer.state.log_history)


def log_hash(history: Sequence[dict[str, Any]]) -> str:
    entries = [{k: v for k, v in entry.items() if not k.endswith(CLOCK)} for entry in history]
    text = json.dumps([sorted(entry.items()) for entry in entries], default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def simple(data: Callable[[], Any], model: Callable[[], Any] = llama, **config: Any) -> Callable[[Path], Any]:
    """A setting that is one run."""
    return lambda folder: trained(make(folder, data(), model(), **config))


def resumed(data: Callable[[], Any], **config: Any) -> Callable[[Path], Any]:
    """A setting that resumes from a checkpoint in the middle of an epoch, with another initial model."""

    def run(folder: Path) -> tuple[str, str]:
        saving = {"save_strategy": "steps", "save_steps": 4, **config}
        whole = trained(make(folder, data(), **saving))
        again = trained(make(folder, data(), llama(seed=7), **saving), str(folder / "out" / "checkpoint-4"))
        assert again[0] == whole[0], "the resumed run ended elsewhere"
        return again

    return run


def pretrain(folder: Path) -> tuple[str, str]:
    """The recipe from a YAML, in another process."""
    files = documents(folder)
    tokenizer().save_pretrained(folder / "tokenizer")
    model = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    training = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_on_start": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "output_dir": str(folder / "out"),
    }
    sources = {name: {"path": str(files[name]), "eval_rows": 6} for name in ("text", "code")}
    content = {
        "model": {**model, "num_attention_heads": 2, "tokenizer": str(folder / "tokenizer")},
        "data": {"sequence_length": LENGTH, "sources": {**sources, "law": {"path": str(files["law"]), "role": "ood"}}},
        "training": training,
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(content))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home")}
    command = [sys.executable, str(ROOT / "recipes" / "pretrain_3b.py"), "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()[:16]
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    return weights, log_hash(state["log_history"])


SETTINGS: dict[str, Callable[[Path], Any]] = {
    "plain dataset": simple(lambda: table(60, 0)),
    "mixture": simple(tables, mixture_weights=WEIGHTS),
    "mixture by rows": simple(tables, source_schedule="stratified", num_train_epochs=2, max_steps=-1),
    "stages": simple(tables, mixture_weights=STAGES),
    "streams": simple(streams, mixture_weights=WEIGHTS),
    "streams with workers": simple(streams, mixture_weights=STAGES, dataloader_num_workers=2),
    "packed documents": lambda folder: trained(make(folder, mixture(folder, streaming=False))),
    "streamed documents": lambda folder: trained(make(folder, mixture(folder, streaming=True))),
    "pretrain from YAML": pretrain,
    "lora": simple(tables, lora, mixture_weights=WEIGHTS),
    "muon": simple(tables, mixture_weights=WEIGHTS, matrix_optimizer="muon", optim_args="muon_lr=0.01"),
    "nexus off": simple(tables, mixture_weights=WEIGHTS, nexus=False),
    "nexus off, plain": simple(lambda: table(60, 0), nexus=False),
    "random": simple(tables, mixture_weights=WEIGHTS, inner_direction="random"),
    "gamma 0": simple(tables, mixture_weights=WEIGHTS, inner_lr=0.0),
    "inner_lr follows": simple(tables, mixture_weights=WEIGHTS, inner_lr=0.2, inner_lr_schedule="follow"),
    "offloaded snapshot": simple(tables, mixture_weights=WEIGHTS, snapshot_device="cpu"),
    "cosines": simple(tables, mixture_weights=WEIGHTS, gradient_cosine_steps=2),
    "resume": resumed(tables, mixture_weights=WEIGHTS, num_train_epochs=3, max_steps=-1),
    "resume, streams": resumed(streams, mixture_weights=STAGES, dataloader_num_workers=2),
    "resume, nexus off": resumed(tables, mixture_weights=WEIGHTS, nexus=False),
}
# On two processes. FSDP2 shards on accelerators only, so its processes pretend to have some.
RANKED: dict[str, dict[str, Any]] = {
    "global, 2 ranks": {"inner_sync": "global"},
    "local, 2 ranks": {"inner_sync": "local"},
    "nexus off, 2 ranks": {"nexus": False},
    "streams, 2 ranks": {"inner_sync": "global"},
    "fsdp2, 2 ranks": {
        "fsdp": True,
        "fsdp_config": {
            "fsdp_version": 2,
            "state_dict_type": "FULL_STATE_DICT",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    },
}


def run_ranked(names: Sequence[str], out: Path) -> None:
    """Run all settings in one of the processes. The first process writes the hashes of all ranks."""
    found = {}
    for name in names:
        config = {"mixture_weights": WEIGHTS, **RANKED[name]}
        NexusConfig(output_dir=str(out), use_cpu=True, report_to="none").device  # noqa: B018  # sets up the state
        kind = DistributedType.MULTI_GPU if "fsdp" in config else DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = kind
        data = streams() if name.startswith("streams") else tables()
        trainer = make(out / name, data, llama(dropout=0.0), evaluate="fsdp" not in config, **config)
        hashes = trained(trainer)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, hashes)
        found[name] = everyone
        # As the last owner of the process group, DDP would wait forever for the threads of the group.
        del trainer
        gc.collect()
    if torch.distributed.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(names: Sequence[str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["-m", "tests.trajectories", "--ranked", str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def main(argv: Sequence[str]) -> None:
    """Run the settings whose names contain one of the words of the command line, or all."""
    disable_progress_bar()
    if argv[:1] == ["--ranked"]:
        run_ranked(argv[2:], Path(argv[1]))
        return
    names = [n for n in (*SETTINGS, *RANKED) if not argv or any(word in n for word in argv)]
    for name in names:
        if name in SETTINGS:
            with tempfile.TemporaryDirectory() as folder:
                weights, log = SETTINGS[name](Path(folder))
            print(f"{name:24} weights {weights}  log {log}", flush=True)
    ranked = [name for name in names if name in RANKED]
    if ranked:
        with tempfile.TemporaryDirectory() as folder:
            for name, ranks in launch(ranked, Path(folder)).items():
                assert ranks[0][0] == ranks[1][0], f"{name}: the ranks hold other weights"
                print(f"{name:24} weights {ranks[0][0]}  log {ranks[0][1]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
