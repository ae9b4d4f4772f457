"""Reading without torch: it finds mistakes, and accepts whatever the fields accept."""

import json

import pytest
from transformers import LlamaConfig

from hf_nexus.pretrain import kinds
from hf_nexus.pretrain.command_line import from_sections, read_command_line
from hf_nexus.pretrain.flags import described
from hf_nexus.pretrain.model import shape_fields
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.strict import packaged

SOURCES = {"code": {"path": "builtin/code"}}


def refusal(*argv: str) -> str:
    with pytest.raises(ValueError) as error:
        read_command_line([*argv])
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    def write(**sections) -> str:
        (tmp_path / "c.yaml").write_text(json.dumps({"data": {"sources": SOURCES}} | sections))
        return str(tmp_path / "c.yaml")

    return write


@pytest.mark.parametrize("name", packaged("pretrain"))
def test_what_the_package_has_is_accepted(name):
    read_command_line(["--config", name])


def test_a_saved_configuration_is_accepted(config, write):
    read_command_line(["--config", str(config)])
    read_command_line(["--config", write(**parse_arguments(["--config", "demo", "--dry_run"]).resolved)])


def test_sections_are_read_as_their_file(tmp_path):
    path, mixture = tmp_path / "c.yaml", {"sources": {"code": {"path": "builtin/code", "eval_rows": 4}}}
    for content in (mixture, {"data": mixture, "training": {"max_steps": 3}}):
        path.write_text(json.dumps(content))
        assert from_sections(str(path), content) == read_command_line(["--config", str(path)])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"max_step": 3}}, "training.max_step: unknown key. Did you mean 'max_steps'?"),
        ({"training": {"lr": 3}}, "training.lr: unknown key. Did you mean 'learning_rate'?"),
        ({"training": {"max_steps": "many"}}, "training.max_steps: 'many' is not allowed"),
        ({"training": {"hidden_size": 8}}, "training.hidden_size: unknown key. It belongs to the section 'model'."),
        ({"training": {"optim": "adamw_torhc"}}, "Did you mean 'adamw_torch'?"),
        ({"model": {"hiden_size": 8}}, "model.hiden_size: unknown key. Did you mean 'hidden_size'?"),
        ({"model": {"hidden_size": 0}}, "model.hidden_size: 0 is not allowed"),
        ({"modle": {}}, "modle: unknown section. Did you mean 'model'?"),
        (
            {"sources": SOURCES},
            "sources: next to the section 'data', fields of the mixture belong to the section 'data'",
        ),
        ({"data": {"sources": {"a": {"weight": 1}}}}, "data.sources.a"),
        ({"data": {"sources": {"a": 0.5}}}, "data.sources.a: 0.5 is not allowed"),
        ({"data": {"sources": SOURCES, "temperature": 0}}, "data.temperature: 0"),
        ({"data": {"sources": {"a": {"path": "gone.jsonl"}}}}, "data.sources.a.path: no file matches 'gone.jsonl'"),
    ],
)
def test_a_mistake_in_the_file_is_found(write, sections, message):
    path = write(**sections)
    found = refusal("--config", path)
    assert found.startswith(f"{path}: ") and message in found


def test_brackets_in_the_name_of_a_file_are_literal(write, tmp_path):
    (tmp_path / "[2024]").mkdir()
    for name in ("[1] corpus.jsonl", "[2024]/a.jsonl"):
        (tmp_path / name).touch()
    for path in ("[1] corpus.jsonl", "[2024]/*.jsonl"):
        read_command_line(["--config", write(data={"sources": {"a": {"path": str(tmp_path / path)}}})])
    (tmp_path / "dead.jsonl").symlink_to("nowhere")
    for path in ("[2]/*", "dead.jsonl"):
        assert "no file matches" in refusal("--config", write(data={"sources": {"a": {"path": f"{tmp_path}/{path}"}}}))


def test_a_tilde_is_the_home_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "web.jsonl").touch()
    found = read_command_line(["--config", write(data={"sources": {"a": {"path": "~/web.jsonl"}}})])
    assert found.mixture.sources["a"].path == str(tmp_path / "web.jsonl")


def test_a_file_may_be_missing_where_the_run_is_only_planned(write):
    argv = ["--config", write(data={"sources": {"a": {"path": "gone.jsonl"}}})]
    assert read_command_line([*argv, "--dry-run"]).dry_run
    assert "gone.jsonl" in refusal(*argv, "--dry_run=false")


@pytest.mark.parametrize("flags", [["--max-steps=x"], ["--mfu", "2"], ["--temperature", "0"], ["--optim", "x"]])
def test_the_value_of_a_flag_is_checked(flags):
    assert refusal("--config", "demo", *flags).startswith(("--max_steps", flags[0], "data.temperature"))


@pytest.mark.parametrize(
    "flags",
    [["--bf16"], ["--no-nexus"], ["--label_names", "a", "b"], ["--fsdp"], ["--lr_scheduler_kwargs", '{"a": 1}']],
)
def test_flags_are_accepted_as_by_the_parser(flags):
    read_command_line(["--config", "demo", *flags])


def test_fields_of_every_model_are_accepted(write):
    read_command_line(["--config", write(model=dict.fromkeys(shape_fields({}) or [], None) | {"vocab_size": 64})])
    read_command_line(["--config", write(model={"model_type": "mixtral", "num_local_experts": 2})])
    read_command_line(["--config", write(), "--model_type", "mixtral"])
    assert "attention_bias" in LlamaConfig.__dataclass_fields__.keys() - described("model").keys()


@pytest.fixture
def other_kinds():
    """For tests that change what is known of the fields, which is read once."""
    kinds.known_kinds.cache_clear()
    yield
    kinds.known_kinds.cache_clear()


def test_of_a_newer_transformers_only_the_types_are_known(write, monkeypatch, other_kinds):
    monkeypatch.setattr("hf_nexus.pretrain.kinds.version", lambda name: "5.99")
    read_command_line(["--config", write(training={"optim": "of_the_future"})])
    assert "max_steps: 'many'" in refusal("--config", write(training={"max_steps": "many"}))


def test_a_flag_newer_than_the_schema_gets_its_type(write, monkeypatch, other_kinds):
    known = described("training")
    older = {name: field for name, field in known.items() if name not in ("max_steps", "bf16", "lr_scheduler_kwargs")}
    monkeypatch.setattr(kinds, "described", lambda name: older if name == "training" else described(name))
    flags = ["--max_steps", "3", "--bf16", "--lr_scheduler_kwargs", '{"a": 1}', "--lr_scheduler_type", "linear"]
    training = read_command_line(["--config", write(), "--dry_run", *flags]).flags["training"]
    assert training["max_steps"] == "3"  # its type is not known without torch
    with pytest.raises(ValueError, match="unexpected keyword argument 'a'"):  # the scheduler gets a mapping
        parse_arguments(["--config", write(), "--dry_run", *flags])
    training = parse_arguments(["--config", write(), "--dry_run", *flags[:3]]).training
    assert training.max_steps == 3 and training.bf16 is True
    with pytest.raises(ValueError, match="--max_steps: 'x' is not allowed"):
        parse_arguments(["--config", write(), "--dry_run", "--max_steps", "x"])
