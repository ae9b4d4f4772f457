"""`hf-nexus init`: only the configuration is on stdout, and errors are one line."""

import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from hf_nexus.cli import app as cli
from hf_nexus.pretrain import starter
from tests.support.tiny_config import documents


def test_only_the_yaml_is_on_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(starter, "_tokens_per_second", lambda *args: 1000.0)
    for name in ("a", "b"):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in documents("abcd", 60, ord(name)))
        Path(f"{name}.jsonl").write_text(rows)
    with pytest.raises(SystemExit) as stop:
        cli.main(["init", "a.jsonl", "--ood", "b.jsonl"])
    printed = capsys.readouterr()
    assert not stop.value.code and "a.jsonl: 60 documents" in printed.err
    content = yaml.safe_load(printed.out)
    assert list(content) == ["model", "data", "training"] and content["data"]["sources"]["b"]["role"] == "ood"
    assert printed.out.startswith("# Written by: hf-nexus init a.jsonl --ood b.jsonl\n")


def test_a_file_gets_utf_8_on_any_system(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(starter, "starter_yaml", lambda files, *others: " ".join(files))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    with pytest.raises(SystemExit):
        cli.main(["init", "données.jsonl", "文.jsonl"])
    sys.stdout.flush()
    assert written.getvalue().decode() == "données.jsonl 文.jsonl"


@pytest.mark.parametrize(
    ("platform", "files"),
    [("win32", ["a.jsonl", "b.jsonl", "c[1].jsonl", "no.*"]), ("linux", ["[ab].*", "c[1].jsonl", "no.*"])],
)
def test_each_match_of_a_glob_is_a_source_on_windows(tmp_path, monkeypatch, capsys, platform, files):
    """Other shells have replaced globs that are not in quotes."""
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a", "c1", "c[1]"):
        Path(f"{name}.jsonl").touch()
    monkeypatch.setattr(starter, "starter_yaml", lambda files, *others: " ".join(files))
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(SystemExit):
        cli.main(["init", "[ab].*", "c[1].jsonl", "no.*"])
    assert capsys.readouterr().out == " ".join(files)


@pytest.mark.parametrize(
    ("name", "words"), [("none.jsonl", "no file matches 'none.jsonl'"), ("odd.jsonl", "It has id (int), body (text)")]
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    Path("odd.jsonl").write_text('{"id": 1, "body": "a"}\n')
    with pytest.raises(SystemExit) as stop:
        cli.main(["init", name])
    message = str(stop.value.code)
    assert message.startswith("error: ") and words in message and "\n" not in message and capsys.readouterr().out == ""
