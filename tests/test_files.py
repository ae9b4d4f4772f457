"""The helpers for files, messages and errors."""

import json
import math
from pathlib import Path

import pytest

from hf_nexus.files import finite_json, nearest, one_line_errors, write_atomic


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "new" / "card.md", "old\n")

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new\n")
    assert path.read_bytes() == b"old\n"


def test_json_has_null_for_what_is_not_finite() -> None:
    text = finite_json({"loss": [math.nan, (math.inf, 1.5)], 3: "ü"})
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": [None, [None, 1.5]], "3": "ü"} and "ü" in text


@pytest.mark.parametrize(("word", "hint"), [("wieght", " Did you mean 'weight'?"), ("colour", ""), (7, "")])
def test_only_a_near_word_is_suggested(word: object, hint: str) -> None:
    assert nearest(word, ["weight", "path"]) == hint


def test_errors_that_users_can_mend_are_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: two lines$"), one_line_errors():
        raise ValueError("two\n  lines")
    with pytest.raises(ValueError, match="two"), one_line_errors(debug=True):
        raise ValueError("two")
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0
