"""The planner's formulas: memory against what is allocated, time and traffic against what they are made of."""

import gc
import io
import json
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells of its every start and stop

import pytest
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_nexus.pretrain.console import cost_table, format_bytes
from hf_nexus.pretrain.cost import estimate_cost
from hf_nexus.pretrain.memory import estimate_memory, sharding_of
from hf_nexus.pretrain.model import build_model, count_parameters, model_config
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.plan import plan_run
from tests.support.launcher import launch
from tests.support.tiny import VOCAB
from tests.support.tiny_config import write_config
from tests.trainer.distributed.memory_worker import SHAPE

PAGE = Path(__file__).parents[2] / "docs" / "pretrain_3b.md"
ROWS, LENGTH, K = 3, 128, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def plan(*flags: str, config: Any = "3b") -> Any:
    return parse_arguments(["--config", str(config), "--dry_run", *flags])


# ---- Memory ----


class PackedRows(torch.utils.data.Dataset):
    """Rows of random tokens; with `document`, of so many tokens that do not attend to those of other documents."""

    def __init__(self, rows: int, length: int, document: int | None):
        self.ids, self.document = torch.randint(304, (rows, length)), document

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = {"input_ids": self.ids[i], "labels": self.ids[i]}
        return {**row, "position_ids": torch.arange(len(self.ids[i])) % self.document} if self.document else row


class AfterSecondStep(TrainerCallback):
    def __init__(self, call: Any):
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.call()


def allocated(train: Any, folder: Path) -> tuple[int, int]:
    """Bytes held by what `train(at_the_end)` allocates when it calls `at_the_end`, and the most held at once."""
    gc.collect()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    profiler.start()
    train(profiler.stop)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return live, peak


def measure(arguments: Any, make_trainer: Any, folder: Path, document: int | None) -> tuple[int, int]:
    """As `allocated`, of two outer steps."""
    t, length = arguments.training, arguments.mixture.sequence_length
    rows, k = t.per_device_train_batch_size, t.gradient_accumulation_steps
    settings = {name: getattr(t, name) for name in ("bf16", "gradient_checkpointing", "nexus", "inner_direction")}
    settings |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": k, "logging_strategy": "no"}

    def train(at_the_end: Any) -> None:
        model = build_model(model_config(arguments.model, length))
        data, callback = PackedRows(8 * rows, length, document), AfterSecondStep(at_the_end)
        make_trainer(data, model=model, **settings, trainer_kwargs={"callbacks": [callback]}).train()

    return allocated(train, folder)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--isolate_documents", "false"],
        ["--bf16"],
        ["--gradient_checkpointing"],
        ["--no_nexus"],
        ["--inner_direction", "random"],
    ],
    ids=" ".join,
)
def test_memory_is_what_is_allocated_within_a_tenth(config, make_trainer, tmp_path, flags):
    shape = ["--hidden_size", "64", "--intermediate_size", "128", "--num_hidden_layers", "3"]
    size = ["--sequence_length", str(LENGTH), "--per_device_train_batch_size", str(ROWS)]
    arguments = plan(*shape, *size, "--gradient_accumulation_steps", str(K), *flags, config=config)
    document = 16 if arguments.mixture.isolate_documents is None else None
    held, peak = measure(arguments, make_trainer, tmp_path, document)
    estimate = estimate_memory(arguments, count_parameters(model_config(arguments.model, LENGTH)), 1)
    assert estimate.held == pytest.approx(held, rel=0.1)
    assert estimate.total == pytest.approx(peak, rel=0.1)


def test_the_mask_of_documents_costs_what_grows_with_the_row(config):
    short, long = (estimate_memory(plan("--sequence_length", n, config=config), 0, 1) for n in ("32", "64"))
    assert long.activations - 2 * short.activations == 2 * 64 * 2 * (4 * 64 - 4 * 32)  # rows, tokens, layers, 4T
    assert "4T" in long.formula
    without = [plan("--sequence_length", n, "--isolate_documents", "false", config=config) for n in ("32", "64")]
    assert estimate_memory(without[1], 0, 1).activations == 2 * estimate_memory(without[0], 0, 1).activations
    kernel = estimate_memory(plan("--attn_implementation", "flash_attention_2"), 0, 1)
    assert kernel.activations < estimate_memory(plan(), 0, 1).activations


def test_shards_of_two_ranks(config, tmp_path):
    """Counted on CPU processes, which gather no layer ahead of the one at work; the estimate counts one."""
    flags = [f"--{name}={value}" for name, value in {**SHAPE, "num_key_value_heads": 2, "vocab_size": VOCAB}.items()]
    arguments = plan(*flags, "--sharding", "fsdp2", config=config)
    shape = model_config(arguments.model, 32)
    estimate = estimate_memory(arguments, count_parameters(shape), 2)
    layer = sum(p.numel() for p in build_model(shape).model.layers[0].parameters())
    for rank in launch("tests.trainer.distributed.memory_worker", 2, tmp_path):
        assert estimate.gathered - 4 * layer == rank["gathered"]
        assert estimate.held == pytest.approx(rank["held"], rel=0.03)


def test_fsdp2_shares_all_that_is_counted_per_parameter():
    size = 2_969_742_336
    whole, eight = (estimate_memory(plan("--sharding", "fsdp2"), size, devices) for devices in (1, 8))
    assert (whole.held, eight.held) == (16 * size, 2 * size)
    assert whole.gathered == 0 < eight.gathered
    assert "DDP gradient buckets" not in eight.per_parameter


def test_sharding_is_what_is_asked_for_or_what_the_launcher_says(monkeypatch):
    assert sharding_of(plan()) == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_of(plan()) == "fsdp2"
    assert sharding_of(plan("--sharding", "ddp")) == "ddp"


def test_local_mode_is_refused_under_fsdp2_as_in_training():
    with pytest.raises(ValueError, match="inner_sync='local' is not possible with FSDP2"):
        plan_run(plan("--sharding", "fsdp2", "--inner_sync", "local"), 8)


def test_local_mode_needs_the_pseudo_gradients_twice_at_the_end_of_a_window(config):
    flags = ["--inner_sync", "local"]
    many = 10**8  # parameters, beside which the activations are nothing
    assert estimate_memory(plan(*flags, config=config), many, 2).total == 28 * many
    assert estimate_memory(plan(*flags, config=config), many, 1).total == pytest.approx(20 * many, rel=0.001)


# ---- Time ----


def cost(*flags: str, devices: int = 8) -> Any:
    arguments = plan("--peak_tflops", "1000", "--mfu", "0.5", "--link", "100", *flags)
    return estimate_cost(arguments, 10**9, 10**6, devices)


def test_arithmetic_is_six_operations_per_parameter_and_token():
    assert cost().compute == pytest.approx(6e15 / (0.5 * 1e15 * 8))
    assert cost("--gradient_checkpointing").compute == pytest.approx(cost().compute * 4 / 3)
    assert cost("--mfu", "0.25").compute == pytest.approx(2 * cost().compute)


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ([], 8 * 2 * 4e9 * 7 / 8),
        (["--inner_sync", "local"], 2 * 4e9 * 7 / 8),
        (["--no_nexus"], 2 * 4e9 * 7 / 8),
        (["--sharding", "fsdp2"], 8 * 3 * 2e9 * 7 / 8),
        (["--sharding", "fsdp2", "--bf16", "false"], 8 * 3 * 4e9 * 7 / 8),
    ],
)
def test_bytes_sent_per_step(flags, sent):
    found = cost(*flags)
    assert found.sent == sent and found.communication == pytest.approx(sent / 100e9)


def test_one_device_sends_nothing_and_one_reduction_cannot_hide():
    assert cost(devices=1).sent == 0 and cost(devices=1).best == cost(devices=1).worst == cost(devices=1).compute
    assert cost().best == max(cost().compute, cost().communication) < cost().worst
    assert cost("--inner_sync", "local").best == cost("--inner_sync", "local").worst


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "3.74 to 5.22 s, with or without overlap with the backward pass"),
        (["--inner_sync", "local"], "1.94 s, sent after the last pass"),
    ],
)
def test_the_table_says_what_hides(flags, words):
    arguments = plan(*flags)
    found = plan_run(arguments, 64)
    console = Console(width=200, file=io.StringIO())
    console.print(cost_table(found.cost, arguments.hardware, found.steps))
    assert words in console.file.getvalue()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mfu", "40"], ["--mfu: 40.0", "above 0 and of at most 1"]),
        (["--link", "0"], ["--link: 0.0", "above 0"]),
        (["--price_per_hour", "-1"], ["--price_per_hour: -1.0"]),
        (["--sharding", "fsdp"], ["'fsdp'", "'fsdp2'"]),
    ],
)
def test_a_wrong_assumption_is_named(flags, words):
    with pytest.raises(ValueError) as error:
        plan(*flags)
    assert all(word in str(error.value) for word in words)


# ---- The page ----


def figures(flags: list[str]) -> list[str]:
    """Memory, arithmetic, communication, step, days and price of a plan, as the page prints them."""
    arguments, price = plan(*flags), 3
    found = plan_run(arguments, arguments.hardware.devices or arguments.model.accelerators)
    c = found.cost
    assert found.steps is not None
    days = [found.steps * seconds / 86400 for seconds in (c.best, c.worst)]
    pairs = [(c.best, c.worst), tuple(days), tuple(d * 24 * c.devices * price / 1000 for d in days)]
    ranges = [" to ".join(dict.fromkeys(f"{float(f'{x:.3g}'):,.10g}" for x in pair)) for pair in pairs]
    sent = f"{c.communication:.3g} s ({format_bytes(c.sent)})" if c.sent else "-"
    return [format_bytes(found.memory.total), f"{c.compute:.3g} s", sent, f"{ranges[0]} s", *ranges[1:]]


ROW = re.compile(r"^\| `(--[^`]*)` \| (.*) \|$", re.M)


def page_with_figures(text: str) -> str:
    return ROW.sub(lambda row: f"| `{row[1]}` | {' | '.join(figures(row[1].split()))} |", text)


def test_every_number_of_the_page_is_the_planners():
    text = PAGE.read_text()
    assert len(ROW.findall(text)) >= 8
    assert page_with_figures(text) == text


SMALL = {
    "15,537,792": "8192 384 1024 7 6 6 8 256 --isolate_documents false",
    "132,144,384": "49152 768 2048 15 12 4 1 512",
}
NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "per_device_train_batch_size",
    "sequence_length",
)


def measured_row(parameters: str, config: Path) -> tuple[Any, float, str, str]:
    """The arguments of a row of the page, with what it says was allocated (MB) and computed, and the difference."""
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {parameters} |"))
    *_, measured, computed, difference = (cell.strip() for cell in row.strip("|").split("|"))
    values, flags = SMALL[parameters].split()[: len(NAMES)], SMALL[parameters].split()[len(NAMES) :]
    shape = [word for name, value in zip(NAMES, values, strict=True) for word in (f"--{name}", value)]
    arguments = plan(*shape, *flags, "--gradient_accumulation_steps", str(K), config=config)
    return arguments, float(measured.removesuffix(" MB").replace(",", "")), computed, difference


@pytest.mark.slow
@pytest.mark.parametrize("parameters", SMALL)
def test_the_recorded_measurements_are_repeated(config, parameters, make_trainer, tmp_path):
    """A few gigabytes of memory, and of trace."""
    arguments, recorded, _, _ = measured_row(parameters, config)
    length = arguments.mixture.sequence_length
    document = length // 4 if arguments.mixture.isolate_documents is None else None
    _, peak = measure(arguments, make_trainer, tmp_path, document)
    assert peak / 1e6 == pytest.approx(recorded, rel=0.005)


def test_the_attentions_scores_are_what_the_page_says():
    """12 T L h operations per token, half of them where a kernel skips what a causal mask hides, beside 6N."""
    model = plan().model
    length, layers, width = plan().mixture.sequence_length, model.num_hidden_layers, model.hidden_size
    share = 12 * length * layers * width / (6 * count_parameters(model_config(model, length)))
    assert f"({100 * share / 2:.0f} % more at {length} tokens" in PAGE.read_text()
    assert f"{100 * share:.0f} % where none is skipped" in PAGE.read_text()


@pytest.mark.parametrize("parameters", SMALL)
def test_the_recorded_measurements_are_met_within_a_tenth(config, parameters):
    arguments, allocated, computed, difference = measured_row(parameters, config)
    size = count_parameters(model_config(arguments.model, arguments.mixture.sequence_length))
    found = estimate_memory(arguments, size, 1).total / 1e6
    assert (f"{size:,}", f"{found:,.1f} MB") == (parameters, computed)
    assert f"{100 * (found / allocated - 1):.1f} %" == difference
    assert found == pytest.approx(allocated, rel=0.1)


if __name__ == "__main__":
    PAGE.write_text(page_with_figures(PAGE.read_text()))
