import copy
import dataclasses

import pytest
import torch
from rich.pretty import pretty_repr
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_nexus import NexusConfig, NexusConfigMixin, NexusTrainer
from hf_nexus.pretrain.fields import PretrainConfig
from hf_nexus.trainer.config import nexus_settings
from tests.support.tiny import tiny_llama


def parse(*arguments: str) -> NexusConfig:
    return HfArgumentParser(NexusConfig).parse_args_into_dataclasses([*arguments, "--report_to", "none"])[0]


@pytest.mark.parametrize(("flags", "expected"), [([], None), (["--bf16"], True), (["--bf16", "false"], False)])
def test_a_flag_without_a_value_is_true(flags, expected):
    """As with TrainingArguments, whose `bf16` is not None by default."""
    assert parse("--output_dir", "out", *flags, "--use_cpu").bf16 is expected


def test_defaults_change_nobodys_batch():
    args = parse("--output_dir", "out")
    assert args.gradient_accumulation_steps == TrainingArguments(output_dir="out").gradient_accumulation_steps == 1
    assert (args.nexus, args.inner_lr, args.source_schedule, args.mixture_weights) == (True, 0.05, "random", None)


def test_every_field_can_be_set_from_the_command_line():
    args = parse(
        *(
            "--inner_lr",
            "0.1",
            "--inner_lr_schedule",
            "follow",
            "--inner_direction",
            "random",
            "--inner_sync",
            "node",
        ),
        *("--node_size", "4", "--reduce_dtype", "bfloat16"),
        *("--snapshot_device", "cpu", "--source_schedule", "stratified", "--gradient_cosine_steps", "5"),
        *("--matrix_optimizer", "muon", "--mixture_weights", '{"text": 0.75, "code": 0.25}', "--nexus", "False"),
    )
    assert nexus_settings(args) == {
        "nexus": False,
        "inner_lr": 0.1,
        "inner_lr_schedule": "follow",
        "inner_direction": "random",
        "inner_sync": "node",
        "node_size": 4,
        "reduce_dtype": "bfloat16",
        "snapshot_device": "cpu",
        "mixture_weights": {"text": 0.75, "code": 0.25},
        "source_schedule": "stratified",
        "gradient_cosine_steps": 5,
        "matrix_optimizer": "muon",
        "gradient_accumulation_steps": 1,
    }


def test_numpy_numbers_become_plain_ones():
    import numpy as np
    import yaml

    args = NexusConfig(output_dir="out", inner_lr=np.float64(0.1), report_to="none")
    assert yaml.safe_load(yaml.safe_dump(nexus_settings(args)))["inner_lr"] == 0.1


def test_every_field_has_help():
    for name in nexus_settings(parse()):
        assert NexusConfig.__dataclass_fields__[name].metadata["help"]


@pytest.mark.parametrize("weights", ["[1, 2]", "{}", '{"a": "much"}', '{"a": true}', '{"a": 0}', '{"a": NaN}'])
def test_bad_weights_are_refused_with_an_example(weights):
    with pytest.raises(ValueError, match=r"mixture_weights.*\{|mixture_weights"):
        parse("--mixture_weights", weights)


def test_the_mixin_extends_other_training_arguments():
    from dataclasses import dataclass

    @dataclass
    class Config(NexusConfigMixin, Seq2SeqTrainingArguments):
        pass

    args = Config(output_dir="out", inner_lr=0.2, predict_with_generate=True, report_to="none")
    assert (args.inner_lr, args.predict_with_generate) == (0.2, True)


@pytest.mark.parametrize(
    ("device", "processes", "use_cpu"),
    [(None, 2, True), ("mps", 2, True), ("cuda", 2, False), ("mps", 1, False), (None, 1, False)],
)
def test_processes_that_no_device_connects_use_the_cpu(monkeypatch, device, processes, use_cpu):
    @dataclasses.dataclass
    class Base:  # the Trainer's arguments would wait for the other process
        use_cpu: bool = False
        greater_is_better: bool | None = None
        metric_for_best_model: str | None = None

        def __post_init__(self) -> None: ...

    @dataclasses.dataclass
    class Config(NexusConfigMixin, Base): ...

    found = None if device is None else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert Config().use_cpu is use_cpu


def test_no_representation_shows_the_token():
    from dataclasses import dataclass

    @dataclass
    class Own(NexusConfigMixin, TrainingArguments):
        own: int = 1

    for cls in (NexusConfig, PretrainConfig, Own):
        args = cls(output_dir="out", hub_token="hf_SECRET", use_cpu=True, report_to="none")
        assert args.hub_token == "hf_SECRET"
        shown = [repr(args), str(args), str([args]), str(vars(args)), pretty_repr(args), pretty_repr(vars(args))]
        shown += [str(copy.deepcopy(vars(args))), str(dataclasses.replace(args, output_dir="new"))]
        later = cls(output_dir="out", use_cpu=True, report_to="none").set_push_to_hub("alice/x", token="hf_SECRET")
        shown += [str(vars(later)), str(vars(copy.copy(later)))]
        assert later.hub_token == "hf_SECRET" and not any("SECRET" in text for text in shown)


def test_arguments_survive_saving_with_the_model(tmp_path):
    args = NexusConfig(output_dir=str(tmp_path), mixture_weights='{"a": 1}', report_to="none")
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.to_dict() == args.to_dict()
    assert loaded.mixture_weights == {"a": 1.0}


@pytest.mark.parametrize(
    "metric", ["perplexity", "eval_perplexity", "a_perplexity", "eval_ood_perplexity", "eval_a_loss"]
)
def test_the_best_perplexity_is_the_lowest(metric: str) -> None:
    assert NexusConfig(output_dir="out", metric_for_best_model=metric).greater_is_better is False
    explicit = NexusConfig(output_dir="out", metric_for_best_model=metric, greater_is_better=True)
    assert explicit.greater_is_better is True


def test_other_metrics_keep_the_direction_of_transformers() -> None:
    assert NexusConfig(output_dir="out").greater_is_better is None
    assert NexusConfig(output_dir="out", metric_for_best_model="eval_accuracy").greater_is_better is True


def test_plain_arguments_take_the_lowest_perplexity_too(make_trainer, sources, tmp_path) -> None:
    options = {"report_to": "none", "use_cpu": True, "metric_for_best_model": "eval_perplexity"}
    trainer = NexusTrainer(tiny_llama(), TrainingArguments(str(tmp_path), **options), train_dataset=sources)
    assert trainer.args.greater_is_better is False
    explicit = make_trainer(sources, metric_for_best_model="eval_perplexity", greater_is_better=True)
    assert explicit.args.greater_is_better is True
