"""What a run shows while it trains, and what Ctrl-C does."""

import io
import os
import signal
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
from rich.console import Console
from torch.distributed import HashStore
from transformers import TrainerControl, TrainerState

from hf_nexus.pretrain import progress
from hf_nexus.pretrain.progress import SaveOnSignal, TrainingProgress
from hf_nexus.pretrain.run import main
from hf_nexus.trainer.checkpoints import is_complete
from tests.support.fault_processes import keeping_handler
from tests.support.saved_weights import same, saved_weights
from tests.support.tiny_config import STEPS

ARGS = SimpleNamespace(eval_strategy="steps", save_strategy="steps", world_size=1)
LOGS = {"loss": 4.5, "loss/code": 4.0, "loss/law": 5.0, "path_cosine": 0.125, "tokens_per_second": 1234.0}


def state_at(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=10, eval_steps=4, save_steps=5, epoch=0, num_train_epochs=1)


def shown(terminal: bool = True, **options) -> tuple[TrainingProgress, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120, _environ={"TERM": "xterm"})
    bars = TrainingProgress(console, **options)
    bars.on_train_begin(ARGS, state_at(0), None)
    return bars, written


def view(bars: TrainingProgress, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(bars._view())
    return console.file.getvalue()


def test_the_bar_has_the_losses_the_cosine_and_the_speed():
    bars, written = shown()
    with bars.shown():
        for bars._state.global_step in (2, 3):
            bars.on_step_end(ARGS, bars._state, None)
        bars.on_log(ARGS, state_at(3), None, LOGS)
        bars.on_log(ARGS, state_at(4), None, {"loss": 3.5, "loss/code": 3.5})  # no micro-batch of the other source
    for words in ("step 3/10", "loss 3.500   code 3.500   law 5.000", " left"):
        assert words in view(bars)
    bars.on_log(ARGS, state_at(4), None, LOGS)
    assert "path cosine +0.125   1,234 tokens/s" in view(bars)
    for words in ("step 3/10", "path cosine +0.125   1,234 tokens/s", " left"):
        assert words in view(bars, width=70)
    assert "step  3/10" not in written.getvalue()  # no line


def test_a_notebook_that_starts_the_command_gets_lines(monkeypatch):
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    bars, written = shown()
    with bars.shown():
        bars.on_log(ARGS, state_at(3), None, LOGS)
    assert written.getvalue().count("\n") == 1 and "step  3/10" in written.getvalue()


@pytest.mark.parametrize(("terminal", "options"), [(False, {}), (True, {"bar": False})])
def test_elsewhere_each_log_entry_is_one_line(terminal, options):
    bars, written = shown(terminal, **options)
    with bars.shown():
        bars.on_prediction_step(ARGS, state_at(0), None, eval_dataloader=[1, 2])
        bars.on_log(ARGS, state_at(3), None, LOGS)
        bars.on_log(ARGS, state_at(4), None, {"eval_loss": 2.0, "eval_ood_loss": 3.0})
    first, second, rest = written.getvalue().split("\n")
    assert first.split("   ")[:5] == ["step  3/10", "loss 4.500", "code 4.000", "law 5.000", "path cosine +0.125"]
    assert "held-out loss   sources 2.000   OOD 3.000" in second and not rest


def test_the_time_left_counts_evaluations_and_checkpoints(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bars, _ = shown()
    state = bars._state

    def event(name, seconds):
        now[0] += seconds
        getattr(bars, f"on_{name}")(ARGS, state, None)

    event("evaluate", 40)  # before the first step
    for step in range(1, 6):
        state.global_step = step
        event("step_end", 1 if step > 1 else 100)  # the first one starts workers
        if step == 4:  # evaluations are due now, at 8 and at the end
            assert bars._pace.left() == f"> {timedelta(seconds=6 * 1 + 3 * 40)} left"
            event("evaluate", 20)
    assert bars._pace.left() == f"> {timedelta(seconds=5 * 1 + 2 * 30)} left"  # no checkpoint was timed yet
    event("save", 300)
    assert bars._pace.left() == f"{timedelta(seconds=5 * 1 + 2 * 30 + 300)} left"
    now[0] += 7  # without an event, as in an evaluation
    assert bars._pace.left() == f"{timedelta(seconds=5 * 1 + 2 * 30 + 300 - 7)} left"
    state.global_step = 10
    for name in ("step_end", "evaluate", "save"):
        event(name, 1)
    assert bars._pace.left() == "0:00:00 left"


def test_without_a_period_one_checkpoint_is_left(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    bars, _ = shown()
    bars._state.save_steps = 0
    for step in range(1, 4):
        bars._state.global_step = step
        bars.on_step_end(ARGS, bars._state, None)
    assert bars._pace._due("checkpoint", "steps", 0, bars._state) == 1


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_the_losses_of_all_sources(width):
    bars, _ = shown()
    names = ["code", "documentation", "mathematics", "reasoning", "records"]
    bars.on_log(ARGS, state_at(4), None, {"loss": 3.0} | {f"loss/{name}": 3.25 for name in names})
    assert all(f"{name} 3.250" in view(bars, width) for name in names)


def test_each_set_is_counted_from_its_first_batch():
    bars, _ = shown()
    for loader in ([0] * 3, [0] * 2):
        for batch in range(1, len(loader) + 1):
            bars.on_prediction_step(ARGS, bars._state, None, eval_dataloader=loader)
            assert f"batch {batch}/{len(loader)}" in view(bars)
        bars.on_predict(ARGS, bars._state, None, {})
    bars.on_evaluate(ARGS, bars._state, None)
    assert "batch" not in view(bars)


@pytest.fixture
def handled():
    """Ctrl-C raises an error. A process in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupted(config, tmp_path, monkeypatch, capsys, handled):
    """`interrupted(times)` presses Ctrl-C in step 3 of a run, and returns its folder and what it printed."""

    def run(times):
        count = TrainingProgress.on_step_end

        def press(self, args, state, control, **kwargs):
            count(self, args, state, control, **kwargs)
            for _ in range(times * (state.global_step == 3)):
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(TrainingProgress, "on_step_end", press)
            main(["--config", str(config), "--output_dir", str(tmp_path / "cut"), "--save_steps", "100"])
        assert stop.value.code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return tmp_path / "cut", capsys.readouterr().out

    return run


def test_ctrl_c_saves_and_the_printed_command_goes_on(interrupted, finished, capsys):
    folder, text = interrupted(times=1)
    assert is_complete(folder / "checkpoint-3") and not (folder / "README.md").exists()
    command = next(line for line in text.splitlines() if line.startswith("hf-nexus train"))
    main(["--config", *command.split()[2:]])
    assert f"Resuming after step 3 from {folder / 'checkpoint-3'}" in capsys.readouterr().out
    assert same(saved_weights(folder), saved_weights(finished))


@pytest.mark.parametrize("saves", [False, True])
def test_ctrl_c_after_the_last_step_loses_nothing(config, tmp_path, monkeypatch, handled, saves):
    """A checkpoint comes too late. A run that has one of its last step stops."""
    monkeypatch.setattr(TrainingProgress, "on_train_end", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT))
    flags = ["--config", str(config), "--output_dir", str(tmp_path), "--save_strategy", "steps" if saves else "no"]
    with pytest.raises(SystemExit) if saves else nullcontext():
        main([*flags, "--save_steps", str(STEPS)])
    assert (tmp_path / f"checkpoint-{STEPS}").exists() == saves
    assert (tmp_path / "README.md").exists() != saves


@pytest.mark.parametrize(("step", "world_size", "after"), [(2, 1, "evaluation"), (0, 1, "step"), (2, 2, "step")])
def test_ctrl_c_says_what_it_waits_for(step, world_size, after):
    written = io.StringIO()
    callback, args = SaveOnSignal(Console(file=written, width=120)), SimpleNamespace(world_size=world_size)
    callback.on_prediction_step(args, state_at(step), None)
    callback._request(signal.SIGTERM, None)
    assert written.getvalue().strip() == f"Saving a checkpoint once the {after} is complete."


def test_a_second_ctrl_c_does_not_wait(interrupted):
    folder, text = interrupted(times=2)
    assert not list(folder.glob("checkpoint-*")) and "nothing was saved yet" in text


def test_sigterm_after_training_has_its_first_handler():
    """The Trainer restores it at the end of training, and not the one of its just-in-time checkpoints."""
    with keeping_handler():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        with SaveOnSignal(Console(quiet=True)).listening(sigterm=True):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_processes_agree_on_the_step_after_which_they_save(monkeypatch):
    store = HashStore()
    monkeypatch.setattr("hf_nexus.pretrain.progress._get_default_store", lambda: store)
    callbacks = [SaveOnSignal(Console(quiet=True)) for _ in range(3)]
    first, second, later = callbacks
    second._key = first._key  # as in the other process of the same run

    def saves(callback, step):
        control = TrainerControl()
        callback.on_step_end(SimpleNamespace(world_size=2), TrainerState(global_step=step), control)
        return control.should_save and control.should_training_stop

    first.requested = signal.SIGTERM
    assert not saves(first, 3) and not saves(second, 3)
    assert saves(first, 4) and saves(second, 4) and second.requested == signal.SIGTERM
    assert not saves(later, 5)  # another run of the same processes
