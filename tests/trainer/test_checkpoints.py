"""A checkpoint counts only if all of it is there, the best one is kept and found, and a folder has one run."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_nexus.files import checkpoints_of
from hf_nexus.lock import HOLDER_NAME
from hf_nexus.trainer.checkpoints import (
    MANIFEST_NAME,
    STAGING_DIR,
    RandomStates,
    StagedCheckpoints,
    _lacking,
    delete_checkpoint,
    is_complete,
    last_checkpoint,
    recover,
    resolve_checkpoint,
)
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
        for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (path / name).write_text(json.dumps({"global_step": step}))
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        (path / MANIFEST_NAME).write_text(json.dumps(sizes))
    return path


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.split("-")[-1]) for path in checkpoints_of(folder)]


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
    marked = fake_checkpoint(run, 8)
    (marked / MANIFEST_NAME).unlink()  # with it, the mark is of a second save of a complete checkpoint
    assert last_checkpoint(run) == str(marked)
    (marked / "checkpoint-is-incomplete.txt").touch()
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-8")  # the one that the Trainer would choose
    assert last_checkpoint(run) == str(run / "checkpoint-3")
    again = saving(model=tiny_llama(seed=5), max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("name", ["checkpoint-7", "nowhere"])
def test_resuming_from_an_incomplete_checkpoint_is_refused(saving, tmp_path, name):
    fake_checkpoint(tmp_path / "run", 7, complete=False)
    with pytest.raises(ValueError, match=r"Can't find a valid checkpoint at .*: (trainer_state|there is)"):
        saving().train(resume_from_checkpoint=str(tmp_path / "run" / name))


@pytest.mark.parametrize("finished", [False, True])
def test_the_folder_of_a_run_is_no_checkpoint(saving, tmp_path, finished):
    """That of a finished run has a state of the Trainer as well."""
    for step in (7, 12):
        fake_checkpoint(tmp_path / "run", step)
    if finished:
        shutil.copy(tmp_path / "run" / "checkpoint-12" / "trainer_state.json", tmp_path / "run")
    with pytest.raises(ValueError, match=r"run is a folder of checkpoints. .* such as .*checkpoint-12"):
        saving().train(resume_from_checkpoint=str(tmp_path / "run"))


def test_resuming_without_a_checkpoint_is_refused(saving):
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        saving().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_same_step_is_replaced(saving, tmp_path):
    old = fake_checkpoint(tmp_path / "run", 2)
    (old / "of_the_old_run.txt").touch()
    saving().train()
    assert is_complete(old)
    assert not (old / "of_the_old_run.txt").exists()


def test_a_complete_checkpoint_gets_its_name_after_a_kill(tmp_path):
    run, old = tmp_path / "run", fake_checkpoint(tmp_path / "run", 3, complete=False)
    for step in (2, 3):
        fake_checkpoint(run / STAGING_DIR, step)
    fake_checkpoint(run / STAGING_DIR / "deleted", 1)
    (old / "checkpoint-is-incomplete.txt").touch()
    recover(run)
    assert steps_of(run) == [2, 3] and all(is_complete(path) for path in checkpoints_of(run))
    assert not (run / STAGING_DIR).exists()


@pytest.mark.parametrize("act", [recover, lambda run: delete_checkpoint(run / "checkpoint-3")])
def test_a_linked_staging_folder_is_not_followed(tmp_path, act):
    """Neither by a recovery nor by a deletion."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    fake_checkpoint(elsewhere, 2)
    fake_checkpoint(run, 3)
    (run / STAGING_DIR).symlink_to(elsewhere)
    act(run)
    assert steps_of(elsewhere) == [2] and [path.name for path in elsewhere.iterdir()] == ["checkpoint-2"]
    assert 2 not in steps_of(run) and not (run / STAGING_DIR).is_symlink()


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


def damage(file: Path, how: str) -> None:
    if how == "gone":
        file.unlink()
    else:  # shorter, or without content as after a power failure
        file.write_bytes(file.read_bytes()[:-1] if how == "cut" else b"")


@pytest.mark.parametrize("how", ["gone", "cut", "empty"])
def test_a_checkpoint_without_one_of_its_files_is_passed_over(saving, tmp_path, how, caplog):
    """Every file counts: without the optimizer's, for example, the Trainer would go on with an empty one."""
    trainer = saving()
    trainer.train()
    newest, whole = tmp_path / "run/checkpoint-3", tmp_path / "whole"
    newest.rename(whole)
    names = [path.name for path in whole.iterdir()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST_NAME} < set(names)
    for name in names:
        shutil.copytree(whole, newest)
        damage(newest / name, how)
        assert not is_complete(newest)
        assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-2")
        assert f"checkpoint-3 is passed over: {name} " in caplog.text
        if name not in (MANIFEST_NAME, "model.safetensors") or how != "gone":
            with pytest.raises(ValueError, match=f"Can't find a valid checkpoint at .*: {name} "):
                trainer.train(resume_from_checkpoint=str(newest))
        shutil.rmtree(newest)
    shutil.copytree(whole, newest)
    (newest / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):  # of the Trainer
        trainer.train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize("manifest", ["{}", "[" * 100_000, '{"model.safetensors": -1}'])
def test_a_manifest_that_no_run_has_written_is_refused(tmp_path, manifest):
    checkpoint = fake_checkpoint(tmp_path, 3)
    assert is_complete(checkpoint)
    (checkpoint / MANIFEST_NAME).write_text(manifest)
    assert not is_complete(checkpoint)
    with pytest.raises(ValueError, match="is missing or damaged"):
        resolve_checkpoint(str(checkpoint), str(tmp_path))


def test_a_file_in_place_of_the_staging_folder_is_replaced(saving, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STAGING_DIR).touch()
    saving().train()
    assert is_complete(tmp_path / "run/checkpoint-3")


def test_a_run_is_not_resumed_from_the_model_alone(saving, tmp_path, caplog):
    saving(save_only_model=True).train()
    assert is_complete(tmp_path / "run/checkpoint-3")
    with pytest.raises(ValueError, match="No valid checkpoint"):
        saving().train(resume_from_checkpoint=True)
    assert "optimizer* is missing" in caplog.text
    with pytest.raises(ValueError, match=r"optimizer\* is missing.*save_only_model"):
        saving().train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))


@pytest.mark.parametrize("nexus", [False, True])
def test_the_last_checkpoint_of_the_trainer_is_resumed(saving, tmp_path, nexus):
    """As the Trainer does, but for what it has not finished. What is left of one of ours is passed over."""
    run = tmp_path / "run"
    saving(trainer_class=Trainer, nexus=False).train()
    assert last_checkpoint(run) == get_last_checkpoint(str(run)) == str(run / "checkpoint-3")
    (run / "checkpoint-3/trainer_state.json").unlink()
    whole = saving(nexus=nexus, max_steps=4)
    whole.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-3")
    again = saving(nexus=nexus, max_steps=4, model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))
    saving(max_steps=5).train(resume_from_checkpoint=True)
    (run / "checkpoint-5" / MANIFEST_NAME).unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-4")


def test_a_checkpoint_of_the_trainer_is_resumed_by_its_path(saving, tmp_path):
    stock = saving(trainer_class=Trainer, nexus=False)
    stock.train()
    checkpoint = tmp_path / "run/checkpoint-2"
    again = saving(nexus=False, model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(again.model), weights(stock.model))
    for missing in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (checkpoint / missing).rename(tmp_path / "aside")
        with pytest.raises(ValueError, match=f"{missing[:9]}.* is missing"):
            again.train(resume_from_checkpoint=str(checkpoint))
        (tmp_path / "aside").rename(checkpoint / missing)
    (checkpoint / "optimizer.pt").rename(tmp_path / "aside")
    (checkpoint / "optimizer.pt").touch()
    with pytest.raises(ValueError, match=r"optimizer\* is missing or empty"):
        again.train(resume_from_checkpoint=str(checkpoint))
    (tmp_path / "aside").rename(checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        again.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_file_of_zeros_is_passed_over(saving, tmp_path, caplog, name):
    """Of the size that was written, as a disk may leave it after a power failure."""
    saving().train()
    file = tmp_path / "run/checkpoint-3" / name
    file.write_bytes(bytes(file.stat().st_size))
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-2")
    assert "checkpoint-3 is passed over" in caplog.text
    with pytest.raises(ValueError, match=f"{name[:9]}.* is (damaged|missing or empty)"):
        saving().train(resume_from_checkpoint=str(file.parent))


def test_a_rank_may_have_had_nothing_to_write(saving, tmp_path):
    saving().train()
    checkpoint = tmp_path / "run/checkpoint-3"
    (checkpoint / "optimizer_0").mkdir()
    (checkpoint / "optimizer_0/__1_0.distcp").touch()
    (checkpoint / "manifest.json").unlink()
    assert _lacking(checkpoint) is None


@pytest.mark.parametrize("name", ["rng_state_1.pth", "optimizer_0/.metadata"])
def test_a_file_of_zeros_of_another_rank_is_found(saving, tmp_path, caplog, name):
    saving().train()
    file = tmp_path / "run/checkpoint-3" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes(100))
    (file.parents[len(Path(name).parents) - 1] / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"{name[:9]}.* is missing or empty"):
        saving().train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))


def test_converted_weights_are_resumed_by_their_path(saving, tmp_path):
    whole = saving()
    whole.train()
    checkpoint = tmp_path / "run/checkpoint-2"
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    again = saving(model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(again.model), weights(whole.model))


class ChangeCheckpoints(TrainerCallback):
    """Adds, changes and deletes files of a checkpoint, as callbacks that convert adapters do."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        (folder / "notes").mkdir()
        (folder / "notes" / "added.txt").write_text("added")
        (folder / "config.json").write_text("{}")
        (folder / "generation_config.json").unlink()


def test_a_checkpoint_that_a_callback_changes_is_complete(saving, tmp_path):
    whole = saving()
    whole.add_callback(ChangeCheckpoints)
    whole.train()
    checkpoint = tmp_path / "run/checkpoint-2"
    assert all(is_complete(path) for path in checkpoints_of(tmp_path / "run"))
    (checkpoint / "later.txt").touch()  # more than was written is no damage
    (tmp_path / "run/checkpoint-3/notes/added.txt").unlink()
    again = saving(model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))


def test_files_are_on_the_disk_before_a_checkpoint_is_seen(saving, tmp_path, monkeypatch):
    run, forced, fsync, rename = tmp_path / "run", [], os.fsync, Path.rename

    def note(descriptor):
        forced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def look(source, target):
        if source.parent.name == STAGING_DIR:
            names = {path.name for path in forced}
            assert {path.name for path in source.rglob("*")} - {MANIFEST_NAME} < names
            assert forced[-2:] == [source / f"{MANIFEST_NAME}.tmp", source]
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", look)
    saving(max_steps=1).train()
    assert forced[-1] == run


@pytest.mark.parametrize("shared", [True, False])
def test_only_a_node_that_shares_no_disk_names_its_checkpoint(tmp_path, monkeypatch, shared):
    """This is the second node. A network file system may still show it a folder that was renamed."""
    staged, completed = tmp_path / STAGING_DIR / "checkpoint-2", []

    def wait_for_everyone():
        if shared and staged.exists():  # the first node has written its part
            (staged / "trainer_state.json").write_text("{}")

    processes = SimpleNamespace(wait_for_everyone=wait_for_everyone, is_local_main_process=True)
    monkeypatch.setattr("hf_nexus.trainer.checkpoints.PartialState", lambda: processes)
    args = SimpleNamespace(enable_jit_checkpoint=False, should_save=False, load_best_model_at_end=False)
    with StagedCheckpoints(args, completed.append).stage(str(tmp_path), TrainerState(global_step=2)):
        staged.mkdir(parents=True)
        (staged / "rng_state_1.pth").touch()
    assert completed == [str(tmp_path / "checkpoint-2")]
    assert staged.exists() is shared and (tmp_path / "checkpoint-2" / MANIFEST_NAME).exists() is not shared


# ---- Rotation ----


def test_the_oldest_steps_are_deleted_whatever_the_clock_says(saving, tmp_path):
    class SetBack(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            new = Path(args.output_dir, f"checkpoint-{state.global_step}")
            os.utime(new, (2e9 - 100 * state.global_step,) * 2)

    trainer = saving(save_total_limit=2, max_steps=5)
    trainer.add_callback(SetBack)
    trainer.train()
    assert steps_of(tmp_path / "run") == [4, 5]


@pytest.mark.parametrize("resumed", [False, True])
def test_checkpoints_of_an_earlier_run_are_deleted_first(saving, tmp_path, resumed, caplog):
    """They may have later steps. The last checkpoint is then one of this run, as with the Trainer."""
    run = tmp_path / "run"
    for step in (2, 5, 6):
        fake_checkpoint(run, step)
    start = saving(max_steps=2, output_dir=str(tmp_path / "start"))
    start.train()
    assert not caplog.records
    saving(save_total_limit=2, max_steps=4).train(
        resume_from_checkpoint=str(tmp_path / "start/checkpoint-2") if resumed else None
    )
    assert steps_of(run) == [3, 4]
    assert ("holds checkpoints of an earlier run, up to checkpoint-6" in caplog.text) is not resumed


def test_incomplete_checkpoints_do_not_count(saving, tmp_path):
    fake_checkpoint(tmp_path / "run", 1, complete=False)
    saving(save_total_limit=2, max_steps=2, save_steps=2).train()
    assert steps_of(tmp_path / "run") == [1, 2]  # one complete checkpoint of two
    saving(save_total_limit=2, max_steps=4, save_steps=2).train(resume_from_checkpoint=True)
    assert steps_of(tmp_path / "run") == [2, 4]


# ---- The best checkpoint ----

FIRST_IS_BEST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}


def best(**config):
    """Settings with which the first evaluation is the best."""
    return {**FIRST_IS_BEST, "trainer_kwargs": {"eval_dataset": Rows(8, 0)}, "save_total_limit": 1, **config}


@pytest.mark.parametrize(
    ("form", "nexus"),
    [("./out", True), ("./out", False), ("a//out", True), ("a/../out/", True), ("{}//./out", True)],
)
def test_the_best_is_loaded_from_any_form_of_a_path(saving, tmp_path, monkeypatch, form, nexus):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    trainer = saving(output_dir=form.format(tmp_path), nexus=nexus, **best(load_best_model_at_end=True))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert steps_of(form.format(tmp_path)) == [1]
    assert os.path.samefile(trainer.state.best_model_checkpoint, form.format(tmp_path) + "/checkpoint-1")


@pytest.mark.parametrize(
    ("change", "nexus"),
    [("moved", True), ("moved", False), ("copied", True), ("elsewhere", True), ("other folder", True)],
)
def test_the_best_is_kept_after_a_resume_elsewhere(saving, tmp_path, monkeypatch, change, nexus):
    monkeypatch.chdir(tmp_path)
    settings = {"nexus": nexus, **best(load_best_model_at_end=True, save_total_limit=2)}
    saving(output_dir="run", **settings).train()
    folder, out = "run", "run"
    if change == "moved":
        folder = out = "b/run"
        shutil.move("run", "b/run")
    elif change == "copied":
        folder = out = "copy"
        shutil.copytree("run", "copy")
    elif change == "elsewhere":
        (tmp_path / "deeper").mkdir()
        monkeypatch.chdir(tmp_path / "deeper")
        folder = out = "../run"
    else:
        out = "new"
        fake_checkpoint(tmp_path / "new", 1)  # of another run
    again = saving(output_dir=out, model=tiny_llama(seed=5), **{**settings, "max_steps": 6})
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-3/")
    assert again.state.best_global_step == 1
    assert again.state.best_model_checkpoint == f"{folder}/checkpoint-1"
    assert again.evaluate()["eval_loss"] == again.state.best_metric
    assert steps_of(folder)[0] == 1 and steps_of(out)[-1] == 6
    state = json.loads(Path(out, "checkpoint-6/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == f"{folder}/checkpoint-1"


@pytest.mark.parametrize("nexus", [True, False])
def test_the_best_may_be_evaluated_after_its_checkpoint(saving, tmp_path, nexus):
    """The evaluation at the end of an epoch follows the checkpoint of the same step."""
    trainer = saving(nexus=nexus, max_steps=6, **best(eval_strategy="epoch"))
    trainer.train_dataset = Rows(16, 0)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run/checkpoint-2")
    assert is_complete(trainer.state.best_model_checkpoint)


def test_a_best_that_was_not_saved_is_named(saving, caplog):
    trainer = saving(max_steps=4, save_steps=2, **best(load_best_model_at_end=True))
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert "of step 1, was not saved" in caplog.text


class StopAfter(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int, save: bool):
        self.step, self.save = step, save

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop, control.should_save = True, self.save


def test_the_card_names_the_step_of_the_weights_that_are_loaded(saving):
    """A later step is better and was not saved."""
    trainer = saving(max_steps=8, save_steps=2, **best(load_best_model_at_end=True, greater_is_better=False))
    trainer.add_callback(StopAfter(3, save=False))
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert trainer.run_facts().best[0] == 2


@pytest.mark.parametrize("nexus", [True, False])
def test_a_run_that_can_go_on_keeps_its_last_checkpoint(saving, tmp_path, nexus):
    trainer = saving(max_steps=8, nexus=nexus, **best(load_best_model_at_end=True))
    trainer.add_callback(StopAfter(3, save=True))
    trainer.train()
    assert steps_of(tmp_path / "run") == [1, 3]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_is_not_a_checkpoint_of_an_earlier_run(saving, tmp_path, caplog, resumed):
    """Its step was evaluated and not saved by this run, and an earlier run in the folder has saved it."""
    settings = best(load_best_model_at_end=True, save_total_limit=None, eval_steps=2)
    saving(save_steps=2, max_steps=2, **settings).train()
    again = saving(model=tiny_llama(seed=5), save_steps=4, **{**settings, "max_steps": 4})
    again.train()
    if resumed:
        again = saving(model=tiny_llama(seed=5), save_steps=4, **{**settings, "max_steps": 8})
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert again.state.best_global_step == 2 and "of step 2, was not saved" in caplog.text
    assert again.state.best_model_checkpoint is None
    last = load_file(tmp_path / f"run/checkpoint-{again.state.global_step}/model.safetensors")
    assert torch.equal(again.model.state_dict()["lm_head.weight"], last["lm_head.weight"])


# ---- One run per folder ----


def test_a_folder_has_one_run(saving, tmp_path, monkeypatch):
    holder = {"pid": 7, "host": "node-3", "since": "today"}

    def held(*args):
        raise BlockingIOError(11, "held")

    trainer = saving(trainer_kwargs={"eval_dataset": Rows(8, 0)})
    (tmp_path / "run" / HOLDER_NAME).write_text(json.dumps(holder))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="process 7 on node-3, since today"):
        patch.setattr("fcntl.flock", held)
        assert trainer.evaluate()["eval_loss"] > 0
        trainer.train()
    trainer.train()
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


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


# ---- Random states ----


def test_a_checkpoint_in_a_window_has_the_states_of_its_start():
    states = RandomStates()
    states.begin_window(3)
    expected = torch.rand(2)
    torch.rand(5)  # dropout in the window
    now = torch.get_rng_state()
    with states.to_save(3):  # the optimizer has not stepped yet
        assert torch.equal(torch.rand(2), expected)
    assert torch.equal(torch.get_rng_state(), now)
    with states.to_save(4):
        assert torch.equal(torch.get_rng_state(), now)


def test_a_first_window_has_the_states_of_its_epochs_start():
    states = RandomStates()
    states.begin_epoch(0, 0.0)
    expected = torch.rand(2)  # the data loader draws its seed
    states.begin_window(0)
    with states.to_save(0):
        assert torch.equal(torch.rand(2), expected)
