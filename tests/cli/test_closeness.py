"""`hf-nexus closeness`: where the mixture comes from, the values of --minima, and what is printed."""

import io
import json
from itertools import combinations

import datasets
import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_nexus.cli.app import app
from hf_nexus.cli.closeness import _pairs_table, find_mixture, parse_minima, print_closeness
from hf_nexus.evaluation.closeness import Closeness
from tests.support.closeness import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("closeness"))


def test_the_mixture_is_found_beside_the_model_or_named(run, tmp_path):
    saved = find_mixture(str(run))
    assert find_mixture(str(run / "checkpoint-3")) == saved
    assert find_mixture("org/model", str(run / "pretrain.yaml")) == saved
    assert find_mixture("org/model", str(run.parent / "mixture.yaml")) == saved
    assert list(find_mixture("org/model", "demo").ood_sources) == ["headers", "news", "logic"]
    for nowhere in ("org/model", str(run / "plots"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"no pretrain.yaml in.*--config"):
            find_mixture(nowhere)
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        find_mixture("org/model", "demoo")
    (tmp_path / "bad.yaml").write_text("data: {sources: {a: {path: x.jsonl, weight: 0}}}")
    with pytest.raises(ValueError, match=r"bad.yaml: data.sources.a.weight: 0"):
        find_mixture("org/model", str(tmp_path / "bad.yaml"))


def test_minima_are_parsed():
    assert parse_minima("code=runs/a, math = org/b") == {"code": "runs/a", "math": "org/b"}
    assert parse_minima(None) == {}
    for wrong in ("code", "code=", "=runs/a", "code=a,code=b", "code=a,"):
        with pytest.raises(ValueError, match="--minima"):
            parse_minima(wrong)


@pytest.mark.parametrize("flag", ["--batches", "--batch-size", "--projection"])
def test_numbers_below_1_are_refused(flag):
    result = CliRunner().invoke(app, ["closeness", "org/model", flag, "0"])
    assert result.exit_code == 2 and flag in result.output


def test_the_command_prints_and_saves_the_same_numbers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "rows"))
    argv = ["closeness", str(run), "--batches", "1", "--minima", f"code={run},math={run}"]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.exception
    saved = json.loads((run / "closeness.json").read_text())
    assert f"{saved['macro_loss']:.4f}" in result.output and f"{saved['mean_cosine']:+.4f}" in result.output
    assert saved["minima"]["pairwise"] == [["code", "math", 0.0]]


def test_all_numbers_are_printed():
    minima = {
        "to_start": {"code": 1.25, "math": 2.5},
        "start_loss": {"code": 3.5, "math": 4.5},
        "end_loss": {"code": 2.75, "math": 3.75},
        "parameter_norm": 10.0,
        "pairwise": [("code", "math", 3.125)],
        "barriers": [("code", "math", 0.0625)],
    }
    found = Closeness(
        model="org/adapter",
        base="org/base",
        parameters=12345,
        parameter_norm=10.0,
        losses={"web": 1.5, "code": 2.5, "math": 3.25},
        ood_losses={"law": 4.125},
        macro_loss=2.0625,
        ood_loss=4.125,
        tokens={"web": 1111, "code": 2222, "math": 3333, "law": 4444},
        cosines=[("web", "code", float("nan")), ("web", "math", 0.5), ("code", "math", -0.25)],
        cosine_tokens={"web": 777, "code": 888, "math": 999},
        projection=1024,
        minima=minima,
    )
    console = Console(width=120, record=True, file=io.StringIO())
    print_closeness(found, console)
    text = console.export_text()
    expected = ["org/adapter (adapter of org/base)", "12,345", "web", "code", "math", "law", "macro", "OOD", "4,444"]
    expected += ["1.5000", "2.0625", "4.1250", "nan", "+0.500", "-0.250", "1024", "777"]
    expected += ["1.25", "0.1250", "3.5000", "2.7500", "3.125", "0.3125 of the parameter norm", "0.0625"]
    assert [word for word in expected if word not in text] == []


@pytest.mark.parametrize("width", [60, 120])
def test_a_matrix_that_is_too_wide_is_a_list_of_pairs(width):
    names = ["documentation", "mathematics", "conversations"]
    pairs = [(a, b, i / 8) for i, (a, b) in enumerate(combinations(names, 2))]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(_pairs_table("Cosines", names, pairs, "{:+.3f}", width))
    text = console.export_text()
    assert "…" not in text and all(word in text for word in (*names, "+0.000", "+0.125", "+0.250"))
    assert text.count("+0.125") == (1 if width == 60 else 2)
