"""Whatever breaks off a window, the weights are the snapshot's, also for what is saved or evaluated right after."""

import functools
import signal

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from tests.conftest import Rows, tiny_llama


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Between(TrainerCallback):
    """Calls back with the model before and after each outer step."""

    def __init__(self, call):
        self.call = call

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.call(model)

    on_step_end = on_step_begin


class Bomb:
    """Raises at its `at`-th call."""

    def __init__(self, at: int, error: type[BaseException]):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("injected")


def break_forward(trainer, bomb):
    forward = trainer.model.forward

    @functools.wraps(forward)  # the Trainer reads the signature
    def broken(*args, **kwargs):
        bomb()
        return forward(*args, **kwargs)

    trainer.model.forward = broken
    return lambda: setattr(trainer.model, "forward", forward)


def break_compute_loss(trainer, bomb):
    compute_loss = trainer.compute_loss

    def broken(*args, **kwargs):
        result = compute_loss(*args, **kwargs)
        bomb()  # between forward and backward
        return result

    trainer.compute_loss = broken
    return lambda: setattr(trainer, "compute_loss", compute_loss)


def break_backward(trainer, bomb):
    handle = trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: bomb())
    return handle.remove


def break_collator(trainer, bomb):
    collate = trainer.data_collator

    def broken(rows):
        bomb()
        return collate(rows)

    trainer.data_collator = broken
    return lambda: setattr(trainer, "data_collator", collate)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("inner_step", [1, 2, 4])
@pytest.mark.parametrize("place", [break_forward, break_compute_loss, break_backward, break_collator])
def test_an_interrupted_window_leaves_the_weights_of_its_start(make_trainer, tmp_path, place, inner_step, error):
    trainer = make_trainer(Rows(64, 0), max_steps=3, trainer_kwargs={"eval_dataset": Rows(4, 1)})
    steps = [weights(trainer.model)]  # fetching runs ahead: a collator may break before the first step begins
    trainer.add_callback(Between(lambda model: steps.append(weights(model))))
    undo = place(trainer, Bomb(4 + inner_step, error))  # in the second window
    with pytest.raises(error, match="injected"):
        trainer.train()
    undo()
    start = steps[-1]
    assert torch.equal(weights(trainer.model), start)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "after"))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "after", attn_implementation="eager")
    assert torch.equal(weights(saved), start)
    fresh = Trainer(model=saved, args=trainer.args, eval_dataset=Rows(4, 1))
    assert fresh.evaluate()["eval_loss"] == loss


def test_training_goes_on_after_an_interrupt_as_if_resumed(make_trainer, tmp_path):
    """A window broken off and trained again from the checkpoint gives the uninterrupted run."""
    whole = make_trainer(Rows(64, 0), max_steps=4)
    whole.train()
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run")}
    broken = make_trainer(Rows(64, 0), **config)
    undo = break_compute_loss(broken, Bomb(4 * 2 + 3, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    undo()
    again = make_trainer(Rows(64, 0), model=tiny_llama(seed=5), **config)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))


def test_out_of_memory_inside_a_window_shrinks_the_batch_and_starts_from_clean_weights(make_trainer):
    starts = []
    trainer = make_trainer(
        Rows(64, 0), max_steps=2, per_device_train_batch_size=4, auto_find_batch_size=True, learning_rate=0.0
    )
    trainer.add_callback(Between(lambda model: starts.append(weights(model))))
    forward = trainer.model.forward

    @functools.wraps(forward)
    def limited(*args, input_ids=None, **kwargs):
        limited.calls += 1
        if len(input_ids) > 2 and limited.calls == 3:
            raise RuntimeError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    limited.calls = 0
    trainer.model.forward = limited
    trainer.train()
    assert trainer._train_batch_size < 4
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert trainer.state.global_step == 2


def test_saving_in_the_middle_of_a_window_from_a_callback_sees_clean_weights(make_trainer, tmp_path):
    class Saver(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    seen = []
    trainer = make_trainer(Rows(64, 0), max_steps=1, learning_rate=0.0, trainer_kwargs={"callbacks": [Saver()]})
    start = weights(trainer.model)
    trainer.train()
    assert len(seen) == 3
    assert all(torch.equal(at, start) for at in seen)


def test_signals_at_any_moment_leave_the_weights_as_they_were(make_trainer, tmp_path):
    """A real timer interrupts training wherever it happens to be; without learning, any change is a displacement."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    random, steps = torch.Generator().manual_seed(0), []

    def arm(model):
        steps.append(trainer.state.global_step)
        if trainer.state.global_step == 2 and steps[-2] == 2:  # its beginning, after two whole windows
            signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.2 * float(torch.rand((), generator=random)))

    trainer = make_trainer(Rows(64, 0), max_steps=1000, learning_rate=0.0, inner_lr=1.0, logging_steps=1000)
    trainer.add_callback(Between(arm))
    trainer.eval_dataset = Rows(4, 1)
    start, loss = weights(trainer.model), trainer.evaluate()["eval_loss"]
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(12):
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert steps[-1] >= 2
            assert trainer.evaluate()["eval_loss"] == loss
            assert torch.equal(weights(trainer.model), start)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
