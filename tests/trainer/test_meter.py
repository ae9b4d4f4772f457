import torch
from transformers import TrainerState

from hf_nexus.trainer.meter import TrainingMeter, peak_flops

CPU = torch.device("cpu")


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def count(meter: TrainingMeter, source: str, mean_loss: float, tokens: int) -> None:
    meter.add_micro_batch(source, torch.tensor(mean_loss * tokens), torch.tensor(tokens))
    meter.on_optimizer_step(None, None, None)


def test_losses_are_token_weighted_since_the_last_reading_and_tokens_add_up():
    meter = TrainingMeter(["text", "code"])
    count(meter, "text", 2.0, 10)
    count(meter, "text", 1.0, 30)
    figures = meter.read(alone, CPU)
    assert figures["loss/text"] == 1.25
    assert "loss/code" not in figures
    assert (figures["tokens/text"], figures["tokens/code"]) == (40, 0)
    count(meter, "code", 3.0, 5)
    figures = meter.read(alone, CPU)
    assert figures["loss/code"] == 3.0
    assert "loss/text" not in figures
    assert (figures["tokens/text"], figures["tokens/code"]) == (40, 5)


def test_figures_of_two_ranks_are_summed_and_averaged():
    meter = TrainingMeter(["text"])
    count(meter, "text", 2.0, 10)
    meter.add_window(torch.tensor(0.5), steps_taken=4, steps_skipped=2, finite=torch.tensor(True))
    meter.on_optimizer_step(None, None, None)
    figures = meter.read(lambda tensor: 2 * tensor, CPU)  # the other rank saw the same
    assert figures["tokens/text"] == 20
    assert figures["loss/text"] == 2.0
    assert figures["pseudo_gradient_norm"] == 0.5
    assert figures["path_cosine"] == 0.0  # (4 * 0.25 - 1) / 3
    assert figures["inner_steps_skipped"] == 2


def test_totals_settled_at_a_checkpoint_are_not_counted_twice():
    meter = TrainingMeter(["text"])
    count(meter, "text", 2.0, 10)
    meter.settle(alone, CPU)
    assert meter.state()["attributes"]["trained_tokens"] == {"text": 10}
    figures = meter.read(alone, CPU)
    assert figures["tokens/text"] == 10
    assert figures["loss/text"] == 2.0  # the interval's loss is still whole


def test_a_window_counts_once_the_optimizer_has_stepped():
    meter = TrainingMeter(["text"])
    meter.add_micro_batch("text", torch.tensor(20.0), torch.tensor(10))
    meter.settle(alone, CPU)
    assert meter.trained_tokens == {"text": 0}
    meter.on_step_begin(None, None, None)  # it was broken off, and another begins
    count(meter, "text", 2.0, 10)
    meter.settle(alone, CPU)
    assert meter.trained_tokens == {"text": 10}


def test_a_resumed_run_goes_on_from_the_totals_and_a_new_one_from_zero():
    old = TrainingMeter(["text"])
    count(old, "text", 2.0, 10)
    old.settle(alone, CPU)
    resumed = TrainerState(global_step=3, stateful_callbacks={"TrainingMeter": old.state()})
    meter = TrainingMeter(["text"])
    meter.on_train_begin(None, resumed, None)
    assert meter.trained_tokens == {"text": 10}
    old.on_train_begin(None, TrainerState(stateful_callbacks={"TrainingMeter": old.state()}), None)
    assert old.trained_tokens == {"text": 0}


def test_ranks_without_a_step_do_not_bend_the_means():
    meter = TrainingMeter(["text"])
    meter.add_window(torch.tensor(0.5), steps_taken=2, steps_skipped=0, finite=torch.tensor(True))
    meter.on_optimizer_step(None, None, None)

    def with_an_idle_rank(tensor: torch.Tensor) -> torch.Tensor:
        idle = torch.zeros_like(tensor)
        idle[-1] = 1  # it counts as a rank
        return tensor + idle

    figures = meter.read(with_an_idle_rank, CPU)
    assert figures["pseudo_gradient_norm"] == 0.5
    assert figures["path_cosine"] == -0.5


def test_an_interval_without_a_finite_loss_has_none():
    meter = TrainingMeter(["text"])
    meter.add_window(None, steps_taken=0, steps_skipped=4, finite=torch.tensor(False))
    meter.on_optimizer_step(None, None, None)
    figures = meter.read(alone, CPU)
    assert figures["loss"] != figures["loss"]
    assert figures["inner_steps_skipped"] == 4


def test_pauses_do_not_count_as_training_time():
    meter = TrainingMeter(["text"])
    count(meter, "text", 1.0, 10)
    meter.pause(-1e6)  # a million seconds longer
    assert meter.read(alone, CPU)["tokens_per_second"] < 1e-4


def test_one_nameless_source_is_counted_but_not_named():
    meter = TrainingMeter()
    count(meter, "", 1.0, 10)
    figures = meter.read(alone, CPU)
    assert "tokens_per_second" in figures
    assert not [key for key in figures if "/" in key]


def test_peak_is_known_by_the_devices_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda", 0)) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus")
    assert peak_flops(torch.device("cuda", 0)) is None
    assert peak_flops(CPU) is None
