"""The planner's formulas of time and traffic, and the numbers of the page on the 3B run."""

import re
from pathlib import Path
from typing import Any

import pytest

from hf_nexus.pretrain.console import format_bytes
from hf_nexus.pretrain.cost import choose_sync, estimate_cost
from hf_nexus.pretrain.model import count_parameters, model_config
from hf_nexus.pretrain.plan import plan_run
from tests.support.tiny_config import planned

PAGE = Path(__file__).parents[2] / "docs" / "pretrain_3b.md"
FORMULAS = PAGE.with_name("cost.md")


def cost(*flags: str, devices: int = 8) -> Any:
    arguments = planned("3b", "--peak_tflops", "1000", "--mfu", "0.5", "--link", "100", *flags)
    return estimate_cost(arguments, 10**9, 10**6, devices)


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
    assert found.sent == sent and total(found) == pytest.approx(sent / 100e9)


def test_machines_share_one_reduction_over_all_links():
    found = cost("--inner_sync", "node", "--node_link", "400", devices=64)
    inside, between = (8 * 2 + 1) * 4e9 * 7 / 8, 2 * 4e9 / 8 * 7 / 8
    assert found.sent == inside + between
    assert (found.during, found.after) == (pytest.approx(inside / 400e9), pytest.approx(between / 100e9))
    assert found.best == pytest.approx(max(found.compute, found.during) + found.after)
    assert cost("--inner_sync", "node").sent == cost().sent  # one machine
    assert cost("--inner_sync", "node", "--node_size", "4").after == pytest.approx(2 * 4e9 / 4 / 2 / 100e9)
    assert cost("--reduce_dtype", "bfloat16").sent == cost().sent / 2


def test_shards_of_a_machine_are_sent_to_the_others_once():
    found = cost("--sharding", "fsdp2", "--inner_sync", "node", "--node_link", "400", devices=64)
    inside, between = 8 * 3 * 2e9 * 7 / 8, 2 * 4e9 / 8 * 7 / 8
    assert found.sent == inside + between
    assert (found.during, found.after) == (pytest.approx(inside / 400e9), pytest.approx(between / 100e9))


def test_the_plan_chooses_the_largest_groups_that_are_fast():
    def choice(link: str, *flags: str) -> str:
        chosen = choose_sync(planned("3b", "--link", link, *flags), 10**9, 10**6, 64)
        assert chosen is not None
        return chosen.split()[0]

    assert choice("100000") == "global"
    assert choice("50") == "node"
    assert choose_sync(planned("3b"), 10**9, 10**6, 1) is None
    assert choice("100000", "--sharding", "fsdp2") == "global"
    assert choice("50", "--sharding", "fsdp2") == "node"


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
