"""Run on CPU processes: FSDP2 scenarios. Each rank writes its results to `<out>/rank<r>.json`."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, TrainerCallback

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.tensors import shard
from tests.support.tiny import Rows, two_layers
from tests.trainer.distributed.node_worker import NODE, POISONED, ByGroup, Collectives
from tests.trainer.distributed.worker import poison, sources

HYBRID = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)


SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 4,
    "max_steps": 3,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def launched_as(args: NexusConfig, kind: DistributedType) -> NexusConfig:
    """
    The arguments of a launch of this kind. Accelerate shards on accelerators only. On a CPU, it would use DDP without
    a message.
    """
    args.device  # noqa: B018  # sets up the state
    PartialState._shared_state["distributed_type"] = kind
    return args


def make(
    out: Path, model: Any = None, fsdp: bool = True, state_dict: str = "FULL_STATE_DICT", **config: Any
) -> NexusTrainer:
    """A trainer under FSDP2, or under DDP for comparison."""
    wrap = {"fsdp_version": 2, "state_dict_type": state_dict, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    own: dict[str, Any] = {"output_dir": str(out), "per_device_train_batch_size": 2, "logging_steps": 1}
    own |= {"fsdp": True, "fsdp_config": wrap} if fsdp else {}
    kind = DistributedType.MULTI_GPU if fsdp else DistributedType.MULTI_CPU
    args = launched_as(NexusConfig(**{**SETTINGS, **own, **config}), kind)
    return NexusTrainer(model or llama(), args, train_dataset=sources(), eval_dataset={"text": Rows(8, 0)})


def llama(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A Llama with tied embeddings and sizes that do not divide by two or four ranks."""
    return two_layers(seed, tie_word_embeddings=True, intermediate_size=33, **overrides)


def lora(seed: int = 0) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))


def weights(trainer: NexusTrainer) -> list[float]:
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in full]).tolist()


def shards(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([shard(p).detach().reshape(-1).clone() for p in model.parameters()])


class Between(TrainerCallback):
    """Calls a function between outer steps."""

    def __init__(self, call):
        self.call = call

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.call(model)


def trained(trainer: NexusTrainer, **kwargs: Any) -> list[float]:
    trainer.train(**kwargs)
    return weights(trainer)


def interrupted(out: Path) -> dict[str, Any]:
    """Interrupt the second window between forward and backward pass. Shards and evaluation must be unchanged."""
    trainer = make(out)
    before: list[Any] = []
    trainer.add_callback(Between(lambda model: before.append((shards(model), trainer.evaluate()["eval_loss"]))))
    compute_loss, calls = trainer.compute_loss, [0]

    def broken(model, *args, **kwargs):
        result = compute_loss(model, *args, **kwargs)
        calls[0] += model.training
        if calls[0] == 6:
            raise KeyboardInterrupt
        return result

    trainer.compute_loss = broken
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    trainer.compute_loss = compute_loss
    start, loss = before[-1]
    same = torch.equal(start, shards(trainer.model))
    return {"steps": len(before), "restored": same, "loss": loss, "loss_after": trainer.evaluate()["eval_loss"]}


def resumed(out: Path, state_dict: str, **config: Any) -> dict[str, Any]:
    saving = {"state_dict": state_dict, "save_strategy": "steps", "save_steps": 3, "max_steps": 5, **config}
    trainer = make(out, **saving)
    whole, saved = trained(trainer), saves_whole(trainer, out)
    again = make(out / "again", llama(seed=5), **saving)
    resume = out / "checkpoint-3"
    found = {"whole": whole, "saved": saved, "again": trained(again, resume_from_checkpoint=str(resume))}
    return found | {"files": sorted(path.name for path in resume.iterdir())}


def saves_whole(trainer: NexusTrainer, out: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the model that the trainer saves has its weights, in `dtype`."""
    trainer.save_model()
    dist.barrier()
    saved = LlamaForCausalLM.from_pretrained(out)
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trainer.model.named_parameters()}
    return all(torch.equal(p, full[name].to(dtype)) for name, p in saved.named_parameters())


def narrow(out: Path) -> dict[str, Any]:
    """A checkpoint of bfloat16, and the same weights in float32 with `bf16`. The first is saved in bfloat16."""
    trainer = make(out / "narrow", llama(dtype=torch.bfloat16), save_dtype="bfloat16")
    narrow, wide = trained(trainer), trained(make(out, llama(dtype=torch.bfloat16).float(), bf16=True))
    return {"narrow": narrow, "wide": wide, "saved": saves_whole(trainer, out / "narrow", torch.bfloat16)}


def between_steps(out: Path) -> list[float]:
    """Evaluate and generate after every step."""
    trainer = make(out)

    def look(model):
        trainer.evaluate()
        with torch.no_grad():
            model.generate(input_ids=torch.ones(1, 2, dtype=torch.long), max_new_tokens=3, pad_token_id=0)

    trainer.add_callback(Between(look))
    return trained(trainer)


def scalar_reductions(out: Path) -> int:
    """Number of reductions by Nexus in one outer step."""
    trainer, real, sizes = make(out, max_steps=1), dist.all_reduce, []

    def counted(tensor, *args, **kwargs):
        if kwargs.get("group") is not None and tensor.numel() == 1:
            sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    trainer.train()
    dist.all_reduce = real
    return len(sizes)


def main(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ddp": trained(make(out, fsdp=False)),
        "fsdp": trained(make(out)),
        "muon": trained(make(out, matrix_optimizer="muon")),
        "muon_ddp": trained(make(out, matrix_optimizer="muon", fsdp=False)),
        "lora_ddp": trained(make(out, lora(), fsdp=False)),
        "lora": trained(make(out, lora())),
        "between_steps": between_steps(out),
        "scalar_reductions": scalar_reductions(out),
        "interrupted": interrupted(out),
    }
    return found | {"SHARDED_STATE_DICT": resumed(out / "sharded", "SHARDED_STATE_DICT")}


def further(out: Path) -> dict[str, Any]:
    """The scenarios of slow tests."""
    return {
        "ddp": trained(make(out, fsdp=False)),
        "fsdp": trained(make(out)),
        "cpu_copy": trained(make(out, snapshot_device="cpu")),
        "random": trained(make(out, inner_direction="random")),
        "smoothed": trained(make(out, label_smoothing_factor=0.1)),
        "smoothed_ddp": trained(make(out, label_smoothing_factor=0.1, fsdp=False)),
        "bfloat16": narrow(out),
        "FULL_STATE_DICT": resumed(out / "full", "FULL_STATE_DICT"),
    }


def four_ranks(out: Path) -> dict[str, Any]:
    return {
        "ddp": trained(make(out, fsdp=False)),
        "node": node(out),
        "hsdp": trained(make(out, parallelism_config=HYBRID)),
    }


def muon(out: Path) -> dict[str, Any]:
    """Each shard has two of three rows, or one."""
    return {
        "ddp": trained(make(out, lora(), matrix_optimizer="muon", fsdp=False)),
        "hsdp": trained(make(out, lora(), matrix_optimizer="muon", parallelism_config=HYBRID)),
    }


def node(out: Path) -> dict[str, Any]:
    """Two paths of two ranks, the first of which takes no step in the second window, under DDP and FSDP2."""
    found: dict[str, Any] = {}
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        watch = ShardsByGroup()
        trainer = watch.trainer = make(out, fsdp=fsdp, **NODE)
        trainer.add_callback(watch)
        poison(trainer, 1, POISONED)
        with Collectives(watch):
            found[name] = trained(trainer)
        found[f"{name}_sent"] = watch.found()["between"]
    try:
        make(out, inner_sync="node", node_size=1, parallelism_config=HYBRID).train()
    except ValueError as error:
        found["other_size"] = str(error)
    return found


def resumed_paths(out: Path) -> dict[str, Any]:
    """As `resumed`, with two paths of two ranks."""
    return {kind: resumed(out / kind, kind, **NODE) for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")}


class ShardsByGroup(ByGroup):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        pass  # shards are compared at the end
