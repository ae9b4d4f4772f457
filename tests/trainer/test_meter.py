"""TrainingMeter alone: totals, averages of an interval, and when a window counts."""

import time
from argparse import Namespace
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_nexus.trainer.meter import TOTALS_NAME, TrainingMeter, peak_flops, read_totals
from hf_nexus.trainer.window import Window

CPU = torch.device("cpu")


def meter_of(*sources: str) -> TrainingMeter:
    return TrainingMeter(sources, CPU)


def count(meter: TrainingMeter, source: str, mean_loss: float, tokens: int) -> int:
    """Count one window with one micro-batch, and return the next step."""
    step = meter._effects.step + 1
    meter.begin_window(step, "tokens")
    meter.add_micro_batch({source: 1}, torch.tensor(mean_loss * tokens), torch.tensor(tokens))
    return step + 1


def add_path(
    meter: TrainingMeter, norm: Tensor | None, cosine: Tensor | None, losses: Tensor, steps_taken: int
) -> None:
    """Add the path of a window, without its micro-batches."""
    nexus = Namespace(pseudo_gradient_norm=norm, path_cosine=cosine, steps_taken=steps_taken, taken=[])
    meter.add_walk(Window(), losses, nexus)


def other_ranks(monkeypatch: pytest.MonkeyPatch, add: Callable[[Tensor], Tensor]) -> None:
    monkeypatch.setattr("hf_nexus.trainer.meter.sum_over_ranks", add)


def test_losses_are_token_weighted_since_the_last_reading():
    meter = meter_of("text", "code")
    count(meter, "text", 2.0, 10)
    logs = meter.read(count(meter, "text", 1.0, 30))
    assert logs["loss/text"] == 1.25
    assert "loss/code" not in logs
    assert (logs["tokens/text"], logs["tokens/code"]) == (40, 0)
    logs = meter.read(count(meter, "code", 3.0, 5))
    assert logs["loss/code"] == 3.0
    assert "loss/text" not in logs
    assert (logs["tokens/text"], logs["tokens/code"]) == (40, 5)


def test_numbers_of_two_ranks_are_summed_or_averaged(monkeypatch):
    other_ranks(monkeypatch, lambda tensor: 2 * tensor)  # the other rank has the same counts
    meter = meter_of("text")
    step = count(meter, "text", 2.0, 10)
    add_path(meter, torch.tensor(0.5), torch.tensor(0.25), torch.ones(4), steps_taken=2)
    logs = meter.read(step)
    assert logs["tokens/text"] == 20
    assert logs["loss/text"] == 2.0
    assert logs["pseudo_gradient_norm"] == 0.5
    assert logs["path_cosine"] == 0.25
    assert logs["inner_steps_skipped"] == 2


def test_totals_of_a_checkpoint_are_not_counted_twice():
    meter = meter_of("text")
    step = count(meter, "text", 2.0, 10)
    meter.update_totals(step)
    assert meter.state()["trained_tokens"] == {"text": 10}
    logs = meter.read(step)
    assert logs["tokens/text"] == 10
    assert logs["loss/text"] == 2.0  # of the whole interval


def test_a_window_counts_once_its_step_is_over():
    meter = meter_of("text")
    meter.begin_window(0, "tokens")
    meter.add_micro_batch({"text": 2}, torch.tensor(20.0), torch.tensor(10))
    meter.update_totals(0)
    assert meter.trained_tokens == {"text": 0}
    meter.begin_window(0, "tokens")  # interrupted, and repeated
    meter.add_micro_batch({"text": 2}, torch.tensor(20.0), torch.tensor(10))
    meter.update_totals(1)
    assert meter.trained_tokens == {"text": 10} and meter.rows == {"text": 2}


def test_mixed_micro_batches_count_tokens_by_source_only():
    meter = meter_of("text", "code")
    count(meter, "text", 2.0, 10)
    meter.add_micro_batch({"text": 1, "code": 3}, torch.tensor(80.0), torch.tensor(8))
    logs = meter.read(1)
    assert (logs["loss/text"], logs["tokens/text"], logs["tokens/code"]) == (2.0, 12, 6)
    assert "loss/code" not in logs and meter.rows == {"text": 2, "code": 3}


def test_a_resumed_run_continues_the_totals_of_its_sources():
    old = meter_of("text", "gone")
    old.update_totals(count(old, "text", 2.0, 10))
    meter = meter_of("text", "new")
    meter.begin(old.state())
    assert meter.trained_tokens == {"text": 10, "new": 0} and meter.rows == {"text": 1, "new": 0}
    old.begin({})
    assert old.trained_tokens == {"text": 0, "gone": 0}


def test_totals_are_read_as_they_were_saved(tmp_path):
    meter = meter_of("text", "code")
    meter.update_totals(count(meter, "text", 2.0, 10))
    meter.end()
    assert read_totals(None) == read_totals(str(tmp_path)) == {}
    meter.save(tmp_path)
    assert read_totals(str(tmp_path)) == meter.state()
    (tmp_path / TOTALS_NAME).write_bytes(bytes(64))  # after a power failure
    with pytest.raises(ValueError, match=r"totals\.json is damaged .*another checkpoint"):
        read_totals(str(tmp_path))


def test_tokens_that_are_read_are_logged_where_they_differ():
    meter = TrainingMeter(["text", "chat"], CPU, {"chat": 64})
    count(meter, "text", 2.0, 60)
    logs = meter.read(count(meter, "chat", 2.0, 5))
    assert (logs["tokens/chat"], logs["tokens_read/chat"]) == (5, 64) and "tokens_read/text" not in logs


def test_ranks_without_a_step_do_not_change_the_means(monkeypatch):
    def with_an_idle_rank(tensor: Tensor) -> Tensor:
        idle = torch.zeros_like(tensor)
        idle[-1] = 1  # counts as a rank
        return tensor + idle

    other_ranks(monkeypatch, with_an_idle_rank)
    meter = meter_of("text")
    meter.begin_window(0, "tokens")
    add_path(meter, torch.tensor(0.5), torch.tensor(-0.5), torch.ones(2), steps_taken=2)
    logs = meter.read(1)
    assert logs["pseudo_gradient_norm"] == 0.5
    assert logs["path_cosine"] == -0.5


def test_an_interval_without_a_finite_loss_logs_nan():
    meter = meter_of("text")
    meter.begin_window(0, "tokens")
    add_path(meter, None, None, torch.full((4,), torch.nan), steps_taken=0)
    logs = meter.read(1)
    assert logs["loss"] != logs["loss"]
    assert logs["inner_steps_skipped"] == 4


def test_pauses_do_not_count_as_training_time(monkeypatch):
    meter, clock, later = meter_of("text"), time.perf_counter, [0.0]
    monkeypatch.setattr("hf_nexus.trainer.meter.time.perf_counter", lambda: clock() + later[0])
    step = count(meter, "text", 1.0, 10)
    with meter.paused(), meter.paused():
        later[0] = 1e6  # a million seconds longer
    assert meter.read(step)["tokens_per_second"] > 1e-4  # positive: the inner pause is not counted again


def test_a_plain_dataset_is_counted_but_not_named():
    meter = meter_of("")
    logs = meter.read(count(meter, "", 1.0, 10))
    assert "tokens_per_second" in logs
    assert not [key for key in logs if "/" in key]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GH200 144G HBM3e", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        # parts and other chips of a similar name
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Abacus", None),
    ],
)
def test_the_peak_is_known_by_the_name_of_the_device(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
