"""Checkpoints in 16 bits: trained in float32, computed in bfloat16, saved in a chosen type."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load, load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.hub.publisher import Publisher
from hf_nexus.hub.weights import convert_weights
from hf_nexus.trainer.precision import widen_weights
from tests.support.hub.runs import QUICK, REPO, SECONDS
from tests.support.hub.server import ALICE, HubServer
from tests.support.saved_weights import same, saved_weights
from tests.support.tiny import Rows, tiny_llama
from tests.trainer.test_mixin import weights

BF16 = torch.bfloat16
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type")
SETTINGS += ("report_to", "use_cpu", "disable_tqdm")


def types(model: Any) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


def float32(**shape: Any) -> torch.nn.Module:
    """The weights of a bfloat16 checkpoint in float32."""
    return tiny_llama(dtype=BF16, **shape).float()


# ---- What is trained, and in what it computes ----


@pytest.mark.parametrize("other", [NexusTrainer, Trainer])
@pytest.mark.parametrize("use", [NexusTrainer.train, NexusTrainer.evaluate, lambda t: t.predict(t.eval_dataset)])
def test_another_trainer_changes_no_type_of_the_first(make_trainer, sources, tmp_path, monkeypatch, other, use):
    """Without a type, autocast takes that of the device: float16 on CUDA, and bfloat16 on a CPU."""
    found, autocast = [], torch.autocast

    def note(*args, **kwargs):
        found.append(kwargs["dtype"])
        return autocast(*args, **kwargs)

    trainer = make_trainer(sources, tiny_llama(dtype=BF16), {"eval_dataset": sources["text"]}, max_steps=1)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    if other is NexusTrainer:
        args = NexusConfig(str(tmp_path), use_cpu=True, report_to="none", nexus=False)
    second = other(tiny_llama(), args, train_dataset=sources["text"])
    assert second.accelerator.mixed_precision == "no"
    monkeypatch.setattr(torch, "autocast", note)
    use(trainer)
    assert {*found} == {BF16} and second.accelerator.mixed_precision == "no"
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert not vars(AcceleratorState)["_shared_state"]  # that of all accelerators, which the arguments have emptied
    use(trainer)
    assert Trainer(tiny_llama(), args).accelerator.mixed_precision == "no"


def test_a_trainer_that_is_made_in_a_training_keeps_its_type(make_trainer, sources, tmp_path):
    made = []

    class Make(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=True, report_to="none")
            made.append(Trainer(tiny_llama(), args, eval_dataset=sources["text"]))

    make_trainer(sources, trainer_kwargs={"callbacks": [Make()]}, max_steps=1).train()
    assert made[0].accelerator.state.mixed_precision == made[0].accelerator.mixed_precision == "bf16"


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_16_bit_checkpoint_trains_as_in_float32(make_trainer, sources, dtype, tied, caplog):
    model = tiny_llama(dtype=dtype, tie_word_embeddings=tied)
    trainer = make_trainer(sources, model)
    size = sum(p.numel() for p in model.parameters())
    line = f"{size:,} trainable weights of {dtype} were made float32, which takes {2 * size:,} bytes more"
    assert line in caplog.text and "computes in bfloat16 (autocast)" in caplog.text
    assert types(model) == {torch.float32} and trainer.accelerator.mixed_precision == "bf16"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    wide = tiny_llama(dtype=dtype, tie_word_embeddings=tied).float()
    other = make_trainer(sources, wide, bf16=True)
    for one in (trainer, other):
        one.train()
    assert torch.equal(weights(trainer), weights(other))
    assert caplog.text.count("were made float32") == 1


@pytest.mark.parametrize("emulated", [False, True])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch, emulated):
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or not emulated

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    monkeypatch.setattr("hf_nexus.trainer.precision.is_bf16_available", lambda ignore_tpu: True)
    model, args = tiny_llama(dtype=BF16), SimpleNamespace(upcast_weights=True, bf16=False, mixed_precision="no")
    widen_weights(model, args, chosen=False)
    assert args.bf16 is not emulated and types(model) == {torch.float32}


def test_frozen_weights_stay_and_a_save_loads_in_float32(make_trainer, sources, tmp_path):
    model = tiny_llama(dtype=BF16)
    model.model.embed_tokens.requires_grad_(False)
    trainer = make_trainer(sources, model)
    trainer.train()
    assert model.model.embed_tokens.weight.dtype == BF16 and model.lm_head.weight.dtype == torch.float32
    trainer.save_model()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_chosen_type_is_kept(make_trainer, sources, freeze, caplog):
    model, wide = tiny_llama(dtype=BF16), float32()
    for one in (model, wide):
        one.model.embed_tokens.requires_grad_(not freeze)
    trainers = [make_trainer(sources, one, bf16=False) for one in (model, wide)]
    assert "computes in float32" in caplog.text
    for trainer in trainers:
        trainer.train()
    assert trainers[0].accelerator.mixed_precision == "no" and types(model) == {torch.float32}
    assert torch.equal(*map(weights, trainers))


@pytest.mark.parametrize("kind", [NexusConfig, TrainingArguments])
def test_given_arguments_are_not_changed_and_serve_again(sources, tmp_path, kind):
    given = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = kind(str(tmp_path), gradient_accumulation_steps=2, **given)
    before = args.to_json_string()
    for model, precision in ((tiny_llama(dtype=BF16), "bf16"), (float32(), "no"), (tiny_llama(dtype=BF16), "bf16")):
        trainer = NexusTrainer(model, args, train_dataset=sources)
        trainer.train()
        assert trainer.accelerator.mixed_precision == precision
        assert args.to_json_string() == before and trainer.args.bf16 == (precision == "bf16" or args.bf16)


def test_weights_that_may_not_be_widened_are_refused(make_trainer, sources):
    with pytest.raises(ValueError, match=r"weights of torch.bfloat16.*upcast_weights is off"):
        make_trainer(sources, tiny_llama(dtype=BF16), upcast_weights=False)
    make_trainer(sources, upcast_weights=False).train()


def test_weights_stay_without_the_update(make_trainer, sources):
    trainer = make_trainer(sources, model=tiny_llama(dtype=BF16), nexus=False)
    trainer.train()
    assert types(trainer.model) == {BF16} and trainer.accelerator.mixed_precision == "no"


@pytest.mark.parametrize("built", ["model", "model_init"])
def test_a_trainer_that_only_evaluates_keeps_the_weights(make_trainer, tmp_path, built):
    made: Any = tiny_llama(dtype=BF16) if built == "model" else lambda: tiny_llama(dtype=BF16)
    args = make_trainer(None, upcast_weights=False).args
    ours, base = NexusTrainer(args=args, **{built: made}), Trainer(tiny_llama(dtype=BF16), args)
    assert types(ours.model) == {BF16} and ours.accelerator.mixed_precision == "no"
    losses = [trainer.evaluate(Rows(6, 0))["eval_loss"] for trainer in (ours, base)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    ours.train_dataset = Rows(16, 0)
    with pytest.raises(ValueError, match="upcast_weights is off"):
        ours.train()


def test_weights_are_widened_once_there_is_training_data(make_trainer, caplog):
    class Own(NexusTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Rows(16, 0), 2)

    for kind, precision in ((NexusTrainer, "no"), (Own, "bf16")):  # it is that of the constructor
        trainer = make_trainer(None, tiny_llama(dtype=BF16), trainer_class=kind)
        assert trainer.accelerator.mixed_precision == precision
        trainer.train_dataset = Rows(16, 0)
        start = weights(trainer).float()
        trainer.train()
        assert types(trainer.model) == {torch.float32} and not torch.equal(weights(trainer), start)
        assert trainer.args.mixed_precision == precision


def test_weights_that_are_unfrozen_later_are_widened(make_trainer, sources):
    model = tiny_llama(dtype=BF16)
    model.model.embed_tokens.requires_grad_(False)
    trainer = make_trainer(sources, model)
    model.model.embed_tokens.requires_grad_(True)
    trainer.train()
    assert types(model) == {torch.float32}


def test_adapters_of_16_bits_are_widened_alone(make_trainer, sources):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(tiny_llama(dtype=BF16), lora, autocast_adapter_dtype=False)
    trainer = make_trainer(sources, model, save_dtype="bfloat16")
    trainer.train()
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, BF16)}
    trainer.save_model()
    saved = load_file(Path(trainer.args.output_dir, "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in saved.values()} == {BF16}


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"trainable_token_indices": [1, 2]}, True),
        ({"use_dora": True, "bias": "lora_only"}, True),
    ],
)
@pytest.mark.parametrize("bf16", [False, None, True])
def test_adapters_and_whole_modules_train_in_any_type(make_trainer, sources, more, kept, bf16):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more)
    model = peft.get_peft_model(tiny_llama(dtype=BF16), lora, autocast_adapter_dtype=False)
    trainer = make_trainer(sources, model, **({} if bf16 is None else {"bf16": bf16}))
    trainer.train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == ({BF16} if kept or bf16 is not False else {torch.float32})


@pytest.mark.parametrize("kind", ["biases", "norms", "vectors", "orthogonal"])
@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_of_other_kinds_train_in_any_type(make_trainer, sources, kind, bf16):
    peft = pytest.importorskip("peft")
    adapters = {
        "biases": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
        "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "vectors": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
        "orthogonal": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
    }[kind]()
    model = tiny_llama(dtype=BF16, attention_bias=True)
    model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    make_trainer(sources, model, bf16=bf16).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_quantized_model_that_needs_autocast_is_refused(make_trainer, sources):
    model = tiny_llama(dtype=BF16)
    model.model.requires_grad_(False)
    model.quantization_method, model.hf_quantizer = "bitsandbytes", SimpleNamespace(is_trainable=True)
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match=r"bf16=False: the quantized model .* Set bf16=True"):
        make_trainer(sources, model, bf16=False)


@pytest.mark.parametrize("built", ["model", "model_init"])
@pytest.mark.parametrize("resume", [None, "out/checkpoint-2"])
def test_a_resumed_checkpoint_is_not_rounded(make_trainer, sources, tmp_path, built, resume):
    whole = make_trainer(sources, float32(), bf16=True, **SAVING)
    whole.train()
    narrow: Any = tiny_llama(dtype=BF16) if built == "model" else lambda: tiny_llama(dtype=BF16)
    args = NexusConfig(str(tmp_path / "again"), **{name: getattr(whole.args, name) for name in (*SAVING, *SETTINGS)})
    trainer = NexusTrainer(args=args, train_dataset=sources, **{built: narrow})
    assert types(trainer.model) == {torch.float32} and trainer.accelerator.mixed_precision == "bf16"
    trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
    assert torch.equal(weights(trainer), weights(whole))


# ---- What is saved ----


def test_a_save_holds_the_chosen_type_and_checkpoints_float32(make_trainer, sources, tmp_path):
    whole = make_trainer(sources, tiny_llama(tie_word_embeddings=True), save_dtype="bfloat16", **SAVING)
    whole.train()
    whole.save_model()
    final, last = saved_weights(tmp_path / "out"), saved_weights(tmp_path / "out/checkpoint-4")
    assert {t.dtype for t in last.values()} == {torch.float32}
    assert final.keys() == last.keys() and same(final, {name: t.bfloat16() for name, t in last.items()})
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == BF16 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not list((tmp_path / "out").glob("*.tmp"))
    again = make_trainer(sources, tiny_llama(1, tie_word_embeddings=True), output_dir=str(tmp_path / "b"), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_model_that_an_evaluation_narrows_is_named_so(make_trainer, sources, tmp_path, dtype):
    trainer = make_trainer(sources, bf16_full_eval=dtype == BF16, fp16_full_eval=dtype == torch.float16)
    trainer.evaluate(sources)
    trainer.save_model()
    assert {t.dtype for t in saved_weights(tmp_path / "out").values()} == {dtype}
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_adapters_with_names_are_converted(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="sft")
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        model.save_pretrained(folder)
    assert [*convert_weights(tmp_path, tmp_path / "new", "bfloat16")] == ["sft/adapter_model.safetensors"]
    tensors = load_file(tmp_path / "new/sft/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {BF16}


def test_a_model_of_several_files_is_converted(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    convert_weights(tmp_path, tmp_path, "bfloat16")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), tiny_llama(dtype=BF16).parameters()))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as hub:
        for name, value in {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": os.getcwd()}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            "hf_nexus.trainer.publishing.Publisher", partial(Publisher, endpoint=hub.endpoint, retry=QUICK)
        )
        yield hub


def test_pushes_hold_the_chosen_type_also_during_training(hub, make_trainer, sources, tmp_path):
    push = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": ALICE, "hub_flush_timeout": SECONDS}
    trainer = make_trainer(sources, save_dtype="bfloat16", hub_strategy="checkpoint", **push, **SAVING)

    def pushed(name: str) -> dict[str, torch.Tensor]:
        return load(hub.files(REPO)[name])

    trainer.train()
    kept = saved_weights(tmp_path / "out/checkpoint-4")
    assert same(pushed("last-checkpoint/model.safetensors"), kept)
    assert same(pushed("model.safetensors"), {name: t.bfloat16() for name, t in kept.items()})
    assert json.loads(hub.files(REPO)["config.json"])["dtype"] == "bfloat16"
    assert not (tmp_path / "out/_converted").exists()
    trainer.push_to_hub(license="mit")
    assert {t.dtype for t in pushed("model.safetensors").values()} == {BF16}
