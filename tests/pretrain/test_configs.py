"""The packaged configurations: sizes, budgets, schedules and sources."""

import pytest
import torch
from transformers.optimization import get_scheduler

from hf_nexus.mixture.stages import stage_borders
from hf_nexus.pretrain.model import count_parameters, model_config
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.plan import plan_run
from hf_nexus.pretrain.sections import load_config
from hf_nexus.strict import packaged
from tests.support.tiny_config import planned

SIZES = {"130m": 130e6, "300m": 300e6, "1b": 1e9}
LARGE = [*SIZES, "3b"]


def parameters_of(name: str) -> int:
    arguments = planned(name)
    return count_parameters(model_config(arguments.model, arguments.mixture.sequence_length))


def test_the_five_configurations_are_found_by_name():
    assert list(packaged("pretrain")) == sorted(["demo", *LARGE])


def test_the_3b_run_is_the_default():
    assert parse_arguments(["--dry_run"]).resolved == planned("3b").resolved


def test_3b_has_about_three_billion_parameters():
    assert 2.8e9 <= parameters_of("3b") <= 3.3e9


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_within_a_tenth_of_the_name(name):
    assert parameters_of(name) == pytest.approx(SIZES[name], rel=0.1)


def test_parameters_equal_the_closed_form_of_a_llama():
    m = planned("3b").model
    kv = m.hidden_size // m.num_attention_heads * m.num_key_value_heads
    layer = 2 * m.hidden_size**2 + 2 * m.hidden_size * kv + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
    expected = m.num_hidden_layers * layer + m.vocab_size * m.hidden_size + m.hidden_size
    assert parameters_of("3b") == expected


@pytest.mark.parametrize("name", LARGE)
def test_the_sources_hold_twenty_tokens_per_parameter(name):
    arguments = planned(name)
    plan = plan_run(arguments, arguments.model.accelerators)
    assert 20 <= plan.tokens / plan.parameters <= 30
    assert len(plan.mixture) == 4
    for row in plan.mixture:
        assert row.epochs <= 1


@pytest.mark.parametrize("name", LARGE)
def test_large_runs_compute_in_bfloat16_and_anneal_to_zero(name):
    args = planned(name).training
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
    assert all(s.streaming and s.eval_rows for s in planned(name).mixture.train_sources.values())


@pytest.mark.parametrize("name", ["1b", "3b"])
def test_the_last_stage_begins_with_the_decay(name):
    arguments = planned(name)
    args, stages = arguments.training, arguments.mixture.resolved_stages({})
    assert len(stages) == 2
    (_, before), (first, after) = stage_borders(stages, args.max_steps)
    decay = args.max_steps - args.lr_scheduler_kwargs["num_decay_steps"]
    assert first == decay == plan_run(arguments, 1).stages[1]
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


@pytest.mark.parametrize("name", ["demo", *LARGE])
def test_inner_steps_can_align_sources(name):
    config = load_config(name)
    assert config["training"]["gradient_accumulation_steps"] >= 4
    assert len(config["data"]["sources"]) >= 4


def test_the_demo_is_small_and_needs_no_accelerator():
    arguments = planned("demo")
    assert arguments.model.accelerators == 0
    assert parameters_of("demo") < 3e6
    assert all(source.path.startswith("builtin/") for source in arguments.mixture.sources.values())
    assert len(arguments.mixture.train_sources) >= 5 and len(arguments.mixture.ood_sources) >= 3
    assert arguments.training.eval_on_start
