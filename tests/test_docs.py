"""The examples of the documentation run, its configurations load, and its links exist."""

import ast
import dataclasses
import doctest
import importlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
import yaml

import hf_nexus
from hf_nexus import MixtureConfig, Nexus, NexusConfig, load_mixture
from hf_nexus.cli import app as cli
from hf_nexus.mixture import SourceConfig
from hf_nexus.pretrain.parsing import parse_arguments
from tests.support.tiny import Rows, tiny_llama
from tests.support.tiny_tokenizer import MARKING, tiny_tokenizer

ROOT = Path(__file__).parents[1]
MIXTURES = [
    block
    for page in ("mixtures", "rows", "schedule", "files", "files_columns", "streaming")
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGE = Path(hf_nexus.__file__).parent
MODULES = sorted(
    str(path.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def stand_in(folder: Path, name: str, source: dict) -> dict:
    """A source with the same settings that is read from a small local file."""
    config = SourceConfig(**source)
    texts = [f"document {i} of {name} " + "lazy dogs and quick foxes " * (1 + i % 3) for i in range(1200)]
    with (folder / f"{name}.jsonl").open("w") as file:
        for text in texts:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
            of_key = {"messages_column": turns, "tokens_column": [*text.encode()[:32]] * 2}
            file.write(json.dumps({c: of_key.get(key, text) for key, c in config.columns.items()}) + "\n")
    local = {"path": str(folder / f"{name}.jsonl")}
    return {key: value for key, value in source.items() if key != "subset"} | local


@pytest.mark.parametrize("block", MIXTURES, ids=lambda block: block.split("\n")[1].split("#")[0].strip())
def test_every_documented_mixture_trains(block, make_trainer, tmp_path):
    assert MixtureConfig.from_dict(yaml.safe_load(block)).train_sources
    data = yaml.safe_load(block)
    data["sequence_length"], data["num_proc"] = 64, None  # to save time
    data["sources"] = {name: stand_in(tmp_path, name, source) for name, source in data["sources"].items()}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKING
    mixture = load_mixture(MixtureConfig.from_dict(data), tokenizer, cache_dir=tmp_path / "cache")
    attention = "eager" if "isolate_documents" not in data else "sdpa"
    model = tiny_llama(vocab_size=len(tokenizer), attn_implementation=attention)
    trainer = make_trainer(mixture, model=model, max_steps=3, trainer_kwargs={"processing_class": tokenizer})
    trainer.train()
    assert trainer.state.global_step == 3
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert sum(trainer.meter.trained_tokens.values()) > 0


PYTHON = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]
COMMANDS = [
    pytest.param(line, id=line.split("#")[0].strip()[:60])
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"hf-nexus |(accelerate launch|torchrun|python) .*recipes/", line)
]


@pytest.fixture
def readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_quickstart_runs(readme, tmp_path, monkeypatch):
    """Only the number of steps is smaller."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "max_steps=100" in readme[0]
    names: dict = {}
    exec(readme[0].replace("max_steps=100", "max_steps=2"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2
    found = trainer.state.log_history[-1]
    assert {"eval_code_loss", "eval_records_loss", "eval_loss", "eval_ood_loss"} <= found.keys()
    assert found["eval_loss"] == pytest.approx((found["eval_code_loss"] + found["eval_records_loss"]) / 2)
    assert found["eval_ood_loss"] == found["eval_headers_loss"]


def test_the_bare_loop_runs(readme):
    model = tiny_llama()
    before = [p.clone() for p in model.parameters()]
    rows = [Rows(2, i)[:] for i in range(4)]
    names = {"Nexus": Nexus, "model": model, "micro_batches": rows}
    exec(readme[1], names | {"optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)})
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_compile_and_import_names_that_exist(block):
    """The tests above run those of the README. Others continue a previous one, or need a network."""
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("hf_nexus", "transformers"):
            assert all(hasattr(importlib.import_module(str(node.module)), alias.name) for alias in node.names)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "NexusConfig":
            fields = {field.name for field in dataclasses.fields(NexusConfig)}
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= fields


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "Makefile", *(ROOT / ".github").rglob("*.*")], ids=lambda page: page.name
)
def test_files_that_a_page_names_exist(page):
    for path in re.findall(r"\b(?:tests|recipes|benchmarks|docs|hf_nexus)/[\w/]+(?:\.\w+)+", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_name_files_and_flags_that_exist(line):
    words = shlex.split(line.partition(" > ")[0], comments=True)
    assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/"))
    if words[:2] in (["hf-nexus", "plan"], ["hf-nexus", "train"]):
        config = "demo" if words[2] == "mine.yaml" else words[2]  # the reader's own file
        parse_arguments(["--config", config, "--dry_run", *words[3:]])
    elif "recipes/pretrain_3b.py" in words:
        parse_arguments(["--dry_run", *words[words.index("recipes/pretrain_3b.py") + 1 :]])
    elif words[0] == "hf-nexus":
        command = typer.main.get_command(cli.app).commands[words[1]]
        command.make_context(words[1], words[2:])  # raises for an unknown option


def test_runs_that_a_page_names_are_of_its_comparison():
    page = (ROOT / "docs" / "comparisons.md").read_text()
    arms = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])
    seeds = {"tuning": arms["tuning"]["seeds"], **dict.fromkeys(arms["arms"], arms["seeds"])}
    named = re.findall(r"--run (\w+)/(?:[\w/-]+/)?seed-(\d+)", page)
    assert {kind for kind, _ in named} == {"nexus", "tuning"}
    assert all(int(seed) in seeds[kind] for kind, seed in named), named


def test_the_reference_has_every_public_name():
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").iterdir()}
    names = [name for name, page in pages.items() if re.search(rf"^\.\. auto\w+:: {name}\b", page, re.MULTILINE)]
    assert sorted(names) == sorted(re.findall(r"\]\(api/(\w+)\.md\)", (ROOT / "docs" / "api.md").read_text()))
    assert sorted(names) == sorted(set(hf_nexus.__all__) - {"__version__"})
    assert all(getattr(hf_nexus, name).__doc__ for name in names)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_the_files_for_launches(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(module), optionflags=flags).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_prose_is_a_comment(page):
    """MyST leaves out lines that start with a percent sign, where a paragraph was wrapped before it."""
    assert re.findall(r"^\s*%.*", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.MULTILINE) == []


def test_troubleshooting_quotes_messages_that_exist():
    """Each quote is compared by its longest part between values: quoted names, numbers and dots."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    strings = "\n".join(value for value in constants if isinstance(value, str))
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").glob("troubleshooting*.md"))
    cells = re.findall(r"^\| (.*?) \|", pages, re.MULTILINE)
    quotes = [quote for cell in cells for quote in re.findall(r"`([^`]*)`", cell)]
    assert len(quotes) > 35
    for quote in quotes:
        longest = max(re.split(r"\.\.\.|'[^']*'|\b[\d.]+\b|[][=;]", quote), key=len).strip()
        assert longest in strings, longest


def lists_of_changes() -> Iterator[tuple[str, str]]:
    """Items of CONTRIBUTING, and of the comments that list the files of a change, each with the text it is about."""
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("## The mixin")[2].partition("## House rules")[0]
    for item in re.findall(r"^(?:\d+\.|-) (.*?)(?=\n\d+\. |\n- |\n\n)", page, re.MULTILINE | re.DOTALL):
        yield item, ""
    for path in PACKAGE.rglob("*.py"):
        for block in re.findall(r"also needs,\n((?: *#.*\n)+)", path.read_text()):
            for item in re.split(r"^ *# - ", block, flags=re.MULTILINE)[1:]:
                yield item, path.read_text()


def test_contributing_names_files_and_code_that_exist():
    """Files exist, and each has the names that follow it. Names before the first file are in the file of a comment."""
    items = list(lists_of_changes())
    assert len(items) > 45
    for item, text in items:
        for quote in re.findall(r"`([^`]*)`", item):
            if re.fullmatch(r"[\w/]+/(\w+\.\w+)?|\w+\.\w{2,}", quote):
                [file] = [file for file in (ROOT / quote, PACKAGE / quote) if file.exists()]
                text = file.read_text() if file.is_file() else ""
            elif text and re.fullmatch(r"[A-Za-z_]+", quote):
                assert re.search(rf"\b{quote}\b", text), (quote, item)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
