"""The YAML and the command line of a run: precedence, types, and errors that name file, section and key."""

from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerState

from hf_nexus.mixture import SourceConfig
from hf_nexus.pretrain.parsing import changed_fields, parse_arguments
from tests.support.tiny_config import planned

CODE = {"path": "builtin/code"}


@pytest.fixture
def write(tmp_path):
    """Write a small configuration with some more entries, and return its path."""

    def write(**sections: dict[str, Any]) -> str:
        content = {"model": {"vocab_size": 64}, "data": {"sources": {"code": CODE}}, "training": {"report_to": "none"}}
        for section, entries in sections.items():
            content[section] = {**content.get(section, {}), **entries}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return str(tmp_path / "c.yaml")

    return write


def test_flags_override_the_yaml_in_every_section(config):
    flags = ["--max_steps", "9", "--inner_lr", "0.1", "--hidden_size", "48", "--sequence_length", "16", "--no_nexus"]
    arguments = parse_arguments(["--config", str(config), *flags])
    assert arguments.training.max_steps == 9 and arguments.training.inner_lr == 0.1 and not arguments.training.nexus
    assert arguments.model.hidden_size == 48 and arguments.mixture.sequence_length == 16
    assert arguments.training.learning_rate == 1e-2  # from the YAML


def test_a_flag_for_epochs_is_not_ignored(write):
    path = write(training={"max_steps": 7, "num_train_epochs": 3.0})  # as in every saved configuration
    assert planned(path).training.max_steps == 7
    for steps in ([], ["--max_steps", "7"]):
        with pytest.raises(ValueError, match=r"^--num_train_epochs: max_steps=7 overrides it. Add --max_steps -1\.$"):
            planned(path, "--num_train_epochs", "2", *steps)
    assert planned(path, "--num_train_epochs", "2", "--max_steps", "-1").training.num_train_epochs == 2


def test_config_fields_override_those_of_the_file(write):
    """Also those of a saved configuration, and they leave the others."""
    path = write(model={"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2})
    flag = ["--config_fields", '{"num_local_experts": 4}']
    expected = {"num_local_experts": 4, "num_experts_per_tok": 2}
    assert planned(path, *flag).model.config_fields == expected
    assert planned(write(**planned(path).resolved), *flag).model.config_fields == expected


def test_changed_fields_differ_from_their_defaults(config):
    arguments = parse_arguments(["--config", str(config), "--inner_lr", "0.05", "--weight_decay", "0.1"])
    given = yaml.safe_load(config.read_text())["training"]
    same_as_default = {"save_strategy", "report_to"}
    assert changed_fields(arguments).keys() == (given.keys() | {"weight_decay"}) - same_as_default


VALUES = {
    "learning_rate": (3e-4, "3e-4"),
    "max_steps": (7, "7"),
    "warmup_steps": (1, "1"),
    "lr_scheduler_type": ("cosine", "cosine"),
    "save_strategy": ("no", "no"),
    "activation_checkpointing": (True, "true"),
    "accelerator_config": ({"even_batches": True}, '{"even_batches": true}'),
    "mixture_weights": ({"code": 3}, '{"code": 3}'),
    "report_to": ("tensorboard", "tensorboard"),
    "run_name": ("7", "7"),
    "tf32": (False, "no"),
    "logging_steps": (1, "1"),
    "log_level": ("info", "info"),
}


@pytest.mark.parametrize("key", VALUES)
def test_the_yaml_and_a_flag_give_the_same_value(write, key):
    value, text = VALUES[key]
    from_yaml, from_flag = planned(write(training={key: value})), planned(write(), f"--{key}", text)
    assert from_yaml.resolved == from_flag.resolved
    assert from_yaml.resolved["training"][key] == value
    assert getattr(from_yaml.training, key) == getattr(from_flag.training, key)


def test_whole_numbers_of_float_fields_are_saved_as_floats(write):
    training = planned(write(training={"warmup_steps": 3, "learning_rate": 1})).resolved["training"]
    assert [type(training[key]) for key in ("warmup_steps", "learning_rate", "max_steps")] == [float, float, int]


def test_fractions_are_the_steps_that_a_checkpoint_has(write):
    """transformers warns of every difference when a run is resumed."""
    fractions = {"logging_steps": 0.05, "eval_steps": 0.25, "save_steps": 7, "eval_strategy": "steps"}
    arguments = planned(write(training={"max_steps": 30, **fractions}))
    state = TrainerState()
    state.compute_steps(arguments.training, 30)
    for name, steps in {"logging_steps": 2, "eval_steps": 8, "save_steps": 7}.items():
        assert getattr(state, name) == getattr(arguments.training, name) == steps
        assert arguments.resolved["training"][name] == fractions[name]


def test_lists_and_none_are_read_from_the_yaml(write):
    lists = {"report_to": ["tensorboard"], "label_names": ["labels"], "data_seed": None, "hub_private_repo": None}
    arguments = planned(write(training=lists))
    assert {key: arguments.resolved["training"][key] for key in lists} == lists
    assert planned(write(), "--label_names", "a", "b").training.label_names == ["a", "b"]


@pytest.mark.parametrize("flag", ["--bf16", "--bf16=true", "--bf16=1", "--no-nexus", "--isolate_documents"])
def test_a_flag_without_a_value_is_true(write, flag):
    arguments = planned(write(), flag)
    name = flag.strip("-").split("=")[0]
    if name == "no-nexus":
        assert arguments.training.nexus is False
    else:
        assert getattr(arguments.mixture if name == "isolate_documents" else arguments.training, name) is True


def test_mappings_are_saved_as_they_are_given(write):
    source = {"path": "builtin/code", "weight": 3, "text_column": "text"}
    assert planned(write(data={"sources": {"code": source}})).resolved["data"]["sources"] == {"code": source}


def test_each_source_of_the_yaml_is_built_once(write, monkeypatch):
    built, check = [], SourceConfig.__post_init__
    monkeypatch.setattr(SourceConfig, "__post_init__", lambda self: (built.append(self.path), check(self)))
    planned(write(), "--sequence_length", "16")
    assert built == ["builtin/code"]


def test_tokens_and_resumptions_are_not_saved(write):
    resolved = planned(write(training={"hub_token": "x", "resume_from_checkpoint": "last"})).resolved
    assert not {"hub_token", "resume_from_checkpoint"} & resolved["training"].keys()


@pytest.mark.parametrize(
    ("section", "entry", "words"),
    [
        ("training", {"max_step": 3}, ["training.max_step:", "Did you mean 'max_steps'"]),
        ("model", {"inner_lr": 0.1}, ["model.inner_lr:", "belongs to the section 'training'"]),
        ("data", {"sequence_len": 3}, ["data.sequence_len:", "Did you mean 'sequence_length'"]),
        ("trainig", {"max_steps": 3}, ["trainig: unknown section", "Did you mean 'training'"]),
        ("training", {"max_steps": "many"}, ["training.max_steps: 'many'", "a whole number"]),
        ("training", {"max_steps": [1]}, ["training.max_steps: [1]", "a whole number"]),
        ("training", {"max_steps": 1.5}, ["training.max_steps: 1.5", "a whole number"]),
        ("training", {"max_steps": None}, ["training.max_steps: None", "a whole number"]),
        ("training", {"learning_rate": "3e-4 "}, ["training.learning_rate: '3e-4 '", "a finite number"]),
        ("training", {"bf16": "true"}, ["training.bf16: 'true'", "true or false"]),
        ("training", {"run_name": 7}, ["training.run_name: 7", "a string", "quotes"]),
        ("training", {"save_strategy": False}, ["training.save_strategy: False", "'no'", "quotes"]),
        ("training", {"lr_scheduler_type": "cosin"}, ["'cosin'", "Did you mean 'cosine'"]),
        ("training", {"log_level": "inf"}, ["training.log_level: 'inf'", "Did you mean 'info'"]),
        ("training", {"label_names": "labels"}, ["training.label_names: 'labels'", "a list"]),
        ("training", {"inner_sync": "sometimes"}, ["inner_sync", "sometimes", "global"]),
        ("model", {"hidden_size": 0}, ["model.hidden_size: 0", "at least 1"]),
        ("model", {"hidden_size": 36}, ["model.hidden_size=36", "even width", "multiple of 8"]),
        ("data", {"sources": {}}, ["data.sources: missing"]),
        ("data", {"sources": {"code": {**CODE, "wieght": 1}}}, ["data.sources.code.wieght:", "Did you mean 'weight'"]),
        ("data", {"sources": {"code": {**CODE, "weight": 1}}, "temperature": 2}, ["data.temperature:"]),
    ],
)
def test_a_wrong_entry_of_the_yaml_is_named(write, section, entry, words):
    path = write(**{section: entry})
    with pytest.raises(ValueError) as error:
        parse_arguments(["--config", path])
    assert str(error.value).startswith(f"{path}: ")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_step", "3"], ["--max_step", "Did you mean '--max_steps'"]),
        (["--max_steps", "many"], ["--max_steps: 'many'", "a whole number"]),
        (["--save_strategy", "sometimes"], ["--save_strategy: 'sometimes'", "'steps'"]),
        (["--stages", "late"], ["--stages: 'late'", "a list"]),
        (["--stages", '[{"untill": 1.0}]'], ["data.stages[0].untill: unknown key", "'until'"]),
        (["stray"], ["stray"]),
        (["--no_nexus=true"], ["--no_nexus: it takes no value", "--nexus=false"]),
        (["--no-bf16="], ["--no-bf16: it takes no value"]),
        (["--liger_kernel_config", '{"a": 1}'], ["--liger_kernel_config.a: 1 is not allowed"]),
        (["--lr_scheduler_kwargs", "{oops"], ["lr_scheduler_kwargs", "JSON"]),
        (["--sharding", "fsdp"], ["--sharding: 'fsdp'", "'fsdp2'"]),
        (["--mfu", "40"], ["--mfu: 40.0", "above 0 and of at most 1"]),
        (["--link", "0"], ["--link: 0.0", "above 0"]),
        (["--price_per_hour", "-1"], ["--price_per_hour: -1.0"]),
        (["--devices", "0"], ["--devices: 0", "at least 1"]),
        (["--num_hidden_layers", "0"], ["--num_hidden_layers: 0", "at least 1"]),
        (["--hidden_size", "100", "--num_attention_heads", "7"], ["hidden_size=100", "num_attention_heads=7", "14"]),
        (["--num_key_value_heads", "3"], ["num_key_value_heads=3", "num_attention_heads=4"]),
        (["--mixture_weights", '{"digits": 1}'], ["mixture_weights", "digits", "code", "0 leaves"]),
    ],
)
def test_a_wrong_flag_is_named(write, flags, words):
    with pytest.raises(ValueError) as error:
        parse_arguments(["--config", write(), *flags])
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_accelerator_names_the_demo(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'3b' needs an accelerator.*recipes/pretrain_3b\.py --config demo"):
        parse_arguments([])
