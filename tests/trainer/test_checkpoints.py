"""A visible checkpoint folder is complete, even if writing it is interrupted."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_nexus.trainer.checkpoints import STAGING_DIR, is_complete, last_checkpoint
from tests.support.tiny import Rows, tiny_llama


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.fixture
def saving(make_trainer, tmp_path):
    def make(**config):
        defaults = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run")}
        return make_trainer(Rows(64, 0), model=config.pop("model", None), **{**defaults, **config})

    return make


def fake_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        (path / "trainer_state.json").write_text("{}")
    return path


def test_a_checkpoint_that_is_visible_while_saving_is_complete(saving, tmp_path):
    """The folder is inspected after each file that the Trainer writes."""
    seen = []

    def look(*names):
        for path in (tmp_path / "run").glob("checkpoint-*"):
            seen.append(path.name)
            assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(
                os.listdir(path)
            )

    trainer = saving()
    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler"):
        original = getattr(trainer, name)
        setattr(trainer, name, lambda *a, original=original, **k: (look(), original(*a, **k), look()))
    trainer.train()
    look()
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-3"} == set(seen)
    assert not (tmp_path / "run" / STAGING_DIR).exists()


def test_a_failed_save_leaves_the_last_checkpoint(saving, tmp_path):
    run = tmp_path / "run"
    whole = saving(output_dir=str(tmp_path / "whole"))
    whole.train()
    broken = saving()
    original, calls = broken._save_optimizer_and_scheduler, []

    def fail(output_dir):
        calls.append(output_dir)
        if len(calls) == 2:
            raise OSError("no space left on device")
        original(output_dir)

    broken._save_optimizer_and_scheduler = fail
    with pytest.raises(OSError, match="no space"):
        broken.train()
    assert last_checkpoint(run) == str(run / "checkpoint-1")
    assert not (run / "checkpoint-2").exists()
    assert (run / STAGING_DIR / "checkpoint-2" / "model.safetensors").exists()
    again = saving(model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))
    assert not (run / STAGING_DIR).exists()


def test_incomplete_checkpoints_are_passed_over_when_resuming(saving, tmp_path):
    whole = saving(output_dir=str(tmp_path / "whole"), max_steps=4)
    whole.train()
    saving().train()
    run = tmp_path / "run"
    fake_checkpoint(run, 7, complete=False)
    (fake_checkpoint(run, 8) / "checkpoint-is-incomplete.txt").touch()
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-8")  # the one that the Trainer would choose
    assert last_checkpoint(run) == str(run / "checkpoint-3")
    again = saving(model=tiny_llama(seed=5), max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("name", ["checkpoint-7", "nowhere"])
def test_resuming_from_an_incomplete_checkpoint_is_refused(saving, tmp_path, name):
    fake_checkpoint(tmp_path / "run", 7, complete=False)
    with pytest.raises(ValueError, match="was not written to its end"):
        saving().train(resume_from_checkpoint=str(tmp_path / "run" / name))


def test_resuming_without_a_checkpoint_is_refused(saving):
    with pytest.raises(ValueError, match="No complete checkpoint"):
        saving().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_same_step_is_replaced(saving, tmp_path):
    old = fake_checkpoint(tmp_path / "run", 2)
    (old / "of_the_old_run.txt").touch()
    saving().train()
    assert is_complete(old)
    assert not (old / "of_the_old_run.txt").exists()


def test_a_replaced_checkpoint_returns_if_nothing_replaced_it(tmp_path):
    aside = fake_checkpoint(tmp_path / "run" / STAGING_DIR / "replaced", 2)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    assert not aside.exists()


def test_the_best_checkpoint_is_known_by_its_final_path(saving, tmp_path):
    run = tmp_path / "run"
    trainer = saving(
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
        trainer_kwargs={"eval_dataset": Rows(8, 1)},
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best).parent == run and is_complete(best)
    assert len(list(run.glob("checkpoint-*"))) <= 2  # the best and the newest
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


class SaveBeforeTheStep(TrainerCallback):
    """Saves as the Trainer does after a SIGTERM: before the optimizer step, or at the start of a step."""

    def __init__(self, event: str, step: int):
        setattr(self, event, self._save)
        self.step = step

    def _save(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_training_stop = True
        return control


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
@pytest.mark.parametrize("step", [0, 1, 2, 3])  # an epoch has two windows
def test_a_window_in_progress_is_repeated_when_resumed(saving, tmp_path, event, step):
    config = {"max_steps": 5, "save_strategy": "no"}
    rows, dropout = Rows(16, 0), {"attention_dropout": 0.5}
    whole = saving(output_dir=str(tmp_path / "whole"), model=tiny_llama(**dropout), **config)
    whole.train_dataset = rows
    whole.train()
    callback = SaveBeforeTheStep(event, step)
    broken = saving(model=tiny_llama(**dropout), **config)
    broken.train_dataset = rows
    broken.add_callback(callback)
    callback.trainer = broken
    broken.train()
    again = saving(model=tiny_llama(seed=5, **dropout), **config)
    again.train_dataset = rows
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.meter.trained_tokens == whole.meter.trained_tokens
    shutil.rmtree(tmp_path / "run")
