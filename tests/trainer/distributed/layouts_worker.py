"""Scenarios of four ranks: parameters that are sharded in different ways, and models that transformers shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from transformers import LlamaForCausalLM

from hf_nexus import Nexus, NexusConfig, NexusTrainer
from hf_nexus.trainer.distributed import PathGroups, Shards
from tests.support.tiny import VOCAB, Rows, two_layers
from tests.trainer.distributed.fsdp_worker import SETTINGS, launched_as
from tests.trainer.distributed.worker import WEIGHTS, sources


def llama() -> torch.nn.Module:
    return two_layers(num_attention_heads=4, num_key_value_heads=4)


def experts() -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


def adapters(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))


def make(out: Path, model: torch.nn.Module, rows: int, **config: Any) -> NexusTrainer:
    """A trainer of a global batch of 8 rows, for any number of ranks."""
    own = {"output_dir": str(out), "per_device_train_batch_size": rows, "mixture_weights": WEIGHTS, "logging_steps": 3}
    args = NexusConfig(**{**SETTINGS, **own, **config})
    if any(isinstance(p, DTensor) for p in model.parameters()):
        args = launched_as(args, DistributedType.MULTI_GPU)
    return NexusTrainer(model, args, train_dataset=sources(True, 3))


def trained(model: torch.nn.Module) -> list[float]:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad]
    return torch.cat([p.detach().reshape(-1) for p in whole]).tolist()


def at_load(out: Path, build: Any, sizes: dict[str, int], wrap: Any = None, **config: Any) -> NexusTrainer:
    """Train a model that transformers shards when it loads it."""
    from transformers.distributed import DistributedConfig

    model = build()
    if dist.get_rank() == 0:
        model.save_pretrained(out / "start")
    dist.barrier()
    model = type(model).from_pretrained(out / "start", distributed_config=DistributedConfig(**sizes))
    trainer = make(out, wrap(model) if wrap else model, 8 * sizes.get("tp_size", 1) // 4, **config)
    trainer.train()
    return trainer


def any_layout(direction: str) -> dict[str, Any]:
    """One window of one step over parameters in five layouts, one of whose gradients is a part of a sum."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    layouts = [(mesh, [Shard(0), Shard(1)]), (mesh, [Replicate(), Shard(0)]), (mesh["tensor"], [Shard(0)])]
    layouts += [(mesh, [Replicate(), Replicate()]), None]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 4, generator=generator) for _ in layouts]
    laid = [g if at is None else distribute_tensor(g, *at) for g, at in zip(gradients, layouts, strict=True)]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in laid]
    laid[3] = DTensor.from_local(gradients[3] / 2, mesh, [Partial(), Replicate()], run_check=False)
    groups = PathGroups("global")
    shards = Shards(params, groups)
    keys = [(0, part) for part in shards.parts]
    nexus = Nexus(params, 0.5, direction=direction, norm=shards.norm, key=keys)
    with nexus.window():
        for p, g in zip(params, laid, strict=True):
            p.grad = g
        norm = nexus.inner_step()
        moved = trained(torch.nn.ParameterList(params))
    found = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in params]
    whole = torch.cat([g.flatten() for g in gradients])
    return {
        "norms": [float(norm), float(whole.norm()), float(nexus.pseudo_gradient_norm)],
        "error": float((torch.cat([p.flatten() for p in found]) - whole / whole.norm()).abs().max()),
        "moved": moved,
    }


def main(out: Path) -> dict[str, Any]:
    return {direction: any_layout(direction) for direction in ("gradient", "random")}


def tensor(out: Path) -> dict[str, Any]:
    """FSDP2 with tensor parallelism."""
    saved = {"save_only_model": True, "save_strategy": "steps", "save_steps": 3}
    trainer = at_load(out, llama, {"tp_size": 2, "fsdp_size": 2}, **saved)
    return {
        "weights": trained(trainer.model),
        "saved": trained(LlamaForCausalLM.from_pretrained(out / "checkpoint-3")),
        "logs": trainer.state.log_history[-1],
        "eval_loss": trainer.evaluate(Rows(9, 0, pad=True))["eval_loss"],
        "tokens": trainer.meter.trained_tokens,
    }


def sharded(build: Any, sizes: dict[str, int], wrap: Any = None, **config: Any) -> Callable[[Path], list[float]]:
    return lambda out: trained(at_load(out, build, sizes, wrap, **config).model)


# The ways of transformers to shard a model, in addition to `tensor`.
SLOW = {
    "tensor only": sharded(llama, {"tp_size": 4}),
    "experts": sharded(experts, {"fsdp_size": 4, "ep_size": 2}),
    "hybrid": sharded(llama, {"dp_replicate_size": 2, "fsdp_size": 2}),
    "adapters": sharded(llama, {"fsdp_size": 4}, adapters),
    "muon": sharded(llama, {"tp_size": 2, "fsdp_size": 2}, matrix_optimizer="muon"),
}
