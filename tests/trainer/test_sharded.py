"""Checkpoints that are written while training goes on are complete or absent, and resumed to the bit."""

import errno
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from torch.distributed.checkpoint import FileSystemWriter
from transformers import LlamaForCausalLM, TrainerCallback

from hf_nexus.trainer.checkpoints import is_complete, last_checkpoint, recover
from hf_nexus.trainer.publishing import Publishing
from tests.support.tiny import Rows, tiny_llama

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


@pytest.fixture
def make(make_trainer, tmp_path):
    """`make(name, model)` builds a trainer that saves into a folder of this name."""

    def make(name: str, model: torch.nn.Module | None = None, **config: Any) -> Any:
        defaults = {"output_dir": str(tmp_path / name), "checkpoint_async": True, **SAVING}
        return make_trainer(Rows(64, 0), model=model, **{**defaults, **config})

    return make


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """No file is written before this is set."""
    go, write = threading.Event(), FileSystemWriter.write_data

    def wait(*args: Any) -> Any:
        assert go.wait(60)
        return write(*args)

    with patch.object(FileSystemWriter, "write_data", wait):
        yield go
        go.set()


class AtStep(TrainerCallback):
    """Calls a function after a number of outer steps."""

    def __init__(self, step: int, call: Any):
        self.step, self.call = step, call

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


class Partly(torch.nn.Module):
    """A model with a parameter that never has a gradient."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.llama, self.never = tiny_llama(seed), torch.nn.Parameter(torch.ones(3))
        self.config = self.llama.config

    def forward(self, input_ids=None, labels=None):
        return self.llama(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize("model", [tiny_llama, pytest.param(Partly, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_as_a_synchronous_one(make, tmp_path, model):
    sync, later = make("sync", model(), checkpoint_async=False), make("later", model())
    sync.train(), later.train()
    assert torch.equal(weights(later.model), weights(sync.model))
    again = make("again", model(seed=5))
    again.train(resume_from_checkpoint=str(tmp_path / "later" / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(sync.model))
    assert len(again.optimizer.state) == len(sync.optimizer.state)


def test_training_goes_on_and_the_checkpoint_is_of_its_step(make, tmp_path, held):
    """It is absent for all readers until it is written."""
    run, seen = tmp_path / "later", []
    trainer = make("later")
    trainer.add_callback(AtStep(2, lambda: seen.append(weights(trainer.model))))
    trainer.add_callback(AtStep(3, lambda: (seen.append(last_checkpoint(run)), held.set())))
    trainer.train()
    assert seen[1] is None
    again = make("again", tiny_llama(seed=5), max_steps=2)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert torch.equal(weights(again.model), seen[0])


def test_the_files_become_a_model_of_transformers(make, tmp_path):
    trainer = make("later", max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "later" / "checkpoint-2"
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LlamaForCausalLM.from_pretrained(checkpoint)
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path / "model"))
    (checkpoint / "config.json").rename(tmp_path / "model" / "config.json")
    assert torch.equal(weights(LlamaForCausalLM.from_pretrained(tmp_path / "model")), weights(trainer.model))


@pytest.mark.parametrize("step", [2, 4])
def test_a_failed_write_is_an_error_at_the_next_save_or_end(make, tmp_path, step):
    run, write = tmp_path / "later", FileSystemWriter.write_data
    trainer = make("later")

    def fail(*args: Any) -> Any:
        if trainer.state.global_step >= step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    with (
        patch.object(FileSystemWriter, "write_data", fail),
        pytest.raises(OSError, match=rf"checkpoint-{step} was not"),
    ):
        trainer.train()
    assert trainer.state.global_step == {2: 4, 4: 5}[step]
    recover(run)  # as the next run does: it must not take what was written so far for a checkpoint
    assert last_checkpoint(run) == (None if step == 2 else str(run / "checkpoint-2"))


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupted_run_waits_for_its_checkpoint(make, tmp_path, caplog, fails):
    def stop() -> None:
        raise KeyboardInterrupt

    slow = threading.Event()

    def write(*args: Any) -> Any:
        slow.wait(0.5)
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    original = FileSystemWriter.write_data
    trainer = make("later")
    trainer.add_callback(AtStep(3, stop))
    with patch.object(FileSystemWriter, "write_data", write), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_complete(tmp_path / "later" / "checkpoint-2") is not fails
    assert ("checkpoint-2 was not written: [Errno 28] No space left" in caplog.text) is fails


def test_the_best_model_is_kept_and_loaded_at_the_end(make, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    trainer, seen = make("later", save_total_limit=1, trainer_kwargs={"eval_dataset": Rows(8, 0)}, **best), []
    trainer.add_callback(AtStep(2, lambda: seen.append(weights(trainer.model))))
    trainer.train()  # the highest loss is the first
    assert torch.equal(weights(trainer.model), seen[0])
    assert [path.name for path in (tmp_path / "later").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_push_follows_the_end_of_the_write(make, tmp_path, held, monkeypatch):
    pushed = []
    monkeypatch.setattr(Publishing, "pushes_checkpoints", True)
    monkeypatch.setattr(
        Publishing, "push_checkpoint", lambda _, *given: pushed.append((*given[:2], is_complete(given[0])))
    )
    trainer = make("later", hub_strategy="checkpoint")
    trainer.args.push_to_hub = True  # without a Hub
    trainer.add_callback(AtStep(3, held.set))
    trainer.train()
    assert pushed == [(str(tmp_path / "later" / f"checkpoint-{step}"), step, True) for step in (2, 4, 5)]


def test_what_it_cannot_save_is_refused(make):
    with pytest.raises(ValueError, match="writes no model that hub_strategy='every_save'"):
        make("a", push_to_hub=True)
    with pytest.raises(ValueError, match="a folder that all machines share"):
        make("b", save_on_each_node=True)
    with pytest.raises(ValueError, match="does not support optim='schedule_free_adamw'"):
        make("c", optim="schedule_free_adamw")
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="does not support adapters"):
        make("c", peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    extra = torch.nn.Parameter(torch.ones(2))
    model = tiny_llama()
    trainer = make("d", model)
    trainer.optimizer = torch.optim.AdamW([*model.parameters(), extra])
    with pytest.raises(ValueError, match="trains some that are not the model's"):
        trainer.train()
