"""Loading saved models and adapters to measure them."""

import json
import sys

import pytest
import torch

from hf_nexus.evaluation.models import load_model
from tests.support.tiny import tiny_llama


def test_weights_are_float32_whatever_was_saved(tmp_path):
    tiny_llama(vocab_size=300).bfloat16().save_pretrained(tmp_path)
    model, base = load_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert base is None and not model.training


def test_a_whole_model_has_no_base(tmp_path):
    tiny_llama(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not an adapter of org/base"):
        load_model(str(tmp_path), base="org/base")


def test_an_adapter_without_a_base_is_refused(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="does not name its base model"):
        load_model(str(tmp_path))


def test_an_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install 'peft"):
        load_model(str(tmp_path))
