"""After any interruption, the weights are those of the window's start, also in checkpoints and after a resume."""

import contextlib
import functools
import itertools
import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from random import Random
from unittest.mock import Mock, patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer

from hf_nexus.files import checkpoints_of
from hf_nexus.trainer.checkpoints import STAGING_DIR, is_complete
from tests.support import fault_processes, faults
from tests.support.faults import (
    IN_INNER_STEPS,
    IN_WINDOWS,
    SAVING,
    STEPS,
    AtEvents,
    Bomb,
    K,
    broken_off,
    displaced,
    make,
    weights,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights at the start and after each step, and the last log line."""
    return faults.trajectory(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def steps(undisturbed):
    return undisturbed[0]


# ---- Interrupts and errors ----


def slow(*values):
    """A combination for `make test-all` only."""
    return pytest.param(*values, marks=pytest.mark.slow)


EVERYWHERE = [
    case if (case[1] == 2 if case[2] == "error" else case[0].endswith("forward")) else slow(*case)
    for case in itertools.product(IN_INNER_STEPS, range(1, K + 1), faults.KINDS)
]


@pytest.mark.parametrize(("place", "inner_step", "kind"), EVERYWHERE)
def test_a_window_interrupted_in_an_inner_step_is_restored(tmp_path, steps, place, inner_step, kind):
    trainer = make(tmp_path, **SAVING)
    assert broken_off(trainer, IN_INNER_STEPS[place], Bomb(K + inner_step, kind))  # in the second window
    assert displaced(trainer, steps) == []


@pytest.mark.parametrize("kind", faults.KINDS)
@pytest.mark.parametrize("place", IN_WINDOWS)
def test_a_window_interrupted_at_its_ends_is_restored(tmp_path, steps, place, kind):
    trainer = make(tmp_path, **SAVING)
    assert broken_off(trainer, IN_WINDOWS[place], Bomb(2, kind))
    assert trainer.state.global_step == 1
    assert displaced(trainer, steps) == []


# In the last step of an epoch, `on_epoch_end` is the last event.
STEPS_DONE = {"on_train_begin": 0, "on_epoch_begin": 0, "on_step_begin": 1, "on_substep_end": 1}
STEPS_DONE |= {"on_pre_optimizer_step": 1, "on_optimizer_step": 2, "on_step_end": 2, "on_log": 2, "on_evaluate": 2}
STEPS_DONE |= {"on_prediction_step": 2, "on_save": 2, "on_epoch_end": 3, "on_train_end": STEPS}


@pytest.mark.parametrize("event", STEPS_DONE)
def test_an_error_in_a_callback_keeps_the_weights(tmp_path, steps, event):
    """The optimizer step is complete or absent."""
    trainer = make(tmp_path, **SAVING)

    def fail(event):
        # counted after the optimizer's step and that event
        if trainer.state.global_step + (event == "on_optimizer_step") == STEPS_DONE[event]:
            raise RuntimeError("injected")

    trainer.add_callback(AtEvents(fail, event))
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    assert displaced(trainer, steps, STEPS_DONE[event]) == []


def test_whatever_a_callback_saves_is_not_displaced(tmp_path, steps):
    trainer = make(tmp_path, **SAVING)
    saved = []

    def save(event):
        saved.append(event)
        trainer.save_model(str(tmp_path / f"{len(saved)}_{event}"))

    trainer.add_callback(AtEvents(save))
    trainer.train()
    assert set(saved) == set(STEPS_DONE)
    assert displaced(trainer, steps) == []


@pytest.mark.parametrize("place", ["forward", "after_forward", "after_backward", "move"])
def test_a_signal_handler_may_save_inside_a_window(tmp_path, steps, place):
    trainer = make(tmp_path)
    save = faults.Call(K + 3, lambda: trainer.save_model(str(tmp_path / "checkpoint-1")))
    with IN_INNER_STEPS[place](trainer, save):
        trainer.train()
    assert save.calls > save.at
    assert displaced(trainer, steps) == []


@pytest.mark.parametrize("place", ["after_forward", "after_backward"])
def test_after_an_interrupt_the_model_equals_a_fresh_one(tmp_path, place):
    """The interrupted window leaves nothing behind, including hooks and modes."""
    trainer = make(tmp_path)
    assert broken_off(trainer, IN_INNER_STEPS[place], Bomb(K + 3, "SIGINT"))
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    saved = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert Trainer(saved, trainer.args, eval_dataset=trainer.eval_dataset).evaluate()["eval_loss"] == loss
    assert all(p.grad is None for p in trainer.model.parameters())


def test_training_after_an_interrupt_ends_as_without_it(tmp_path, undisturbed):
    trainer = make(tmp_path, **SAVING)
    assert broken_off(trainer, IN_INNER_STEPS["after_forward"], Bomb(2 * K + 3, "SIGTERM"))
    assert_resumes(tmp_path, *undisturbed, start=2)


def assert_resumes(out: Path, steps: list[torch.Tensor], logs: dict[str, float], start: int) -> None:
    """Resuming starts from the checkpoint of step `start` and ends like the uninterrupted run."""
    trainer = make(out, faults.model(seed=5), **SAVING)
    began = []
    trainer.add_callback(AtEvents(lambda event: began.append(trainer.state.global_step), "on_train_begin"))
    trainer.train(resume_from_checkpoint=True)
    assert began == [start]
    assert trainer.state.global_step == STEPS
    assert displaced(trainer, steps) == []
    assert faults.last_log(trainer) == pytest.approx(logs, rel=1e-6)
    assert fault_processes.unfinished(out) == []
    names = {path.name for path in out.iterdir()} - {"after"}
    assert names <= {f"checkpoint-{i}" for i in range(STEPS + 1)}  # no leftovers


# All other tests interrupt at known points. This timer interrupts at any point.
def test_signals_at_any_moment_leave_the_weights_as_they_were(tmp_path):
    """A timer interrupts training at random points. At learning rate 0, any changed weight is a displaced one."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    random, seen = torch.Generator().manual_seed(0), []

    def arm(event):
        seen.append(trainer.state.global_step)
        if seen[-2:] == [2, 2]:  # the third window begins
            signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.2 * float(torch.rand((), generator=random)))

    trainer = make(tmp_path, max_steps=1000, learning_rate=0.0, inner_lr=1.0, logging_steps=1000)
    trainer.add_callback(AtEvents(arm, "on_step_begin", "on_step_end"))
    start, loss = weights(trainer), trainer.evaluate()["eval_loss"]
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(6):
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert seen[-1] >= 2
            assert trainer.evaluate()["eval_loss"] == loss
            assert torch.equal(weights(trainer), start)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# ---- Steps that cannot be taken ----


@pytest.mark.parametrize("inner_steps", [{1}, {3}, {K}, {1, 2, 3, K}])
def test_a_window_with_nan_micro_batches_ends_at_its_start_too(tmp_path, inner_steps):
    trainer = make(tmp_path, **SAVING)
    seen = faults.whole_windows(trainer)
    with faults.poison(trainer, {K + i for i in inner_steps}):  # in the second window
        trainer.train()
    steps = [seen[0], *seen[2::3]]
    assert len(steps) == 1 + STEPS
    for begun, walked in zip(seen[::3], seen[1::3], strict=True):
        assert torch.equal(begun, walked)
    assert torch.equal(steps[1], steps[2]) == (len(inner_steps) == K)
    assert torch.stack(steps).isfinite().all()
    assert faults.last_log(trainer)["inner_steps_skipped"] == len(inner_steps)
    assert displaced(trainer, steps) == []


@pytest.mark.parametrize("inner_step", [1, 2])
def test_out_of_memory_restarts_smaller_from_clean_weights(tmp_path, inner_step):
    trainer = make(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True, **SAVING)
    seen, sizes, forward = faults.whole_windows(trainer), [], trainer.model.forward

    def limited(*args, input_ids=None, **kwargs):
        sizes.append(len(input_ids))
        if len(sizes) == K + inner_step:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    trainer.model.forward = functools.wraps(forward)(limited)
    trainer.train()
    assert sizes[0] == 4 and trainer._train_batch_size < 4
    steps = [seen[0], seen[2]]  # of the second window, only the start of the first attempt was seen
    assert torch.equal(seen.pop(3), steps[1])
    assert [torch.equal(begun, walked) for begun, walked in zip(seen[::3], seen[1::3], strict=True)] == [True] * 5
    assert torch.equal(seen[3], steps[1])
    assert displaced(trainer, [steps[1], *seen[5::3]]) == []  # upstream counts from zero again


# ---- Killed, and terminated with notice ----


@pytest.mark.parametrize(("place", "start"), [("window", 2), ("checkpoint", 1), ("rename", 2), ("replace", 1)])
def test_a_killed_run_is_resumed_as_if_it_had_not_been(tmp_path, undisturbed, place, start):
    if place == "replace":
        assert broken_off(make(tmp_path, **SAVING), IN_INNER_STEPS["forward"], Bomb(K + 1))
    assert fault_processes.in_a_process(fault_processes.train_until_killed, tmp_path, place) == -signal.SIGKILL
    assert fault_processes.unfinished(tmp_path) == []
    assert_resumes(tmp_path, *undisturbed, start=start)


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_to_the_same_end(tmp_path):
    """Fifty kills, half of them while a file is used: when checkpoints are written, renamed and deleted."""
    steps, trainer = [], make(tmp_path / "whole", **fault_processes.ROTATING)
    trainer.add_callback(AtEvents(lambda event: steps.append(weights(trainer)), "on_step_end"))
    trainer.train()
    out, end, random = tmp_path / "out", tmp_path / "end.pt", Random(0)
    assert fault_processes.in_a_process(fault_processes.train_until, out, end, None, None) == 0
    events, kills, seen = torch.load(end)[1], [], Counter()
    assert events > 100
    while len(kills) < 50:
        if end.exists():  # begin again
            end.unlink()
            shutil.rmtree(out)
        at = (random.randint(1, events), None) if len(kills) % 2 else (None, random.uniform(0.05, 1.5))
        status = fault_processes.in_a_process(fault_processes.train_until, out, end, *at)
        kills += [at] * (status != 0)
        seen["ends"] += status == 0
        for checkpoint in checkpoints_of(out):
            assert is_complete(checkpoint), at  # nothing that can be seen is half written or half deleted
            step, saved = int(checkpoint.name.split("-")[-1]), load_file(checkpoint / "model.safetensors")
            names = [name for name, _ in trainer.model.named_parameters()]
            assert torch.equal(faults.flat(saved[name] for name in names), steps[step - 1])
            seen["checkpoints"] += 1
        assert fault_processes.unfinished(out) == []
        if end.exists():
            assert torch.equal(torch.load(end)[0], steps[-1])
        seen["in a save"] += (out / STAGING_DIR).exists()
    assert seen["in a save"] > 5 and seen["ends"] > 3


def terminated(out: Path, place, at: int, start: str | None = None, **config) -> faults.NexusTrainer:
    """Train until the `at`-th call of `place`, where a SIGTERM makes the Trainer save and stop."""
    with fault_processes.keeping_handler():
        trainer = make(out, enable_jit_checkpoint=True, **config)
        with place(trainer, fault_processes.Terminate(trainer, at)):
            trainer.train(resume_from_checkpoint=start)
    return trainer


@pytest.mark.parametrize(
    ("window", "inner_step"), [(0, 3), (1, 1), (1, 4), (3, 3), slow(1, 2), slow(1, 3), slow(2, 3)]
)
def test_a_window_cut_by_sigterm_is_repeated_on_resume(tmp_path, undisturbed, window, inner_step):
    """Windows 0 and 3 start an epoch, where the Trainer saves earlier random states."""
    place = IN_INNER_STEPS["after_forward"]
    trainer = terminated(tmp_path, place, window * K + inner_step)
    assert trainer.stopped_by_sigterm
    assert trainer.state.global_step == window + 1  # upstream still steps, after saving
    assert displaced(trainer, undisturbed[0]) == []
    assert_resumes(tmp_path, *undisturbed, start=window)


@pytest.mark.parametrize(
    ("event", "at", "start"), [("on_step_begin", 2, 1), ("on_step_end", 1, 1), ("on_epoch_end", 1, 3)]
)
def test_sigterm_between_windows_saves_and_resumes(tmp_path, undisturbed, event, at, start):
    def place(trainer, bomb):
        trainer.callback_handler.callbacks.insert(0, AtEvents(lambda event: bomb(), event))  # before the others
        return contextlib.nullcontext()

    trainer = terminated(tmp_path, place, at)
    assert displaced(trainer, undisturbed[0]) == []
    assert_resumes(tmp_path, *undisturbed, start=start)


@pytest.mark.parametrize("start", [1, 3])
def test_terminated_in_the_first_window_after_a_resume(tmp_path, undisturbed, start):
    """The Trainer loads the random states late. Step 3 starts an epoch, step 1 does not."""
    make(tmp_path, **SAVING).train()
    for step in range(start + 1, STEPS + 1):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = terminated(tmp_path, IN_INNER_STEPS["after_forward"], 3, str(tmp_path / f"checkpoint-{start}"))
    assert displaced(again, undisturbed[0]) == []
    assert_resumes(tmp_path, *undisturbed, start=start)


# ---- Checkpoints ----


def test_a_visible_checkpoint_is_complete(tmp_path):
    """The folder is inspected each time the saving process accesses a file."""
    status = fault_processes.in_a_process(fault_processes.train_watched, tmp_path / "out", tmp_path / "found.json")
    assert status == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["looks"] > 10 * STEPS
    assert found["seen"] == []
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2  # rotation deletes the others


def test_a_checkpoint_that_fails_is_none(tmp_path, undisturbed):
    trainer = make(tmp_path, **SAVING)
    save = faults.before(trainer._save_optimizer_and_scheduler, Bomb(3))
    with patch.object(trainer, "_save_optimizer_and_scheduler", save), pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert displaced(trainer, undisturbed[0]) == []
    assert_resumes(tmp_path, *undisturbed, start=2)


def test_a_just_in_time_checkpoint_that_fails_is_passed_over(tmp_path, undisturbed):
    """transformers then leaves a folder with its sentinel file."""

    def place(trainer, bomb):
        trainer._save_rng_state = Mock(side_effect=OSError("disk full"))
        return IN_INNER_STEPS["forward"](trainer, bomb)

    assert broken_off(make(tmp_path, **SAVING), IN_INNER_STEPS["forward"], Bomb(K + 1))
    with pytest.raises(OSError, match="disk full"):
        terminated(tmp_path, place, 2 * K + 1)
    assert (tmp_path / "checkpoint-2").is_dir()
    assert_resumes(tmp_path, *undisturbed, start=1)


def test_a_failed_save_after_sigterm_keeps_the_one_before(tmp_path, undisturbed):
    """transformers saves the same step again, and puts its sentinel file into the complete checkpoint."""

    def place(trainer, bomb):
        trainer.callback_handler.callbacks.insert(0, AtEvents(lambda event: bomb(), "on_save"))
        save = faults.before(trainer._save_rng_state, Bomb(3))
        return patch.object(trainer, "_save_rng_state", save)

    with pytest.raises(RuntimeError, match="injected"):
        terminated(tmp_path, place, 2, **SAVING)
    assert (tmp_path / "checkpoint-2" / fault_processes.SENTINEL).exists()
    assert_resumes(tmp_path, *undisturbed, start=2)


@pytest.mark.parametrize("complete", [True, False])
def test_the_mark_of_an_earlier_sigterm_stops_no_run(tmp_path, complete):
    if complete:
        make(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-2").mkdir(exist_ok=True)
    (tmp_path / "checkpoint-2" / fault_processes.SENTINEL).touch()
    with fault_processes.keeping_handler():
        trainer = make(tmp_path, enable_jit_checkpoint=True, **SAVING)
        trainer.train()
    assert trainer.state.global_step == STEPS and not trainer.stopped_by_sigterm
    assert is_complete(tmp_path / "checkpoint-2")
