"""Any causal language model from a YAML: new ones of each type, and checkpoints that are continued."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_nexus.pretrain.model import build_model, model_config
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.plan import plan_run
from hf_nexus.pretrain.run import dry_run, load_tokenizer, pretrain
from tests.support.hub.server import ALICE, HubServer
from tests.support.saved_weights import saved_weights
from tests.support.tiny import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

WIDTH = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2}
DENSE = {**WIDTH, "intermediate_size": 64, "num_attention_heads": 4}
GROUPED = {**DENSE, "num_key_value_heads": 2, "head_dim": 8}
TYPES: dict[str, dict[str, Any]] = {
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "olmo2": {**DENSE, "num_key_value_heads": 2},
    "gpt_neox": DENSE,
    "gpt2": {"vocab_size": 304, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mamba": {**WIDTH, "state_size": 4},
}
FSDP2 = ["--sharding", "fsdp2"]
QUICK = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "warmup_steps": 0}
QUICK |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "logging_steps": 1}


@pytest.fixture
def write(config: Path, tmp_path: Path) -> Any:
    """`write(**model)`: the path of the tiny configuration with another `model` section and two steps."""

    def write(**model: Any) -> str:
        content = yaml.safe_load(config.read_text())
        content["model"] = {"tokenizer": content["model"]["tokenizer"], **model}
        content["training"] |= {**QUICK, "output_dir": str(tmp_path / "out")}
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def words_of(printed: str) -> str:
    """The text of tables, whose cells are wrapped."""
    return " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k != "mamba" else k for k in TYPES])
def test_a_model_of_any_type_trains_from_a_yaml(write, tmp_path, kind, capsys):
    arguments = parse_arguments(["--config", write(model_type=kind, **TYPES[kind])])
    trainer = pretrain(arguments)
    model, printed = trainer.model, capsys.readouterr().out
    assert model.config.model_type == kind and trainer.state.global_step == 2
    assert all(model.config.to_dict()[name] == value for name, value in TYPES[kind].items() if name != "num_experts")
    assert trainer.meter.inner_steps_skipped == 0
    size = sum(p.numel() for p in model.parameters())
    assert f"{size:,}" in printed and f"not known for a model of the type {kind}" in words_of(printed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    saved = str(tmp_path / "out/pretrain.yaml")
    assert parse_arguments(["--config", saved]).resolved == arguments.resolved


def test_the_plan_says_what_it_does_not_know(write, capsys):
    path = write(model_type="mixtral", accelerators=1, **TYPES["mixtral"])
    dry_run(parse_arguments(["--config", path, "--dry_run"]))
    printed = words_of(capsys.readouterr().out)
    for words in (
        "mixtral, 2 layers of width 32, vocabulary 304",
        "activations of a micro-batch",
        "peak without activations",
        "an upper bound, since a token passes only some of the experts",
        "unless a probe of the model shows that it keeps them apart",
    ):
        assert words in printed


@pytest.mark.parametrize("kind", TYPES)
def test_fsdp2_gathers_what_is_outside_of_the_layers(write, kind):
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    shapes = [{**TYPES[kind], name: layers} for layers in (2, 3)]
    plans = [plan_run(parse_arguments(["--config", write(model_type=kind, **s), *FSDP2]), 2) for s in shapes]
    assert plans[0].parameters < plans[1].parameters
    assert plans[0].memory.gathered == plans[1].memory.gathered == 4 * plans[0].parameters


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"model_type": "mixtrl"}, r"model\.model_type: 'mixtrl' is not a causal language model.*'mixtral'"),
        ({"model_type": "t5"}, r"model\.model_type: 't5' is not a causal language model"),
        ({"model_type": "mixtral", "num_local_expert": 4}, r"num_local_expert: unknown key.*'num_local_experts'"),
        ({"model_type": "mamba", "num_attention_heads": 4}, r"model\.num_attention_heads: .*no such field"),
        (
            {"model_type": "mamba", "config_fields": {"stat_size": 4}},
            r"model\.stat_size: .*no such field.*'state_size'",
        ),
        ({"model_type": "qwen3", "num_experts": 4}, r"model\.num_experts: unknown key"),
        ({"hidden_act": 3}, r"hidden_act.*expected str"),
        ({"model_type": "qwen3", "path": "x"}, r"model\.model_type: path has a type already"),
        ({"hidden_size": 32, "path": "x"}, r"model\.hidden_size: it is that of path"),
        ({"model_type": "gemma3_text", "rope_theta": 1e6}, r"rope_theta: this model has one per type of layer"),
        ({"revision": "main"}, r"model\.revision: it is that of path"),
        ({"model_type": "gpt2", "attn_implementation": "spda"}, "attn_implementation='spda'"),
        (
            {"model_type": "whisper", "d_model": 64},
            r"model: transformers cannot build a whisper of these fields",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_refused(write, model, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_arguments(["--config", write(**model)])
    assert "model.yaml: " in str(error.value) and "\n" not in str(error.value)


def test_an_end_token_that_is_also_padding_is_trained(write):
    """Of a padding token, an embedding has neither a random start nor a gradient."""
    arguments = parse_arguments(["--config", write(model_type="llama", **GROUPED)])
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    built = build_model(model_config(arguments.model, 32, tokenizer))
    assert built.get_input_embeddings().padding_idx is None and built.config.eos_token_id == tokenizer.eos_token_id


def test_a_type_that_changes_the_tokenizer_is_refused(write):
    """transformers ignores the class that is saved with the model."""
    arguments = parse_arguments(["--config", write(model_type="qwen2", **DENSE)])
    with pytest.raises(ValueError, match=r"with a qwen2, .* as a Qwen2Tokenizer, which gives other tokens"):
        load_tokenizer(arguments, None)


@pytest.mark.parametrize(("kind", "heads"), [("qwen3", 8), ("mistral", 4), ("mistral", 12), ("gpt_neox", 4)])
def test_key_and_value_heads_are_as_many_as_the_others(write, kind, heads):
    shape = {**DENSE, "hidden_size": 96, "num_attention_heads": heads}
    config = model_config(parse_arguments(["--config", write(model_type=kind, **shape)]).model, 32)
    assert getattr(config, "num_key_value_heads", heads) == heads
    assert hasattr(config, "num_key_value_heads") == (kind != "gpt_neox")
    assert build_model(config)(torch.arange(32)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["qwen3", "llama", None])
def test_heads_that_groups_do_not_divide_are_refused(write, tmp_path, kind):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({"model_type": "mistral", **GROUPED}))
    model = {"model_type": kind, **DENSE} if kind else {"path": str(path)}
    with pytest.raises(ValueError, match=r"model\.num_key_value_heads=3 with num_attention_heads=4 is not allowed"):
        parse_arguments(["--config", write(**model, num_key_value_heads=3)])


def test_positions_have_the_name_that_a_type_gives_them(write):
    arguments = parse_arguments(["--config", write(model_type="gpt2", n_positions=99, n_embd=32, n_head=4)])
    assert model_config(arguments.model, 32).n_positions == 99


@pytest.mark.parametrize("kind", ["phi3", "glm4", "smollm3"])
def test_a_padding_token_outside_of_the_vocabulary_is_dropped(write, kind):
    shape = {**GROUPED, "hidden_size": 64, "head_dim": 16}
    assert plan_run(parse_arguments(["--config", write(model_type=kind, **shape), "--dry_run"]), 1).parameters > 0


# Types whose configuration classes lack a field that others have, or whose default does not fit a tiny vocabulary.
SPARSE: dict[str, dict[str, Any]] = {
    "codegen": {"vocab_size": 304, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "cpmant": {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "rwkv": {**WIDTH, "attention_hidden_size": 32},
    "modernbert-decoder": DENSE,
    "inkling_text": {"vocab_size": 304, "hidden_size": 64, "num_hidden_layers": 2},
    "blt": {"vocab_size": 304},
}


@pytest.mark.parametrize("kind", [kind for kind in SPARSE if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_a_plan_does_without_fields_that_a_type_lacks(write, kind, capsys):
    dry_run(parse_arguments(["--config", write(model_type=kind, **SPARSE[kind]), "--dry_run"]))
    printed = words_of(capsys.readouterr().out)
    assert f"model {kind}, " in printed and ("width (not known)" in printed) == (kind == "blt")


@pytest.mark.parametrize("kind", ["bert", "reformer", "xlm"])
def test_a_new_model_does_not_see_the_tokens_it_predicts(write, kind):
    shape: dict[str, Any] = {**DENSE, "hidden_size": 64, "num_attention_heads": 2}
    if kind == "xlm":
        del shape["intermediate_size"]
    if kind == "reformer":
        shape = {"vocab_size": 304, "hidden_size": 256, "attn_layers": ["local"], "axial_pos_shape": [4, 8]}
    model = build_model(model_config(parse_arguments(["--config", write(model_type=kind, **shape)]).model, 32)).eval()
    tokens = torch.arange(10, 42)[None]
    others = torch.cat([tokens[:, :16], tokens[:, :16]], 1)
    with torch.no_grad():
        found, expected = (model(row).logits[:, :16] for row in (others, tokens))
    assert torch.allclose(found, expected, atol=1e-5)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"rope_theta": 1e6, "rope_parameters": LLAMA3}, {**LLAMA3, "rope_theta": 1e6}),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, {**LLAMA3, "rope_theta": 5e5}),
        ({"model_type": "gpt_neox", **DENSE, "rope_theta": 1e6}, {"rope_theta": 1e6, "partial_rotary_factor": 0.25}),
        ({"path": "shape.json", "rope_theta": 1e6}, {**LLAMA3, "rope_theta": 1e6}),
    ],
)
def test_the_base_of_rotary_positions_keeps_their_scaling(write, tmp_path, monkeypatch, model, expected):
    monkeypatch.chdir(tmp_path)
    rotary = {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    Path("shape.json").write_text(json.dumps({"model_type": "llama", **DENSE, **rotary}))
    found = model_config(parse_arguments(["--config", write(**model), "--dry_run"]).model, 32).rope_parameters
    assert {key: found.get(key) for key in expected} == expected


# ---- Shapes and checkpoints of others ----


@pytest.fixture
def saved(config: Path, tmp_path: Path) -> Path:
    """A checkpoint in bfloat16 with its tokenizer."""
    folder = tmp_path / "base"
    tiny_llama(vocab_size=304, tie_word_embeddings=True, dtype=torch.bfloat16).save_pretrained(folder)
    for file in (config.parent / "tok").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_config_file_gives_the_shape_of_a_new_model(write, saved, tmp_path, config):
    file, tokenizer = str(saved / "config.json"), str(config.parent / "tok")
    arguments = parse_arguments(["--config", write(path=file, tokenizer=tokenizer, attention_dropout=0.1)])
    trainer = pretrain(arguments)
    expected = json.loads(Path(file).read_text()) | {"attention_dropout": 0.1, "dtype": "float32", "use_cache": False}
    found = trainer.model.config.to_diff_dict()
    changed = {name for name in found | expected if found.get(name) != expected.get(name)}
    assert changed <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_name_or_path"}
    assert json.loads((tmp_path / "out/run_summary.json").read_text())["base_model"] is None


@pytest.mark.parametrize(
    ("file", "changed", "expected"),
    [
        ({"model_type": "llama", **DENSE}, {"hidden_size": 64}, {"head_dim": 16}),
        ({"model_type": "llama", **DENSE}, {"num_attention_heads": 2}, {"num_key_value_heads": 2, "head_dim": 16}),
        ({"model_type": "qwen3", **GROUPED}, {"num_hidden_layers": 3}, {"layer_types": ["full_attention"] * 3}),
        (
            {"model_type": "qwen3", **GROUPED, "layer_types": ["full_attention"] * 2},
            {"num_hidden_layers": 1, "layer_types": None},
            {"layer_types": ["full_attention"]},
        ),
        ({"model_type": "gpt2", **TYPES["gpt2"]}, {"num_hidden_layers": 3}, {"n_layer": 3}),
        (
            {"model_type": "llama", **DENSE, "rope_theta": 1e4, "rope_scaling": LLAMA3},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ),
    ],
)
def test_keys_over_a_file_also_change_what_follows(write, tmp_path, file, changed, expected):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(file))
    found = model_config(parse_arguments(["--config", write(path=str(path), **changed), "--dry_run"]).model, 32)
    assert {name: getattr(found, name) for name in [*changed, *expected]} == {**changed, **expected}


def test_a_list_of_other_layers_in_a_file_is_refused(write, tmp_path):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({"model_type": "qwen3", **GROUPED, "layer_types": ["full_attention"] * 2}))
    with pytest.raises(ValueError, match=r"model: .*num_hidden_layers.* \(3\) must be equal to .*types") as error:
        parse_arguments(["--config", write(path=str(path), num_hidden_layers=3), "--dry_run"])
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_continued_and_resumed(write, saved, tmp_path, monkeypatch):
    path = write(path=str(saved), tokenizer=None)
    flags = ["--config", path, "--learning_rate", "1e-12", "--save_strategy", "steps", "--save_steps", "1"]
    trainer = pretrain(parse_arguments(flags))
    base = AutoModelForCausalLM.from_pretrained(saved)
    for p, before in zip(trainer.model.parameters(), base.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.allclose(p, before.float(), atol=1e-9)
    assert trainer.accelerator.mixed_precision == "no"  # the configuration decides
    assert json.loads((tmp_path / "out/run_summary.json").read_text())["base_model"] == "./base"

    def unexpected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the checkpoint has all weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unexpected)
    checkpoint = str(tmp_path / "out/checkpoint-1")
    again = pretrain(
        parse_arguments([*flags, "--output_dir", f"{path}.again", "--resume_from_checkpoint", checkpoint])
    )
    assert all(map(torch.equal, again.model.parameters(), trainer.model.parameters()))


def test_a_resumed_run_leaves_the_files_of_a_whole_one(write, saved, tmp_path):
    """Those of the model and of its tokenizer, also what only generation reads."""
    (saved / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "eos_token_id": [0, 2]}')
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    flags = ["--config", write(path=str(saved), tokenizer=None), "--save_strategy", "steps", "--save_steps", "1"]
    pretrain(parse_arguments(flags))
    resume = [
        "--output_dir",
        str(tmp_path / "resumed"),
        "--resume_from_checkpoint",
        str(tmp_path / "out/checkpoint-1"),
    ]
    pretrain(parse_arguments([*flags, *resume]))
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("out", "resumed")
    )
    assert whole.keys() == resumed.keys()
    assert json.loads(whole["generation_config.json"])["temperature"] == 0.6
    # These have times, or the folder.
    of_the_run = {"training_args.bin", "trainer_state.json", "run_summary.json", "pretrain.yaml"}
    of_the_run |= {"README.md", "RUN.md", "training.png"}
    assert [name for name in whole.keys() - of_the_run if whole[name] != resumed[name]] == []


def test_a_context_may_be_longer_only_if_it_is_said(write, saved):
    flags = ["--config", write(path=str(saved), tokenizer=None), "--dry_run", "--sequence_length", "128"]
    with pytest.raises(ValueError, match="max_position_embeddings: the model has 64, and sequence_length is 128"):
        plan_run(parse_arguments(flags), 1)
    longer = parse_arguments([*flags, "--max_position_embeddings", "128", "--rope_theta", "5e5"])
    config = model_config(longer.model, 128)
    assert config.max_position_embeddings == 128 and config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "gpt2", **TYPES["gpt2"], "n_positions": 16},
        {"model_type": "qwen3", **GROUPED, "max_position_embeddings": 16},
        {**DENSE, "max_position_embeddings": 16},
    ],
)
def test_a_new_model_has_a_position_for_each_token(write, model):
    words = "the model has 16, and sequence_length is 32. Lower sequence_length, or raise max_position_embeddings."
    with pytest.raises(ValueError, match=re.escape(f"model.max_position_embeddings: {words}") + "$"):
        parse_arguments(["--config", write(**model), "--sequence_length", "32"])


def test_a_type_without_a_longest_context_has_any(write):
    flags = ["--config", write(model_type="xlnet", vocab_size=304, d_model=32, n_layer=1, n_head=4, d_inner=64)]
    assert plan_run(parse_arguments([*flags, "--sequence_length", "128", "--dry_run"]), 1).parameters > 0


def test_adapters_are_not_a_model_to_continue(write, saved):
    (saved / "config.json").rename(saved / "adapter_config.json")
    with pytest.raises(ValueError, match=r"model\.path: '.*base' holds adapters\. Merge them"):
        plan_run(parse_arguments(["--config", write(path=str(saved), tokenizer=None), "--dry_run"]), 1)


def test_a_vocabulary_that_does_not_fit_is_refused_first(write, saved, config, monkeypatch):
    """Before weights are loaded or rows are tokenized."""
    tiny_llama(vocab_size=280).save_pretrained(saved)
    for name in ("hf_nexus.pretrain.run.load_mixture", "hf_nexus.pretrain.run.build_model"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"The tokenizer .*tok' has 300 entries, more than vocab_size=280"):
        pretrain(parse_arguments(["--config", write(path=str(saved))]))
    model = {"model_type": "mamba", **TYPES["mamba"], "vocab_size": 280, "tokenizer": str(config.parent / "tok")}
    with pytest.raises(ValueError, match=r"The tokenizer .*tok' has 300 entries, more than vocab_size=280"):
        pretrain(parse_arguments(["--config", write(**model)]))


def test_a_continued_model_may_lack_unused_tokens_of_its_own(write, saved, config, caplog):
    """As Gemma 3 1B and CodeLlama 34B do."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(4)] + ["<image>"])
    tokenizer.save_pretrained(saved)
    arguments = parse_arguments(["--config", write(path=str(saved), tokenizer=None)])
    trainer = pretrain(arguments)
    assert "base' has 305 entries, more than vocab_size=304. A document with one" in caplog.text
    assert len(trainer.model.get_input_embeddings().weight) == 304
    file = config.parent / "letters.jsonl"
    file.write_text(file.read_text().replace('"text": "', '"text": "<image>'))
    with pytest.raises(ValueError, match=r"sources\.letters: the documents have the token 304 \('<image>'\), but"):
        pretrain(arguments)


@pytest.mark.slow
def test_a_revision_of_a_model_on_the_hub_is_continued(write, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=ALICE)
        api.create_repo("alice/base")
        revision = api.upload_folder(repo_id="alice/base", folder_path=saved).oid
        first = saved_weights(saved)
        tiny_llama(1, vocab_size=304, dtype=torch.bfloat16).save_pretrained(saved)
        api.upload_folder(repo_id="alice/base", folder_path=saved)
        path = write(path="alice/base", revision=revision, tokenizer=None)
        told = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "hf_nexus.cli", "train", path, "--learning_rate", "1e-12"]
        done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continued from alice/base" in words_of(done.stdout)
    found = saved_weights(tmp_path / "out")
    assert found.keys() == first.keys()
    assert all(torch.allclose(found[name], first[name].float(), atol=1e-9) for name in first)
    assert "base_model: alice/base" in (tmp_path / "out/README.md").read_text()
