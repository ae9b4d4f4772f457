"""The helpers for files, messages and errors."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.debug_utils import DebugOption
from transformers.trainer_utils import IntervalStrategy

from hf_nexus.files import (
    delete,
    finite_json,
    nearest,
    printable,
    read_plain,
    without_folders,
    write_atomic,
)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "new" / "card.md", "old\n")

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new\n")
    assert path.read_bytes() == b"old\n" and [*path.parent.iterdir()] == [path]


def test_processes_write_the_same_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file = Path.replace

    def delayed(scratch: Path, path: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace_file)
        write_atomic(path, "of another process")
        return scratch.replace(path)

    monkeypatch.setattr(Path, "replace", delayed)
    assert write_atomic(tmp_path / "run.yaml", "own").read_text() == "own"


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    """Neither by a write, under its last name or its first, nor by a read or a deletion."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("kept")
    for name in ("card.md", "card.md.tmp"):
        (tmp_path / name).symlink_to(victim / "file")
    with pytest.raises(ValueError, match=r"card\.md is a link"):
        read_plain(tmp_path / "card.md")
    assert read_plain(write_atomic(tmp_path / "card.md", "new")) == "new"
    (tmp_path / "folder").symlink_to(victim)
    delete(tmp_path / "folder")
    delete(tmp_path / "absent")
    assert (victim / "file").read_text() == "kept" and not (tmp_path / "folder").exists()


def _write_large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("make", [os.mkfifo, _write_large])
def test_a_file_that_cannot_be_read_whole_is_an_error(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "file")
    with pytest.raises(ValueError, match="not a regular file of at most"):
        read_plain(tmp_path / "file")


@given(st.text())
def test_printed_text_is_one_line_of_visible_characters(text: str) -> None:
    assert printable(f"\x1b[2J{text}\x1b]0;x\x07").isprintable()


def test_json_has_null_for_what_is_not_finite() -> None:
    text = finite_json({"loss": [math.nan, (math.inf, 1.5)], 3: "ü"})
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": [None, [None, 1.5]], "3": "ü"} and "ü" in text


@pytest.mark.parametrize(("word", "hint"), [("wieght", " Did you mean 'weight'?"), ("colour", ""), (7, "")])
def test_only_a_near_word_is_suggested(word: object, hint: str) -> None:
    assert nearest(word, ["weight", "path"]) == hint


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((path, "x.json") for path in ("/a/b/x.json", "~/a/x.json", "~alice/x.json", "file:///a/x.json", "/x.json")),
        *(("C:\\a\\x.json", "x.json"), ("\\\\host\\a\\x.json", "x.json"), ("/my folder/a/x.json", "x.json")),
        *(("a=/b/c/x,d=1", "a=x,d=1"), ('{"a": "/b/c/x"}', '{"a": "x"}'), ("see key:/b/c/x", "see key:x")),
        ("read s3://key:pw@bucket/a?v=1&X-Amz-Signature=f0: gone", "read s3://bucket/a gone"),
        *((text, text) for text in ("https://a.b/c/d", "s3://b/part-?.jsonl", "http://a/b?page=2@3")),
        *((text, text) for text in ("hf://datasets/a/b", "user/name", "</s>", "[/INST]", "1 / 2")),
    ],
)
def test_absolute_paths_are_reduced_to_their_names(text: str, name: str) -> None:
    assert without_folders({"a": [text], text: Path("/a/b")}) == {"a": [name], name: "b"}


def test_the_member_of_an_enumeration_stays_one() -> None:
    """Arguments of the Trainer are members that are texts."""
    found = without_folders({"strategy": IntervalStrategy.STEPS, "debug": [DebugOption.UNDERFLOW_OVERFLOW]})
    assert found["strategy"] is IntervalStrategy.STEPS and found["debug"][0] is DebugOption.UNDERFLOW_OVERFLOW
