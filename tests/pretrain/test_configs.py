"""The configurations that come with the package say what they claim: sizes, budgets, schedules, sources."""

import io
import json

import pytest
import torch
import yaml
from rich.console import Console
from transformers.optimization import get_scheduler

from hf_nexus.mixture.loading import check_loadable
from hf_nexus.mixture.stages import stage_borders
from hf_nexus.pretrain.console import print_plan
from hf_nexus.pretrain.model import count_parameters, model_config
from hf_nexus.pretrain.parsing import available_configs, load_config, parse_arguments
from hf_nexus.pretrain.plan import plan_run

SIZES = {"130m": 130e6, "300m": 300e6, "1b": 1e9}
LARGE = [*SIZES, "3b"]


def arguments_of(name: str, *flags: str):
    return parse_arguments(["--config", name, "--dry_run", *flags])


def parameters_of(name: str) -> int:
    arguments = arguments_of(name)
    return count_parameters(model_config(arguments.model, arguments.mixture.sequence_length))


def test_the_five_configurations_are_found_by_name():
    assert available_configs() == sorted(["demo", *LARGE])


def test_the_3b_run_is_the_default():
    assert parse_arguments(["--dry_run"]).resolved == arguments_of("3b").resolved


def test_3b_has_about_three_billion_parameters():
    assert 2.8e9 <= parameters_of("3b") <= 3.3e9


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_within_a_tenth_of_the_name(name):
    assert parameters_of(name) == pytest.approx(SIZES[name], rel=0.1)


def test_parameters_equal_the_closed_form_of_a_llama():
    m = arguments_of("3b").model
    kv = m.hidden_size // m.num_attention_heads * m.num_key_value_heads
    layer = 2 * m.hidden_size**2 + 2 * m.hidden_size * kv + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
    expected = m.num_hidden_layers * layer + m.vocab_size * m.hidden_size + m.hidden_size
    assert parameters_of("3b") == expected


@pytest.mark.parametrize("name", LARGE)
def test_budget_is_twenty_tokens_per_parameter_or_more_and_the_sources_hold_it(name):
    arguments = arguments_of(name)
    plan = plan_run(arguments, arguments.model.accelerators)
    assert 20 <= plan.tokens / plan.parameters <= 30
    assert len(plan.mixture) == 4
    for row in plan.mixture:
        assert row.epochs <= 1


@pytest.mark.parametrize("name", LARGE)
def test_large_runs_compute_in_bfloat16_and_anneal_to_zero(name):
    args = arguments_of(name).training
    assert args.bf16 and args.gradient_accumulation_steps >= 4
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(args.max_steps),
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    at = schedule.lr_lambdas[0]
    warmup, decay = args.warmup_steps, args.lr_scheduler_kwargs["num_decay_steps"]
    assert at(0) == 0 and at(warmup / 2) == pytest.approx(0.5)
    assert {at(warmup), at(args.max_steps // 2), at(args.max_steps - decay)} == {1.0}
    assert at(args.max_steps - decay // 2) < 0.5
    assert at(args.max_steps) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", LARGE)
def test_large_runs_stream_from_the_hub(name):
    mixture = arguments_of(name).mixture
    check_loadable(mixture)
    assert all(source.streaming and source.eval_rows for source in mixture.train_sources.values())


@pytest.mark.parametrize("name", ["1b", "3b"])
def test_the_last_stage_begins_with_the_decay_of_the_learning_rate(name):
    arguments = arguments_of(name)
    args, stages = arguments.training, arguments.mixture.stage_weights({})
    assert len(stages) == 2
    (_, before), (first, after) = stage_borders(stages, args.max_steps, args.gradient_accumulation_steps)
    assert first % args.gradient_accumulation_steps == 0
    decay = args.max_steps - args.lr_scheduler_kwargs["num_decay_steps"]
    assert first // args.gradient_accumulation_steps == decay == plan_run(arguments, 1).stages[1]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    at = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(args.max_steps),
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    ).lr_lambdas[0]
    # Outer steps count from 0: the first step of the new weights is the last at the full rate.
    assert at(decay) == 1.0 > at(decay + 1)
    assert after["mathematics"] > before["mathematics"] and after["reasoning"] > before["reasoning"]


def test_the_plan_shows_the_stages_of_the_3b_run_at_80_columns():
    arguments = arguments_of("3b")
    console = Console(width=80, record=True, file=io.StringIO())
    print_plan(arguments, plan_run(arguments, 64), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "steps 0 to 24,000" in text and "steps 24,000 to 30,000" in text and "6000 down" in text
    assert "no attention from one to another (sdpa" in text


def plan_of(tmp_path, *flags, **data):
    config = {"model": {"vocab_size": 64}, "training": {"output_dir": "x", "max_steps": 10, "report_to": "none"}}
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({**config, "data": {"sequence_length": 8, **data}}, sort_keys=False)
    )
    arguments = parse_arguments(["--config", str(tmp_path / "c.yaml"), "--dry_run", *flags])
    console = Console(width=100, record=True, file=io.StringIO())
    print_plan(arguments, plan_run(arguments, 1), console)
    return console.export_text()


WEB, CODE = {"path": "org/web", "streaming": True, "weight": 3}, {"path": "org/code", "tokens": 10_000, "weight": 1}


def test_a_stream_of_unknown_size_is_planned_as_far_as_it_is_known(tmp_path):
    text = plan_of(tmp_path, sources={"web": WEB, "code": CODE})
    row = next(line for line in text.splitlines() if "web" in line and "train" in line)
    assert row.count("unknown") == 3 and "75.0%" in row  # licence, size, epochs


def test_a_map_style_source_of_unknown_size_is_planned_once_it_is_tokenized(tmp_path):
    assert "not tokenized yet" in plan_of(tmp_path, sources={"web": WEB, "code": {"path": "c", "weight": 1}})


def test_streams_need_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match=r"max_steps: missing, and the streaming source 'web' has no end"):
        plan_of(tmp_path, "--max_steps", "-1", sources={"web": WEB, "code": CODE})


def test_the_plan_says_how_documents_are_separated(tmp_path):
    sources = {"web": WEB, "code": CODE}
    assert "no attention from one to another (sdpa" in plan_of(tmp_path, sources=sources)
    off = plan_of(tmp_path, "--isolate_documents", "false", sources=sources)
    assert "attention reaches across them" in " ".join(off.replace("│", " ").split())
    own = plan_of(tmp_path, "--attn_implementation", "my_kernel", sources=sources)
    assert "my_kernel cannot keep them apart" in " ".join(own.replace("│", " ").split())
    with pytest.raises(ValueError, match=r"isolate_documents: .*'my_kernel' cannot"):
        plan_of(tmp_path, "--attn_implementation", "my_kernel", "--isolate_documents", "true", sources=sources)


@pytest.mark.parametrize("where", ["data", "training"])
def test_stages_are_planned_wherever_they_are_given(tmp_path, where):
    stages = [{"until": 0.5, "weights": {"web": 1, "code": 0}}, {"until": 1.0, "weights": {"web": 1, "code": 3}}]
    if where == "data":
        plain = {name: {k: v for k, v in s.items() if k != "weight"} for name, s in (("web", WEB), ("code", CODE))}
        text = plan_of(tmp_path, sources=plain, stages=stages)
    else:
        text = plan_of(tmp_path, "--mixture_weights", json.dumps(stages), sources={"web": WEB, "code": CODE})
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert {"steps 0 to 5 web 100.0% 320 unknown", "code 0.0% 0 0.00"} <= set(lines)
    assert {"steps 5 to 10 web 25.0% 80 unknown", "code 75.0% 240 0.02"} <= set(lines)


@pytest.mark.parametrize("name", ["demo", *LARGE])
def test_inner_steps_can_align_sources(name):
    config = load_config(name)
    assert config["training"]["gradient_accumulation_steps"] >= 4
    assert len(config["data"]["sources"]) >= 4


def test_the_demo_is_small_and_needs_no_accelerator():
    arguments = arguments_of("demo")
    assert arguments.model.accelerators == 0
    assert parameters_of("demo") < 3e6
    assert all(source.path.startswith("builtin/") for source in arguments.mixture.sources.values())
    assert len(arguments.mixture.train_sources) >= 5 and len(arguments.mixture.ood_sources) >= 3
    assert arguments.training.eval_on_start
