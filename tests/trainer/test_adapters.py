"""Adapters on a frozen base in float32, in half precision, and in four bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from tests.support.tiny import VOCAB, Rows, tiny_llama

peft = pytest.importorskip("peft")
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def adapters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_on_a_frozen_base(make_trainer, sources, tmp_path, dtype):
    """Only adapters are copied, moved and saved. They resume bit for bit and merge into a model that can be loaded."""

    def adapted(seed: int) -> Any:
        base = tiny_llama(dtype=dtype)
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))

    model = adapted(0)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in base.values()} == {dtype}
    whole = make_trainer(sources, model, **SAVING)
    whole.train()
    snapshot = whole._walker.nexus._snapshot.values
    assert sum(copy.numel() for copy in snapshot) == model.get_nb_trainable_parameters()[0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)

    checkpoint = tmp_path / "out/checkpoint-2"
    assert not list(checkpoint.glob("model*")) and (checkpoint / "adapter_model.safetensors").exists()
    resumed = make_trainer(sources, adapted(1), output_dir=str(tmp_path / "again"), **SAVING)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(adapters(model), adapters(resumed.model))

    ids = Rows(2, 0).ids
    with torch.no_grad():
        expected, start = model(ids).logits.float(), tiny_llama(dtype=dtype)(ids).logits.float()
        whole.save_model()
        saved = peft.PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path / "out")
        assert torch.equal(saved(ids).logits.float(), expected)
        saved.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)(ids).logits.float()
    rounding = (expected - merged).norm() / (expected - start).norm()
    assert rounding < (1e-4 if dtype == torch.float32 else 0.2)


def test_prompts_that_are_trained_as_adapters(make_trainer, sources):
    """peft does not wrap the modules of such a base, here one whose body is not called `model`."""
    shape = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(GPT2LMHeadModel(GPT2Config(**shape)), prompts)
    start = adapters(model)
    make_trainer(sources, model, max_steps=1).train()
    assert start.numel() == 2 * 16 and not torch.equal(adapters(model), start)


def test_adapters_on_a_base_of_four_bits(make_trainer, sources, tmp_path):
    """QLoRA: the base stays as bitsandbytes made it, and the adapters train as on the same base in float32."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")

    def load(**options: Any) -> Any:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **options)

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(model, lora)

    def quantized() -> Any:
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return peft.prepare_model_for_kbit_training(load(quantization_config=four_bits), False)

    def train(model: Any, name: str, resume: Path | None = None) -> torch.Tensor:
        trainer = make_trainer(sources, model, output_dir=str(tmp_path / name), **SAVING)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        assert sum(p.numel() for p in trainer._walker.nexus.params) == model.get_nb_trainable_parameters()[0]
        return adapters(model)

    model = adapted(quantized())
    packed = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 14  # every matrix of both layers
    start = adapters(model)
    trained = train(model, "whole")
    assert all(torch.equal(p, packed[name]) for name, p in model.named_parameters() if name in packed)
    checkpoint = tmp_path / "whole/checkpoint-2"
    assert not list(checkpoint.glob("model*")) and (checkpoint / "adapter_model.safetensors").exists()
    assert torch.equal(trained, train(adapted(quantized()), "resumed", checkpoint))

    plain = load()
    for name, linear in quantized().named_modules():
        if isinstance(linear, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    unpacked = train(adapted(plain), "unpacked")
    assert (trained - unpacked).norm() < 1e-3 * (trained - start).norm()


def test_adapters_that_follow_in_shards_leave_no_empty_file(make_trainer, sources, tmp_path, monkeypatch):
    trainer = make_trainer(sources, peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    monkeypatch.setattr(type(trainer), "_weights_follow", True)
    trainer.save_model(str(tmp_path / "shards"))
    assert (tmp_path / "shards/adapter_config.json").exists()
    assert not list((tmp_path / "shards").glob("*.safetensors"))
