"""A scenario of two ranks: the bytes that a rank holds and gathers under FSDP2."""

import gc
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.support.tiny import VOCAB, tiny_llama
from tests.trainer.distributed.fsdp_worker import Between, make

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
FLAGS = {**SHAPE, "num_key_value_heads": 2, "vocab_size": VOCAB}


def held() -> int:
    """Bytes of all tensors of this process. The profiler misses frees in the threads of gloo."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), DTensor)]
    storages = [t.untyped_storage() for t in found if t.device.type == "cpu" and t.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main(out: Path) -> dict[str, int]:
    before = held()
    trainer = make(out, tiny_llama(tie_word_embeddings=True, **FLAGS), max_steps=2)
    between, gathered = [], []
    trainer.add_callback(Between(lambda model: between.append(held() - before)))

    def note(module: torch.nn.Module, *_: object) -> None:
        whole = {id(p): p.nbytes for p in trainer.model.parameters() if not isinstance(p, DTensor)}
        gathered.append(sum(whole.values()))

    for module in trainer.model.modules():
        if isinstance(module, LlamaDecoderLayer):
            module.self_attn.register_forward_hook(note)
            module.self_attn.register_full_backward_pre_hook(note)
    trainer.train()
    return {"held": between[-1], "gathered": max(gathered)}
