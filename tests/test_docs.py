"""The documentation's examples: configurations load, docstring examples run, links lead somewhere."""

import doctest
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from hf_nexus import MixtureConfig, load_mixture
from hf_nexus.mixture import SourceConfig
from tests.conftest import tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]
MIXTURES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "mixtures.md").read_text(), re.S)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "hf_nexus").rglob("*.py")
)


def stand_in(folder: Path, name: str, source: dict) -> dict:
    """The same source, read from a small local file."""
    config = SourceConfig(**source)
    texts = [f"document {i} of {name} " + "lazy dogs and quick foxes " * (1 + i % 3) for i in range(1200)]
    with (folder / f"{name}.jsonl").open("w") as file:
        for text in texts:
            file.write(json.dumps(dict.fromkeys(config.columns.values(), text)) + "\n")
    local = {"path": str(folder / f"{name}.jsonl")}
    return {key: value for key, value in source.items() if key != "subset"} | local


@pytest.mark.parametrize("block", MIXTURES, ids=lambda block: block.split("\n")[1].split("#")[0].strip())
def test_every_mixture_in_the_documentation_trains(block, make_trainer, tmp_path):
    assert MixtureConfig.from_dict(yaml.safe_load(block)).train_sources
    data = yaml.safe_load(block)
    data["sequence_length"], data["num_proc"] = 64, None  # for the sake of time
    data["sources"] = {name: stand_in(tmp_path, name, source) for name, source in data["sources"].items()}
    tokenizer = tiny_tokenizer()
    mixture = load_mixture(MixtureConfig.from_dict(data), tokenizer, cache_dir=tmp_path / "cache")
    attention = "eager" if "isolate_documents" not in data else "sdpa"
    model = tiny_llama(vocab_size=len(tokenizer), attn_implementation=attention)
    trainer = make_trainer(mixture, model=model, max_steps=3, trainer_kwargs={"processing_class": tokenizer})
    trainer.train()
    assert trainer.state.global_step == 3
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert sum(trainer.meter.trained_tokens.values()) > 0


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(module), optionflags=flags).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
