"""The documentation's examples: configurations load, docstring examples run, links lead somewhere."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from hf_nexus import MixtureConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "hf_nexus").rglob("*.py")
)


def test_every_mixture_in_the_documentation_is_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "mixtures.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        path = tmp_path / "mixture.yaml"
        path.write_text(block)
        assert MixtureConfig.from_yaml(path).train_sources


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(module), optionflags=flags).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
