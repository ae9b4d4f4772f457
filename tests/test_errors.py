"""Errors that users can fix: one line, and the line of the file that they are about."""

from pathlib import Path

import pytest

from hf_nexus.errors import one_line_errors
from hf_nexus.strict import read_yaml

TEXT = """\
data:
  sources:
    code: {path: builtin/code, wieght: 1}
  stages: [{until: 1.0}, {untill: 2}]
training:
  hub_token: hf_abc
  max_step: 3
"""


def test_errors_that_users_can_mend_are_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: two lines$"), one_line_errors():
        raise ValueError("two\n \x1b[31m lines")
    with pytest.raises(ValueError, match="two"), one_line_errors(debug=True):
        raise ValueError("two")
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("key", "line", "column"),
    [
        ("data.sources.code.wieght: unknown key.", 3, 32),
        ("data.stages[1].untill: unknown key.", 4, 27),
        ("data.sources.math: missing.", 2, 3),  # of the mapping that lacks it
        ("max_step: not allowed.", 7, 3),  # the section is not part of every message
        ("training.max_step=3 is not allowed.", 7, 3),
    ],
)
def test_the_line_of_a_key_is_shown_with_a_caret(tmp_path: Path, key: str, line: int, column: int) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise ValueError(f"{path}: {key}")
    message, place, shown, caret = str(stop.value.code).splitlines()
    assert message == f"error: {path}: {key}" and place == f"  --> {path}:{line}:{column}"
    indent = 4
    assert shown == " " * indent + TEXT.splitlines()[line - 1] and caret.index("^") == indent + column - 1


@pytest.mark.parametrize(
    "message",
    ["{path}: training.hub_token: not allowed.", "{path}: odd", "gone.yaml: a: odd", f"{'x' * 5000}: a: odd"],
)
def test_no_line_is_shown_of_a_token_or_an_unknown_place(tmp_path: Path, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise ValueError(message.format(path=path))
    assert "\n" not in str(stop.value.code)


@pytest.mark.parametrize(("text", "line"), [("a: [1\nb: 2\n", 2), ("a: 1\na: 2\n", 2), ("a: !x 1", 1)])
def test_the_line_that_is_no_yaml_is_shown(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        read_yaml(path)
    assert f"\n  --> {path}:{line}:" in str(stop.value.code) and str(stop.value.code).endswith("^")
