"""Arguments with which lm-eval loads folders, Hub models and adapters."""

import json

import pytest
from transformers.utils import hub

from hf_nexus.evaluation.lm_eval import model_arguments as module
from hf_nexus.evaluation.lm_eval.model_arguments import model_arguments
from tests.support import lm_eval as support

model = support.model  # the fixture


def test_folders_and_hub_models_have_their_path_or_revision(model, monkeypatch):
    assert model_arguments(str(model), dtype="bfloat16") == {"pretrained": str(model), "dtype": "bfloat16"}
    monkeypatch.setattr(module, "adapter_config", lambda *args: None)
    monkeypatch.setattr(hub, "cached_file", lambda *args, **kwargs: "config.json")
    assert model_arguments("org/model", "v1") == {"pretrained": "org/model", "revision": "v1", "dtype": "auto"}


def test_an_adapter_is_put_on_its_base_model(tmp_path, model, monkeypatch):
    pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    expected = {"pretrained": str(model), "peft": str(adapter), "dtype": "auto"}
    assert model_arguments(str(adapter)) == expected
    # An adapter on the Hub at a revision: the base model must not be looked for at that revision.
    found = module.adapter_config(str(adapter))
    monkeypatch.setattr(module, "adapter_config", lambda *args: found)
    monkeypatch.setattr(module, "snapshot_download", lambda *args, **more: str(adapter))
    (adapter / "tokenizer_config.json").write_text("{}")
    assert model_arguments("org/adapter", "v1") == expected | {"tokenizer": str(adapter)}
    found.revision = "v2"
    assert model_arguments("org/adapter", "v1")["revision"] == "v2"
    found.base_model_name_or_path = None
    with pytest.raises(ValueError, match="names no base model"):
        model_arguments(str(adapter))


def test_a_folder_without_a_model_is_refused_with_a_hint(tmp_path, model):
    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-5-copy"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Did you mean .*checkpoint-20\?"):
        model_arguments(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="no such folder"):
        model_arguments(str(tmp_path / "rum"))
    with pytest.raises(ValueError, match="only for models on the Hub"):
        model_arguments(str(model), revision="main")


def test_a_model_that_the_hub_lacks_is_refused():
    """The tests are offline."""
    with pytest.raises(ValueError, match=r"model='no/such-model' is neither a folder nor a model on the Hub: \w+"):
        model_arguments("no/such-model")
