"""The JSON schema accepts every shipped and documented YAML file, and refuses what the strict reader refuses."""

import dataclasses
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from typer.testing import CliRunner

import hf_nexus
from hf_nexus import MixtureConfig, NexusConfigMixin, SourceConfig
from hf_nexus.cli.app import app
from hf_nexus.cli.schema import nexus_schema
from hf_nexus.mixture.stages import Stage
from hf_nexus.pretrain.fields import HardwareArguments, ModelArguments, PretrainConfig
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.sections import load_config
from hf_nexus.schema import help_of, json_schema, kind_of
from hf_nexus.strict import describe, field_types, options, packaged, parse_yaml, required_fields

ROOT = Path(__file__).parents[2]
PACKAGE = Path(hf_nexus.__file__).parent
COMMITTED = PACKAGE / "nexus.schema.json"
PAGES = sorted((ROOT / "docs").glob("fields_*.md"))
TABLES = {
    "model": ModelArguments,
    "data": MixtureConfig,
    "source": SourceConfig,
    "stage": Stage,
    "nexus": NexusConfigMixin,
    "training": PretrainConfig,
}
SHIPPED = [*(PACKAGE / "pretrain" / "configs").glob("*.yaml"), *(PACKAGE / "compare" / "configs").glob("*.yaml")]
SHIPPED += (ROOT / "recipes").glob("*.yaml")
DOCUMENTED = {
    f"{page.name}-{i}": block
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    for i, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S))
}
# The schema and the tables hold the fields of one version of transformers, which is the one that is locked.
LOCKED = f"transformers=={version('transformers')}\n" in (ROOT / "constraints.txt").read_text()
locked = pytest.mark.skipif(not LOCKED, reason="another version of transformers than the locked one")


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    return Draft7Validator(nexus_schema())


def errors(validator: Draft7Validator, content: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_valid_and_name_the_schema(validator, path):
    assert errors(validator, parse_yaml(path.read_text(), path.name)) == []
    named = re.fullmatch(r"# yaml-language-server: \$schema=(.*)", path.read_text().splitlines()[0])
    assert named is not None and (ROOT / path.relative_to(PACKAGE.parent)).parent.joinpath(named[1]).is_file()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_yaml_is_valid(validator, name):
    assert errors(validator, parse_yaml(DOCUMENTED[name], name)) == []


@pytest.mark.parametrize("name", packaged("pretrain"))
def test_a_saved_configuration_is_valid(validator, name):
    assert errors(validator, parse_arguments(["--config", name, "--dry_run"]).resolved) == []


def changed(path: str, value: Any) -> dict[str, Any]:
    content = load_config("demo")
    *parents, key = path.split(".")
    place: Any = content
    for parent in parents:
        place = place[parent]
    place[key] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("modle", {}),
        ("model.hidden_sise", 8),
        ("model.hidden_size", 0),
        ("data.sources", None),
        ("data.sources.code.wieght", 1),
        ("data.sources.code.weight", 0),
        ("data.sources.code.role", "test"),
        ("data.sources.code", {"weight": 1}),
        ("data.stages", [{"until": 2, "weights": {"code": 1}}]),
        ("training.inner_Ir", 0.1),
        ("training.max_steps", "many"),
        ("training.bf16", "true"),
        ("training.lr_scheduler_type", "cosin"),
        ("training.learning_rate", None),
    ],
)
def test_what_the_reader_refuses_is_not_valid(validator, path, value, tmp_path):
    content = changed(path, value)
    assert errors(validator, content)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"c\.yaml: "):
        parse_arguments(["--config", str(tmp_path / "c.yaml"), "--dry_run"])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": [1]},
        {"training": {"max_step": 3}},
        {"training": {"output_dir": "runs/x"}},
        {"arms": {"a": {"inner_Ir": 1}, "b": None}},
        {"arms": {"a": {"seed": 1}, "b": None}},
        {"arms": {"a": None}},
        {"tuning": {"grid": {"learning_rate": 1e-3}}},
        {"tuning": {"grid": {"learning_rat": [1e-3]}}},
        {"data": {"sequence_len": 8}},
    ],
)
def test_wrong_comparisons_are_not_valid(validator, change):
    text = (PACKAGE / "compare" / "configs" / "compare.yaml").read_text()
    assert errors(validator, parse_yaml(text, "compare.yaml") | change)


def test_a_mixture_with_an_unknown_key_is_not_valid(validator):
    assert errors(validator, {"sources": {"web": {"path": "web.jsonl"}}}) == []
    assert errors(validator, {"sources": {"web": {"path": "web.jsonl"}}, "temprature": 1})


@locked
def test_the_command_prints_the_committed_schema():
    printed = CliRunner().invoke(app, ["schema"]).output
    Draft7Validator.check_schema(json.loads(printed))
    assert printed == COMMITTED.read_text(), "run python -m tests.cli.test_schema"


# ---- The tables of the documentation ----


def table(cls: type) -> str:
    """The fields of a dataclass, without those it inherits from other tables or from transformers."""
    inherited = {f.name for base in cls.__bases__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    texts, rows = help_of(cls), ["| key | value | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name not in inherited:
            value = "required" if field.name in required_fields(cls) else f"`{json.dumps(field.default)}`"
            allowed = describe(field_types(cls)[field.name])
            rows.append(f"| `{field.name}` | {allowed} | {value} | {texts[field.name]} |")
    return "\n".join(rows)


_TABLE = re.compile(r"(?<=<!-- fields of )(\w+)( -->\n).*?(?=\n<!-- end of \1 -->)", re.DOTALL)


def page_with_tables(text: str) -> str:
    return _TABLE.sub(lambda found: f"{found[1]}{found[2]}{table(TABLES[found[1]])}", text)


@locked
def test_the_tables_of_fields_are_current():
    for page in PAGES:
        assert page_with_tables(page.read_text()) == page.read_text(), "run python -m tests.cli.test_schema"


def test_every_table_of_fields_is_on_a_page():
    assert sorted(found[1] for page in PAGES for found in _TABLE.finditer(page.read_text())) == sorted(TABLES)


@pytest.mark.parametrize("cls", [*TABLES.values(), HardwareArguments])
def test_the_schema_of_a_field_gives_its_type_back(cls):
    definitions: dict[str, Any] = {}
    json_schema(cls, definitions)
    for name, kind in field_types(cls).items():
        if not any(dataclasses.is_dataclass(option) for option, _ in options(kind)):
            found = describe(kind_of(definitions[cls.__name__]["properties"][name]))
            assert set(found.split(" or ")) == set(describe(kind).split(" or ")), name


@pytest.mark.parametrize("cls", [*TABLES.values(), HardwareArguments])
def test_every_field_has_a_help_text(cls):
    assert help_of(cls).keys() >= field_types(cls).keys()


if __name__ == "__main__":
    COMMITTED.write_text(CliRunner().invoke(app, ["schema"]).output)
    for page in PAGES:
        page.write_text(page_with_tables(page.read_text()))
