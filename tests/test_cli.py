"""The console script: light to start, one line per error."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_nexus import cli


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from hf_nexus.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    commands = ("train", "plan", "compare", "closeness", "benchmark", "card", "push", "env")
    assert all(command in result.stdout for command in commands)


def test_plan_prints_the_numbers_and_takes_overrides(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "130m", "--max_steps", "10", "--devices", "2"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "132,144,384" in printed.replace("\n", "")
    assert "computed" in printed and "10" in printed


def test_env_names_the_versions(capsys):
    import torch

    with pytest.raises(SystemExit) as stop:
        cli.main(["env"])
    assert not stop.value.code
    assert torch.__version__.split("+")[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "130mm"], ["130mm", "did you mean '130m'"]),
        (["plan", "130m", "--max_step", "3"], ["--max_step", "did you mean '--max_steps'"]),
        (["train", "130m"], ["accelerator", "--config demo"]),
        (["compare", "nope.yaml"], ["There is no comparison 'nope.yaml'", "path of a YAML"]),
        (["closeness", "no/such-folder"], ["no pretrain.yaml beside no/such-folder", "--config"]),
        (["card", "no/such-folder"], ["no/such-folder holds no run_summary.json"]),
        (["benchmark", "no/such-folder", "--tasks", "humaneval"], ["humaneval", "--allow-code-execution"]),
    ],
)
def test_errors_are_one_line_and_fail(argv, words, monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words)


def test_debug_keeps_the_traceback():
    with pytest.raises(ValueError, match="no configuration"):
        cli.main(["--debug", "plan", "130mm"])


def test_a_card_is_rendered_anew_and_keeps_what_was_written_into_it(tmp_path, capsys):
    recorded = Path(__file__).parents[1] / "model_cards" / "demo"
    text = (recorded / "README.md").read_text(encoding="utf-8")
    shutil.copyfile(recorded / "run_summary.json", tmp_path / "run_summary.json")
    (tmp_path / "README.md").write_text(text + "\n## My notes\nkept\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["card", str(tmp_path)])
    assert not stop.value.code
    assert "Rendered" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text + "\n## My notes\nkept\n"
