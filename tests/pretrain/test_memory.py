"""The planner's formulas of memory against the memory that is allocated."""

import gc
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler logs each start and stop

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, TrainerCallback

from hf_nexus.pretrain import layout
from hf_nexus.pretrain.layout import layout_of
from hf_nexus.pretrain.memory import MemoryEstimate, estimate_memory
from hf_nexus.pretrain.model import build_model, count_parameters, model_config
from tests.support.tiny_config import planned

PAGE = Path(__file__).parents[2] / "docs" / "cost.md"
ROWS, LENGTH, K = 3, 128, 2


def memory_of(arguments, parameters: int, devices: int) -> MemoryEstimate:
    return estimate_memory(arguments, parameters, layout_of(arguments, devices))


# ---- Allocated memory ----


class PackedRows(torch.utils.data.Dataset):
    """Rows of random tokens; with `document`, of isolated documents of this length."""

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
    """Bytes that `train(at_the_end)` holds when it calls `at_the_end`, and the peak."""
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
    """The result of `allocated` for two outer steps."""
    t, length = arguments.training, arguments.mixture.sequence_length
    rows, k = t.per_device_train_batch_size, t.gradient_accumulation_steps
    settings = {name: getattr(t, name) for name in ("bf16", "activation_checkpointing", "nexus", "inner_direction")}
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
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (
                ["--no_nexus"],
                ["--isolate_documents", "false"],
                ["--bf16"],
                ["--activation_checkpointing"],
                ["--inner_direction", "random"],
            )
        ),
    ],
    ids=" ".join,
)
def test_memory_is_allocated_as_estimated_within_a_tenth(config, make_trainer, tmp_path, flags):
    shape = ["--hidden_size", "64", "--intermediate_size", "128", "--num_hidden_layers", "3"]
    size = ["--sequence_length", str(LENGTH), "--per_device_train_batch_size", str(ROWS)]
    arguments = planned(config, *shape, *size, "--gradient_accumulation_steps", str(K), *flags)
    document = 16 if arguments.mixture.isolate_documents is None else None
    held, peak = measure(arguments, make_trainer, tmp_path, document)
    estimate = memory_of(arguments, count_parameters(model_config(arguments.model, LENGTH)), 1)
    assert estimate.held == pytest.approx(held, rel=0.1)
    assert estimate.total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("flags", [[], ["--bf16"], ["--activation_checkpointing"]])
def test_activations_are_those_saved_for_the_backward_pass(config, flags):
    # The number of tokens (96) is not a dimension of a weight, which identifies copies of weights.
    shape = ["--isolate_documents", "false", "--per_device_train_batch_size", "3", "--hidden_size", "64"]
    shape += ["--num_hidden_layers"]
    estimates, measured = [], []
    for layers in ("2", "5"):
        arguments = planned(config, *shape, layers, *flags)
        estimates.append(memory_of(arguments, 0, 1).activations)
        measured.append(saved_bytes(arguments))
    # The layers are counted exactly. The head adds what the backward pass allocates.
    assert estimates[1] - estimates[0] == pytest.approx(measured[1] - measured[0], rel=0.02)
    assert measured[0] <= estimates[0]


def saved_bytes(arguments) -> int:
    """Bytes of distinct storages saved for the backward pass of a micro-batch, copies of weights left out."""
    model = build_model(model_config(arguments.model, arguments.mixture.sequence_length)).train()
    if arguments.training.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(reversed(p.shape)) for p in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(
        arguments.training.per_device_train_batch_size, arguments.mixture.sequence_length, dtype=torch.long
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=arguments.training.bf16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), autocast:
        output = model(input_ids=ids, labels=ids)
    assert output.loss.isfinite()
    return sum(sizes.values())


# ---- Formulas ----


@pytest.mark.parametrize(
    ("flags", "bytes_per_parameter"),
    [
        ([], 4 + 4 + 8 + 4),
        (["--snapshot_device", "cpu"], 4 + 4 + 8),
        (["--no_nexus"], 4 + 4 + 8),
        (["--inner_direction", "random"], 4 + 4 + 8 + 8),
        (["--inner_direction", "random", "--inner_lr", "0"], 4 + 4 + 8 + 4),
        (["--bf16"], 4 + 4 + 8 + 4 + 2),
    ],
)
def test_memory_per_parameter(config, flags, bytes_per_parameter):
    arguments = planned(config, *flags)
    assert sum(memory_of(arguments, 1000, 1).per_parameter.values()) == bytes_per_parameter
    assert sum(memory_of(arguments, 1000, 2).per_parameter.values()) == bytes_per_parameter + 4


def test_the_precision_of_a_launcher_is_planned(config, monkeypatch):
    chosen = memory_of(planned(config, "--bf16"), 1000, 1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does
    assert memory_of(planned(config), 1000, 1) == chosen


@pytest.mark.parametrize("flags", [["--optim", "adafactor"], ["--matrix_optimizer", "muon"]], ids=str)
def test_the_plan_knows_only_the_state_of_adamw(config, flags):
    assert "AdamW moments" in memory_of(planned(config), 1000, 1).per_parameter
    assert "optimizer state, taken as AdamW's" in memory_of(planned(config, *flags), 1000, 1).per_parameter


def test_the_mask_of_documents_grows_with_the_row(config):
    short, long = (memory_of(planned(config, "--sequence_length", n), 0, 1) for n in ("32", "64"))
    assert long.activations - 2 * short.activations == 2 * 64 * 2 * (4 * 64 - 4 * 32)  # rows, tokens, layers, 4T
    assert "4T" in long.formula
    without = [planned(config, "--sequence_length", n, "--isolate_documents", "false") for n in ("32", "64")]
    assert memory_of(without[1], 0, 1).activations == 2 * memory_of(without[0], 0, 1).activations
    kernel = memory_of(planned("3b", "--attn_implementation", "flash_attention_2"), 0, 1)
    assert kernel.activations < memory_of(planned("3b"), 0, 1).activations


def test_fsdp2_shares_the_bytes_per_parameter():
    size = 2_969_742_336
    whole, eight = (memory_of(planned("3b", "--sharding", "fsdp2"), size, devices) for devices in (1, 8))
    assert (whole.held, eight.held) == (16 * size, 2 * size)
    assert whole.gathered == 0 < eight.gathered
    assert "DDP gradient buckets" not in eight.per_parameter
    machines = memory_of(planned("3b", "--sharding", "fsdp2", "--inner_sync", "node"), size, 64)
    assert machines.held == eight.held  # shared inside each machine of 8


def test_tensor_parallelism_divides_an_untied_head():
    """Both the held and the gathered weights. Only the embeddings stay whole."""
    arguments = planned("3b", "--sharding", "fsdp2", "--tp_size", "8", "--tie_word_embeddings", "false")
    m, size = arguments.model, count_parameters(model_config(arguments.model, 4096))
    table = m.vocab_size * m.hidden_size
    layer = (size - 2 * table - m.hidden_size) // m.num_hidden_layers
    found = memory_of(arguments, size, 64)
    assert found.parameters == table + (size - table) // 8
    assert found.gathered == 2 * (table + (table + m.hidden_size) // 8 + 2 * layer // 8)


def test_the_formula_names_what_tensor_parallelism_divides():
    def formula(*flags: str) -> str:
        return memory_of(planned("3b", "--tp_size", "8", *flags), 10**9, 8).formula

    assert " with f, a divided by 8" in formula()  # the mask's keys and values are repeated for all heads
    assert " with kv, f, a divided by 8" in formula("--isolate_documents", "false")
    assert "divided" not in formula("--activation_checkpointing")


def test_a_model_without_a_width_is_planned(config, tmp_path):
    content = yaml.safe_load(config.read_text())
    content["model"] = {"model_type": "blt", **{name: content["model"][name] for name in ("vocab_size", "tokenizer")}}
    path = tmp_path / "blt.yaml"
    path.write_text(yaml.safe_dump(content))
    assert memory_of(planned(path), 1000, 2).parameters == 1000
    with pytest.raises(ValueError, match="tp_size=2 is not planned for a blt: no hidden_size"):
        memory_of(planned(path, "--tp_size", "2"), 1000, 2)


def test_tensor_parallelism_divides_sizes_of_other_names(config, monkeypatch):
    monkeypatch.setattr(layout, "config_of", lambda arguments: GPT2Config(n_head=12))
    assert layout_of(planned(config, "--tp_size", "4"), 4).replicas == 1
    with pytest.raises(ValueError, match="tp_size=5 with num_attention_heads=12 is not possible"):
        layout_of(planned(config, "--tp_size", "5"), 5)


def test_sharding_is_the_flag_or_the_launchers(monkeypatch):
    assert layout_of(planned("3b"), 1).sharding == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert layout_of(planned("3b"), 1).sharding == "fsdp2"
    assert layout_of(planned("3b", "--sharding", "ddp"), 1).sharding == "ddp"


# ---- Recorded measurements ----


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
    """The arguments of a row of the page, its allocated (MB) and computed bytes, and the difference."""
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {parameters} |"))
    *_, measured, computed, difference = (cell.strip() for cell in row.strip("|").split("|"))
    values, flags = SMALL[parameters].split()[: len(NAMES)], SMALL[parameters].split()[len(NAMES) :]
    shape = [word for name, value in zip(NAMES, values, strict=True) for word in (f"--{name}", value)]
    arguments = planned(config, *shape, *flags, "--gradient_accumulation_steps", str(K))
    return arguments, float(measured.removesuffix(" MB").replace(",", "")), computed, difference


@pytest.mark.slow
@pytest.mark.parametrize("parameters", SMALL)
def test_recorded_measurements_are_repeated(config, parameters, make_trainer, tmp_path):
    """Needs a few gigabytes for memory and the trace."""
    arguments, recorded, _, _ = measured_row(parameters, config)
    length = arguments.mixture.sequence_length
    document = length // 4 if arguments.mixture.isolate_documents is None else None
    _, peak = measure(arguments, make_trainer, tmp_path, document)
    assert peak / 1e6 == pytest.approx(recorded, rel=0.005)


@pytest.mark.parametrize("parameters", SMALL)
def test_recorded_measurements_are_met_within_a_tenth(config, parameters):
    arguments, allocated, computed, difference = measured_row(parameters, config)
    size = count_parameters(model_config(arguments.model, arguments.mixture.sequence_length))
    found = memory_of(arguments, size, 1).total / 1e6
    assert (f"{size:,}", f"{found:,.1f} MB") == (parameters, computed)
    assert f"{100 * (found / allocated - 1):.1f} %" == difference
    assert found == pytest.approx(allocated, rel=0.1)
