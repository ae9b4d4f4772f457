"""The planner's formulas of time and traffic, and the numbers of the page on the 3B run."""

import re
from pathlib import Path
from typing import Any

import pytest

from hf_nexus.pretrain.cost import choose_sync, estimate_cost
from hf_nexus.pretrain.layout import layout_of
from hf_nexus.pretrain.model import count_parameters, model_config
from hf_nexus.pretrain.plan import plan_run
from hf_nexus.terminal import format_bytes
from tests.support.tiny_config import planned

PAGE = Path(__file__).parents[2] / "docs" / "pretrain_3b.md"
FORMULAS = PAGE.with_name("cost.md")


def cost(*flags: str, devices: int = 8) -> Any:
    arguments = planned("3b", "--peak_tflops", "1000", "--mfu", "0.5", "--link", "100", "--node_link", "400", *flags)
    return estimate_cost(arguments, 10**9, 10**6, layout_of(arguments, devices))


def chosen_sync(arguments: Any, devices: int) -> str | None:
    return choose_sync(arguments, 10**9, 10**6, layout_of(arguments, devices))


def total(found: Any) -> float:
    return found.during + found.after


def test_arithmetic_is_six_operations_per_parameter_token():
    assert cost().compute == pytest.approx(6e15 / (0.5 * 1e15 * 8))
    assert cost("--activation_checkpointing").compute == pytest.approx(cost().compute * 4 / 3)
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
    assert found.sent == sent and total(found) == pytest.approx(sent / 400e9)  # in one machine


@pytest.mark.parametrize("flags", [[], ["--inner_sync", "local"], ["--no_nexus"], ["--sharding", "fsdp2"]])
def test_a_ring_over_machines_is_as_slow_as_their_link(flags):
    for devices, machine, speed in [(8, 8, 400e9), (4, 8, 400e9), (8, 4, 100e9), (16, 8, 100e9)]:
        found = cost(*flags, "--devices_per_node", str(machine), devices=devices)
        assert total(found) == pytest.approx(found.sent / speed)


def test_machines_share_one_reduction_over_all_links():
    found = cost("--inner_sync", "node", devices=64)
    inside, gather, between = 8 * 2 * 4e9 * 7 / 8, 4e9 * 7 / 8, 2 * 4e9 / 8 * 7 / 8
    assert found.sent == inside + gather + between and found.links == ("link", "node_link")
    assert found.during == pytest.approx(inside / 400e9)
    assert found.after == pytest.approx(between / 100e9 + gather / 400e9)  # both follow the last backward pass
    assert found.best == pytest.approx(max(found.compute, found.during) + found.after)
    assert cost("--inner_sync", "node") == cost()  # one machine
    assert cost("--inner_sync", "node", "--reduce_dtype", "bfloat16") == cost("--reduce_dtype", "bfloat16")
    assert cost("--reduce_dtype", "bfloat16").sent == cost().sent / 2
    assert cost("--no_nexus", "--reduce_dtype", "bfloat16") == cost("--no_nexus")


@pytest.mark.parametrize(
    ("size", "devices", "during", "after"),
    [
        (4, 8, 400e9, 400e9),
        (4, 16, 400e9, 100e9),
        (16, 32, 100e9, 100e9),
        (6, 24, 100e9, 100e9),
        (1, 8, 400e9, 400e9),
    ],
)
def test_paths_that_are_no_machines_use_the_links_they_cross(size, devices, during, after):
    found = cost("--inner_sync", "node", "--node_size", str(size), devices=devices)
    inside = 4e9 * (size - 1) / size / during
    assert found.during == pytest.approx(8 * 2 * inside)
    assert found.after == pytest.approx(2 * 4e9 / size * (devices - size) / devices / after + inside)
    assert ("in a path" in found.formula) == (size > 1)


def test_shards_of_a_machine_are_sent_to_the_others_once():
    found = cost("--sharding", "fsdp2", "--inner_sync", "node", devices=64)
    inside, between = 8 * 3 * 2e9 * 7 / 8, 2 * 4e9 / 8 * 7 / 8
    assert found.sent == inside + between
    assert (found.during, found.after) == (pytest.approx(inside / 400e9), pytest.approx(between / 100e9))


@pytest.mark.parametrize(
    ("devices", "flags", "groups"),
    [
        (12, [], "12 ranks were to be split into groups of 4, 8"),
        (6, ["--devices_per_node", "4"], "6 ranks were to be split into groups of 2, 4"),
        (64, ["--node_size", "7"], "64 ranks were to be split into groups of 7"),
        (8, ["--node_size", "16"], "8 ranks were to be split into groups of 16"),
    ],
)
def test_paths_that_training_refuses_are_not_planned(devices, flags, groups):
    arguments = planned("3b", "--inner_sync", "node", *flags)
    chosen = chosen_sync(arguments, devices)
    assert chosen is not None and "node" not in chosen and "local" in chosen
    with pytest.raises(ValueError, match=groups):
        plan_run(arguments, devices)


def test_a_reduction_dtype_without_effect_is_not_planned():
    bf16 = ("--reduce_dtype", "bfloat16")
    with pytest.raises(ValueError, match="has no effect on a sharded model"):
        plan_run(planned("3b", "--sharding", "fsdp2", *bf16), 8)
    with pytest.raises(ValueError, match="which inner_sync='local' does not send"):
        planned("3b", "--inner_sync", "local", *bf16)


def test_a_machine_has_the_devices_that_the_launcher_says(monkeypatch):
    found = planned("3b")
    assert layout_of(found, 64).machine == 8
    monkeypatch.setattr(type(found.training), "world_size", 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert layout_of(found, 64).machine == 4
    assert layout_of(planned("3b", "--devices", "64"), 64).machine == 8
    assert layout_of(planned("3b", "--devices_per_node", "6"), 64).machine == 6


def test_the_plan_chooses_the_largest_groups_that_are_fast():
    def choice(link: str, *flags: str) -> str:
        chosen = chosen_sync(planned("3b", "--link", link, *flags), 64)
        assert chosen is not None
        return chosen.split()[0]

    assert choice("100000") == "global"
    assert choice("50") == "node"
    assert chosen_sync(planned("3b"), 1) is None
    in_a_machine = [chosen_sync(planned("3b", "--link", link), 8) for link in ("50", "450")]
    assert in_a_machine[0] == in_a_machine[1]
    assert choice("100000", "--sharding", "fsdp2") == "global"
    assert choice("50", "--sharding", "fsdp2") == "node"


def test_tensor_parallelism_sends_activations():
    """Two reductions of a layer forward and two backward, in a machine. FSDP2 has 8 times fewer replicas."""
    flags = ("--tp_size", "8", "--sharding", "fsdp2")
    m, n = planned("3b").model, 10**9
    whole = m.vocab_size * m.hidden_size
    rows = planned("3b").training.per_device_train_batch_size
    activations = 8 * m.num_hidden_layers * 4 * rows * 4096 * m.hidden_size * 2 * 2 * 7 / 8
    shards = 8 * 3 * 2 * (whole + (n - whole) // 8)
    alone, several = cost("--tp_size", "8"), cost(*flags, devices=64)
    assert (alone.during, alone.after) == (0, pytest.approx(activations / 400e9))
    assert several.after == alone.after and several.during == pytest.approx(shards * 7 / 8 / 100e9)
    assert cost(*flags, "--activation_checkpointing", devices=64).after == pytest.approx(1.5 * several.after)
    plans = [plan_run(planned("3b", "--sharding", "fsdp2", *tp), 64) for tp in ([], ["--tp_size", "8"])]
    assert plans[0].tokens_per_step == 8 * plans[1].tokens_per_step and plans[1].sync is None
    held = [plan.memory.held for plan in plans]
    assert plans[1].memory.shards == 8 and held[0] < held[1] < 2 * held[0]  # FSDP2 alone divides the embeddings
    assert plans[1].memory.activations < plans[0].memory.activations


@pytest.mark.parametrize(
    ("size", "devices", "flags", "message"),
    [
        (8, 12, ["--sharding", "fsdp2"], "it must divide them"),
        (8, 16, [], "combined with FSDP2 only"),
        (8, 8, ["--inner_sync", "node"], "Set inner_sync to 'global'"),
        (8, 8, ["--checkpoint_async"], "checkpoint_async=True with tp_size=8 is not possible"),
        (8, 8, ["--reduce_dtype", "bfloat16"], "no effect on a sharded model"),
        (7, 7, [], "num_attention_heads=24, num_key_value_heads=8, intermediate_size="),
        (16, 16, [], "num_attention_heads=24, num_key_value_heads=8 is not possible"),
    ],
)
def test_impossible_tensor_parallelism_is_not_planned(size, devices, flags, message):
    with pytest.raises(ValueError, match=message):
        plan_run(planned("3b", "--tp_size", str(size), *flags), devices)


def test_one_device_sends_nothing_and_one_reduction_is_visible():
    assert cost(devices=1).sent == 0 and cost(devices=1).best == cost(devices=1).worst == cost(devices=1).compute
    assert cost().best == max(cost().compute, total(cost())) < cost().worst
    assert cost("--inner_sync", "local").best == cost("--inner_sync", "local").worst


# ---- The page ----


def numbers(flags: list[str]) -> list[str]:
    """Memory, arithmetic, communication, step, days and price of a plan, as the page prints them."""
    arguments, price = planned("3b", *flags), 3
    found = plan_run(arguments, arguments.hardware.devices or arguments.model.accelerators)
    c = found.cost
    assert found.steps is not None
    days = [found.steps * seconds / 86400 for seconds in (c.best, c.worst)]
    pairs = [(c.best, c.worst), tuple(days), tuple(d * 24 * c.devices * price / 1000 for d in days)]
    ranges = [" to ".join(dict.fromkeys(f"{float(f'{x:.3g}'):,.10g}" for x in pair)) for pair in pairs]
    sent = f"{total(c):.3g} s ({format_bytes(c.sent)})" if c.sent else "-"
    return [format_bytes(found.memory.total), f"{c.compute:.3g} s", sent, f"{ranges[0]} s", *ranges[1:]]


ROW = re.compile(r"^\| `(--[^`]*)` \| (.*) \|$", re.M)


def page_with_numbers(text: str) -> str:
    def filled(row: re.Match) -> str:
        flags = row[1].split()
        return f"| `{row[1]}` | {' | '.join(numbers(flags))} |"

    return ROW.sub(filled, text)


def test_every_number_of_the_page_is_the_planners():
    text = PAGE.read_text()
    assert len(ROW.findall(text)) >= 8
    assert page_with_numbers(text) == text


def test_the_page_states_the_share_of_attention_scores():
    """12 T L h operations per token in addition to 6N. A kernel that skips the causal mask needs half."""
    model = planned("3b").model
    length, layers, width = planned("3b").mixture.sequence_length, model.num_hidden_layers, model.hidden_size
    share = 12 * length * layers * width / (6 * count_parameters(model_config(model, length)))
    assert f"({100 * share / 2:.0f} % more at {length} tokens" in FORMULAS.read_text()
    assert f"{100 * share:.0f} % where none is skipped" in FORMULAS.read_text()


if __name__ == "__main__":
    PAGE.write_text(page_with_numbers(PAGE.read_text()))
