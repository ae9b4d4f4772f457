"""The tables of a plan, at the width of a terminal."""

import io
import json
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from hf_nexus.mixture.plan import PlanRow
from hf_nexus.pretrain.console import _targets, cost_table, print_plan
from hf_nexus.pretrain.plan import plan_run
from tests.support.tiny_config import planned

WEB, CODE = {"path": "org/web", "streaming": True, "weight": 3}, {"path": "org/code", "tokens": 10_000, "weight": 1}
BOTH = {"web": WEB, "code": CODE}


def test_the_stages_of_the_3b_run_fit_80_columns():
    arguments = planned("3b")
    console = Console(width=80, record=True, file=io.StringIO())
    print_plan(arguments, plan_run(arguments, 64), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "steps 0 to 24,000" in text and "steps 24,000 to 30,000" in text and "6000 down" in text
    assert "no attention from one to another (sdpa" in text


def plan_of(tmp_path, *flags, **data) -> list[str]:
    """The lines of a printed plan without the borders of its tables."""
    config = {"model": {"tokenizer": "tok"}, "training": {"output_dir": "x", "max_steps": 10, "report_to": "none"}}
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({**config, "data": {"sequence_length": 8, **data}}, sort_keys=False)
    )
    arguments = planned(tmp_path / "c.yaml", *flags)
    console = Console(width=100, record=True, file=io.StringIO())
    print_plan(arguments, plan_run(arguments, 1), console)
    return [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]


def test_a_stream_of_unknown_size_is_planned_where_known(tmp_path):
    row = next(line for line in plan_of(tmp_path, sources=BOTH) if line.startswith("web train"))
    assert row.count("unknown") == 3 and "75.0%" in row  # license, size, epochs


def test_the_licences_of_built_in_text_are_planned(tmp_path):
    sources = {"own": {"path": "builtin/code", "weight": 1, "tokens": 900}, "other": CODE}
    rows = {line.split()[0]: line for line in plan_of(tmp_path, sources=sources)[1:] if line}
    assert "PSF-2.0" in rows["own"] and "PSF-2.0" not in rows["other"]


def test_the_plan_counts_targets_apart_where_they_are_fewer(tmp_path):
    pairs = {"path": "org/pairs", "tokens": 10_000, "prompt_column": "a", "completion_column": "b", "weight": 1}
    sources = {"code": CODE, "pairs": pairs | {"loss_on": "completion"}}
    (line,) = (line for line in plan_of(tmp_path, sources=sources) if "loss on" in line)
    assert line == "pairs: loss on completion tokens; their share is known once they are tokenized."
    row, loaded = PlanRow("pairs", 1000, 0.5, 5000, (), ()), SimpleNamespace(targets={"pairs": 250})
    assert _targets(row, "completion", loaded) == "loss on completion tokens: 25.0%, about 1,250 of 5,000."


def test_a_map_style_source_of_unknown_size_has_no_plan_yet(tmp_path):
    lines = plan_of(tmp_path, sources={"web": WEB, "code": {"path": "c", "weight": 1}})
    assert "not tokenized yet" in " ".join(lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no attention from one to another (sdpa"),
        ([], "an EOS ends each, and a BOS starts it if the tokenizer adds one"),
        (["--add_bos_token", "true"], "a BOS starts and an EOS ends each; no attention"),
        (["--add_bos_token", "false"], "an EOS ends each; no attention"),
        (["--isolate_documents", "false"], "attention reaches across them"),
        (["--attn_implementation", "paged|sdpa"], "LlamaForCausalLM lets one document change the next (paged|sdpa)"),
    ],
)
def test_the_plan_says_how_documents_are_separated(tmp_path, flags, words):
    assert words in " ".join(plan_of(tmp_path, *flags, sources=BOTH))


def test_a_tokenizer_that_is_trained_adds_no_bos(tmp_path):
    lines = plan_of(tmp_path, "--tokenizer", "train", sources={"logic": {"path": "builtin/logic"}})
    assert "an EOS ends each; no attention" in " ".join(lines)


@pytest.mark.parametrize("where", ["data", "training"])
def test_stages_are_planned_from_both_sections(tmp_path, where):
    stages = [{"until": 0.5, "weights": {"web": 1, "code": 0}}, {"until": 1.0, "weights": {"web": 1, "code": 3}}]
    if where == "data":
        unweighted = {name: {k: v for k, v in s.items() if k != "weight"} for name, s in BOTH.items()}
        lines = plan_of(tmp_path, sources=unweighted, stages=stages)
    else:
        lines = plan_of(tmp_path, "--mixture_weights", json.dumps(stages), sources=BOTH)
    assert {"steps 0 to 5 web 100.0% 320 unknown", "code 0.0% 0 0.00"} <= set(lines)
    assert {"steps 5 to 10 web 25.0% 80 unknown", "code 75.0% 240 0.02"} <= set(lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "3.74 to 5.22 s, with or without overlap with the backward pass"),
        (["--inner_sync", "local"], "1.94 s, without overlap"),
    ],
)
def test_the_table_says_what_overlaps(flags, words):
    assert words in costs("3b", 64, *flags)


@pytest.mark.parametrize(
    ("config", "devices", "flags", "rows"),
    [
        ("3b", 64, ["--max_steps", "20"], ["run 74.8 to 104 s for 20 steps"]),
        ("3b", 64, ["--max_steps", "2000"], ["run 0.0866 to 0.121 days for 2,000 steps"]),
        ("3b", 64, ["--price_per_hour", "1e10"], ["price 20,000,000,000,000 to 27,800,000,000,000 "]),
        ("demo", 1, [], ["arithmetic per step 0.0000", "run 0.01", "device hours 0.00000"]),
    ],
)
def test_numbers_of_any_size_have_no_exponent(config, devices, flags, rows):
    text = " ".join(costs(config, devices, *flags).replace("│", " ").split())
    assert all(row in text for row in rows), text


def costs(config: str, devices: int, *flags: str) -> str:
    """The printed table of a plan's cost."""
    arguments = planned(config, *flags)
    plan = plan_run(arguments, devices)
    console = Console(width=200, file=io.StringIO())
    console.print(cost_table(plan.cost, arguments.hardware, plan.steps))
    return console.file.getvalue()
