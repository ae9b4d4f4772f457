"""The plan of a run has the tokens and steps of the Trainer, and rejects runs that cannot train."""

import pytest

from hf_nexus.pretrain.model import build_model, count_parameters, model_config
from hf_nexus.pretrain.plan import plan_run
from tests.support.tiny_config import planned, run


def test_tokens_follow_the_devices_and_the_steps(config):
    arguments = planned(config, "--max_steps", "5")
    one, three = (plan_run(arguments, devices, {"letters": 9000, "digits": 3000}) for devices in (1, 3))
    assert (one.tokens_per_step, one.tokens) == (2 * 32 * 4, 2 * 32 * 4 * 5)
    assert (three.tokens_per_step, three.tokens) == (3 * one.tokens_per_step, 3 * one.tokens)
    assert [row.share for row in one.mixture] == [0.75, 0.25]


def test_shards_share_the_copy_of_a_checkpoint(config):
    sharding = [["--checkpoint_async", "--sharding", kind] for kind in ("ddp", "fsdp2")]
    waits, whole, shard = (plan_run(planned(config, *flags), 2) for flags in ([], *sharding))
    assert waits.checkpoint_copy == 0
    assert whole.checkpoint_copy == 2 * shard.checkpoint_copy == 12 * waits.parameters


# Whole epochs are a special case of 2.2, which ends in the middle of one.
@pytest.mark.parametrize("epochs", ["2.2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("0.5", "1", "2", "3"))])
def test_epochs_are_counted_as_by_the_trainer(config, tmp_path, epochs):
    # 5 rows a micro-batch and 4 of them a window: the last window of an epoch is short.
    flags = ["--sequence_length", "256", "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "4"]
    flags += ["--isolate_documents", "false"]  # else the first token of a document is not a target
    flags += ["--max_steps", "-1", "--num_train_epochs", epochs, "--eval_strategy", "no", "--save_strategy", "no"]
    trainer = run(config, tmp_path, *flags, "--eval_on_start", "false", "--logging_steps", "1")
    sizes = dict(zip(trainer.train_dataset.names, trainer.train_dataset.sizes, strict=True))
    assert sum(sizes.values()) // 5 % 4 != 0
    arguments = planned(config, *flags)
    plan = plan_run(arguments, 1, {name: rows * 256 for name, rows in sizes.items()})
    assert plan.steps == trainer.state.global_step
    assert plan.tokens // 256 * 255 == sum(trainer.meter.trained_tokens.values())  # first tokens are not predicted
    assert sum(row.train_tokens for row in plan.mixture) == plan.tokens
    assert plan_run(arguments, 1).steps is None


def test_a_source_smaller_than_a_micro_batch_is_refused(config):
    with pytest.raises(ValueError, match=r"sources\.digits: .*1 rows.*micro-batch of 2"):
        plan_run(planned(config), 1, {"letters": 32 * 50, "digits": 63})
    unused = planned(config, "--mixture_weights", '{"letters": 1, "digits": 0}')
    plan_run(unused, 1, {"letters": 32 * 50, "digits": 63})


def test_streams_need_a_number_of_steps():
    with pytest.raises(ValueError, match=r"max_steps: missing.*streaming sources.*has no end"):
        planned("130m", "--max_steps", "-1")


def test_a_run_of_more_tokens_than_can_be_counted_is_refused(config):
    flags = ["--max_steps", "1000000000", "--gradient_accumulation_steps", "1000000"]
    with pytest.raises(ValueError, match=r"max_steps: the run has [\d,]+ tokens\. Lower it"):
        plan_run(planned(config, *flags), 10_000)


def test_isolation_must_be_possible(config):
    flags = ["--attn_implementation", "paged|sdpa", "--isolate_documents", "true"]
    with pytest.raises(ValueError, match=r"isolate_documents: .*lets one document change the next .paged.sdpa"):
        plan_run(planned(config, *flags), 1)


@pytest.mark.parametrize(
    "flags", [["--attn_implementation", "flash_attention_2"], ["--tf32", "true"], ["--ddp_backend", "nccl"]]
)
def test_a_run_on_accelerators_is_planned_anywhere(config, flags):
    assert plan_run(planned(config, *flags), 8).parameters == plan_run(planned(config), 8).parameters


@pytest.mark.parametrize(("field", "value"), [("inner_sync", "local"), ("gradient_cosine_steps", "10")])
def test_what_fsdp2_cannot_do_is_refused_as_in_training(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*{value}.* is not possible for a sharded model"):
        plan_run(planned("3b", "--sharding", "fsdp2", f"--{field}", value), 8)
    plan_run(planned("3b", "--sharding", "ddp", f"--{field}", value), 8)


def test_parameters_are_those_of_the_model(config):
    arguments = planned(config)
    shape = model_config(arguments.model, arguments.mixture.sequence_length)
    tied = shape.tie_word_embeddings * shape.vocab_size * shape.hidden_size
    state = build_model(shape).state_dict()
    assert count_parameters(shape) == sum(weight.numel() for weight in state.values()) - tied
