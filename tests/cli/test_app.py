"""The `hf-nexus` command: fast help, one line per error."""

import dataclasses
import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.traceback import Traceback
from typer.testing import CliRunner

from hf_nexus import __version__
from hf_nexus.cli import app as cli
from hf_nexus.hub.job import Target
from hf_nexus.hub.queue import QueueStatus
from hf_nexus.strict import packaged

NAMES = [command.name or command.callback.__name__ for command in cli.app.registered_commands]


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from hf_nexus.cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in NAMES)


def test_plan_prints_the_numbers_and_takes_overrides(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "130m", "--max_steps", "10", "--devices", "2", "--dry_run=false", "--no-dry-run"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "132,144,384" in printed.replace("\n", "")
    assert "computed" in printed and "10" in printed


def test_a_plan_shows_brackets_in_names_as_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("my[red]", "a[/b].yaml")
    path.parent.mkdir(parents=True)
    path.write_text(packaged("pretrain")["130m"].read_text())
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(path)])
    assert not stop.value.code and f"Plan of {path}" in capsys.readouterr().out


def test_env_names_the_versions(capsys):
    import torch

    with pytest.raises(SystemExit) as stop:
        cli.main(["env"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed and __version__ in printed


def test_env_lists_optional_packages_if_installed(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from hf_nexus.hub import facts

    def version(name: str) -> str:
        if name == "trl":
            raise PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr(facts, "version", version)
    assert "peft" not in facts.installed_versions()
    found = facts.installed_versions(optional=True)
    assert found["hf-nexus"] == __version__ and "trl" not in found
    assert all(found[name] == "1.2.3" for name in ("peft", "evaluate", "lm-eval", "bitsandbytes"))


def test_a_command_started_by_a_notebook_can_plot(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of_the_notebook")
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    code = "import matplotlib; print(matplotlib.get_backend())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "agg"


def test_the_version_is_printed():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.output == f"hf-nexus {__version__}\n"


def test_the_help_names_the_flags():
    from hf_nexus.pretrain.fields import HardwareArguments

    planning = [f"--{field.name}" for field in dataclasses.fields(HardwareArguments)]
    fields = ["--max_steps", "--inner_lr", "--hidden_size", "--hub_model_id", "configs"]
    fields += ["─ model ─", "─ data ─", "─ nexus ─", "─ training ─", "─ hub ─", "─ saving ─"]
    comparing = ["--output_dir", "--plan", "--pilot", "--difference"]
    flags = {"plan": [*planning, "--devices", *fields], "train": fields, "compare": comparing}
    for command, expected in flags.items():
        result = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
        assert result.exit_code == 0
        assert [word for word in expected if word not in result.output] == []


def test_the_recipe_has_the_help_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_3b.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "pretrain_3b.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--inner_lr" in printed
    assert printed.startswith("Flags: --config CONFIG, and those below but --devices and --accelerate_config")


def test_the_fields_can_be_completed():
    cases = [("train demo --max", "--max_steps"), ("plan demo --mf", "--mfu"), ("train de", "demo")]
    cases += [("train demo --inner-l", "--inner_lr"), ("compare --output-d", "--output_dir")]
    cases += [("benchmark x --batch-s", "--batch-size"), ("benchmark x --batch_s", "--batch-size")]
    for words, expected in cases:
        variables = {"_HF_NEXUS_COMPLETE": "complete_bash", "COMP_WORDS": f"hf-nexus {words}"}
        variables["COMP_CWORD"] = str(len(words.split()))
        found = CliRunner().invoke(cli.app, [], prog_name="hf-nexus", env=variables)
        assert expected in found.output.split(), found.output


def test_a_dash_is_an_underscore_in_every_option(monkeypatch):
    called = []
    monkeypatch.setattr("hf_nexus.compare.plan.print_plan", lambda config, *more: called.append(config.output_dir))
    for flag in ("--output_dir", "--output-dir"):
        assert CliRunner().invoke(cli.app, ["compare", "compare", flag, "x", "--plan"]).exit_code == 0
    assert called == ["x", "x"]


MISTAKES = [
    (["train", "demo", "--max_step", "3"], "error: Unknown argument '--max_step'. Did you mean '--max_steps'?"),
    (["plan", "demo", "--lr", "3"], "error: Unknown argument '--lr'. Did you mean '--learning_rate'?"),
    (["plan", "demmo"], "error: There is no configuration 'demmo'. Did you mean 'demo'?"),
    (["compare", "compair"], "error: There is no comparison 'compair'. Did you mean 'compare'?"),
    (["train", "no_file.yaml"], "error: no_file.yaml: data.sources.code.path: no file matches 'gone.jsonl'"),
    (["train", "demo", "--accelerate_config", "gone.yaml"], "error: --accelerate_config: there is no file"),
    (["compare", "arm.yaml"], "error: arm.yaml: arms.b.inner_Ir: not a training field. Did you mean 'inner_lr'?"),
    (["compare", "base.yaml"], "error: base.yaml: base: There is no configuration 'demmo'. Did you mean 'demo'?"),
    (["closeness", "org/model", "--config", "demo", "--minima", "code"], "error: --minima: 'code' is not allowed"),
]


def test_mistakes_are_found_without_torch(tmp_path):
    (tmp_path / "no_file.yaml").write_text("data: {sources: {code: {path: gone.jsonl}}}")
    rest = "baseline: a\nprimary: {arm: b}\nseeds: [1]\noutput_dir: x\narms: {a: {nexus: false}, b: {"
    (tmp_path / "arm.yaml").write_text(f"base: demo\n{rest}inner_Ir: 0.1}}}}")
    (tmp_path / "base.yaml").write_text(f"base: demmo\n{rest}inner_lr: 0.1}}}}")
    code = (
        "import sys; from hf_nexus.cli.app import main\n"
        f"for argv in {[argv for argv, _ in MISTAKES]}:\n"
        "    try: main(argv)\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), argv"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [message for _, message in MISTAKES if message not in result.stdout] == []


def test_every_command_has_an_example_in_its_help():
    expected = ["benchmark", "card", "closeness", "compare", "env", "init", "plan", "push", "schema", "train"]
    assert sorted(NAMES) == expected
    for name in NAMES:
        output = CliRunner().invoke(cli.app, [name, "--help"], terminal_width=200).output
        assert f"hf-nexus {name}" in " ".join(output.partition("Usage:")[2].partition("\n")[2].split()), name


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["plam", "3b"], "Did you mean 'plan'"),
        (["push"], "Missing argument 'DIR'"),
        (["compare", "x.yaml", "--out_dir", "3"], "--output_dir"),
        (["compare", "x.yaml", "--output_dir"], "requires an argument"),
        (["benchmark", "x", "--limit", "a"], "--limit"),
    ],
)
def test_misspelled_commands_and_options_exit_with_2(argv, expected):
    result = CliRunner().invoke(cli.app, argv, terminal_width=200)
    assert result.exit_code == 2 and expected in result.output


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["plan", "130mm"], ["130mm", "Did you mean '130m'"]),
        (["plan", "130m", "--max_step", "3"], ["--max_step", "Did you mean '--max_steps'"]),
        (["train", "--max_steps", "20", "demo"], ["Name the configuration first: hf-nexus train CONFIG --max_steps"]),
        (["plan", "--mfu=0.4", "demo"], ["Name the configuration first: hf-nexus plan CONFIG --mfu"]),
        (["plan", "x" * 5000], ["There is no configuration"]),
        (["train", "130m", "--config", "demo"], ["--config contradicts CONFIG"]),
        (["plan", "130m", "extra"], ["'extra' is not a flag"]),
        (["plan", "130m", "max_steps", "3"], ["'max_steps' is not a flag", "Did you mean '--max_steps'"]),
        (["train", "130m"], ["accelerator", "hf-nexus train demo", "--config demo"]),
        (["compare", "nope.yaml"], ["There is no comparison 'nope.yaml'", "path of a YAML"]),
        (["closeness", "no/such-folder"], ["no pretrain.yaml in no/such-folder", "--config"]),
        (["push", "no/such-folder"], ["There is no folder no/such-folder"]),
        (["push", "no/such-folder", "--repo", "user/model"], ["There is no folder no/such-folder"]),
        (["card", "no/such-folder"], ["no/such-folder has no run_summary.json"]),
        (["benchmark", "no/such-folder", "--tasks", "humaneval"], ["humaneval", "--allow-code-execution"]),
    ],
)
def test_errors_are_one_line_and_fail(argv, expected, monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--debug", "plan", "130mm"], "no configuration '130mm'"),
        (["plan", "130mm", "--debug"], "no configuration '130mm'"),
        (["compare", "nope.yaml", "--debug"], "no comparison 'nope.yaml'"),
        (["card", "no/such-folder", "--debug"], "no run_summary.json"),
    ],
)
def test_debug_keeps_the_traceback(argv, expected):
    with pytest.raises(ValueError, match=expected):
        cli.main(argv)


TOKEN = "hf_SECRET" + "x" * 80


@pytest.mark.parametrize("place", ["--hub_token TOKEN", "--hub-token=TOKEN", "yaml"])
def test_no_traceback_with_locals_shows_the_token(tmp_path, monkeypatch, place):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the check failed")

    monkeypatch.setattr("hf_nexus.pretrain.parsing.check_run", fail)
    training = {"report_to": "none"} | ({"hub_token": TOKEN} if place == "yaml" else {})
    config = {"data": {"sources": {"code": {"path": "builtin/code"}}}, "training": training}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    flags = [] if place == "yaml" else place.replace("TOKEN", TOKEN).split()
    with pytest.raises(RuntimeError) as error:
        cli.main(["plan", str(tmp_path / "c.yaml"), *flags])
    del training, config, flags  # of this frame
    console = Console(file=io.StringIO(), width=200)
    console.print(Traceback.from_exception(error.type, error.value, error.tb.tb_next, show_locals=True))
    text = console.file.getvalue()
    assert "the check failed" in text and "hub_token" in text and "hf_SE" not in text


def test_debug_with_a_value_is_a_training_argument():
    with pytest.raises(SystemExit, match=r"^error: nonsense is not a valid DebugOption"):
        cli.main(["plan", "130m", "--debug", "nonsense"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"a": 1}', "it lacks 'mixture'"),
        ('{"mixture": [], "evaluations": [], "benchmarks": [], "stages": []}', "missing 4 required"),
        ('{"mixture": [{"sauce": 1}]}', "unexpected keyword argument 'sauce'"),
    ],
)
def test_a_summary_that_is_none_is_named(tmp_path, text, expected):
    (tmp_path / "run_summary.json").write_text(text)
    result = CliRunner().invoke(cli.app, ["card", str(tmp_path)])
    message = str(result.exception.code)  # Python prints it and exits with 1
    assert message.startswith(f"error: {tmp_path / 'run_summary.json'} is not the summary of a run: ")
    assert expected in message and "\n" not in message


def test_a_card_of_a_file_is_refused():
    with pytest.raises(SystemExit, match=r"^error: .* has no run_summary\.json"):
        cli.main(["card", __file__])


def test_a_card_is_rendered_again_and_keeps_added_sections(tmp_path, capsys):
    recorded = Path(__file__).parents[2] / "model_cards" / "demo"
    text = (recorded / "README.md").read_text(encoding="utf-8")
    shutil.copyfile(recorded / "run_summary.json", tmp_path / "run_summary.json")
    (tmp_path / "README.md").write_text(text + "\n## My notes\nkept\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["card", str(tmp_path)])
    assert not stop.value.code
    assert "Rendered" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text + "\n## My notes\nkept\n"


def test_push_passes_its_options_and_asks(monkeypatch, tmp_path, capsys):
    """Without a terminal, only `--yes` sends what may come from another user."""
    calls, out = [], str(tmp_path)

    def push_queue(folder, *, approve, **options):
        calls.append((approve("Step 2 to somewhere."), options))
        return QueueStatus("user/other@main", 2, None, (), None, False), True

    def queue_run(publisher, approve):
        calls.append((approve("Files of another user."), publisher.target))

    monkeypatch.setattr("hf_nexus.hub.uploader.push_queue", push_queue)
    monkeypatch.setattr("hf_nexus.hub.publisher.Publisher.queue_run", queue_run)
    for arguments in (["push", out], ["push", out, "--yes", "--repo", "user/other", "--private"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    assert calls == [
        (False, {"repo_id": None, "revision": None, "private": None}),
        (True, Target("user/other", private=True)),
        (True, {"repo_id": "user/other", "revision": None, "private": True}),
    ]
    printed = capsys.readouterr()
    assert "Step 2 to somewhere." in printed.err and "user/other@main" in printed.out


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_nexus.evaluation.closeness.measure_closeness", interrupt)
    (tmp_path / "my mixture.yaml").write_text("sources: {web: {path: web.jsonl, eval_rows: 2}}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["closeness", str(tmp_path), "--config", str(tmp_path / "my mixture.yaml")])
    assert stop.value.code == 130
    first, *_, last = capsys.readouterr().err.strip().splitlines()
    assert first == f"hf-nexus {__version__} closeness"
    assert last == f"hf-nexus closeness {tmp_path} --config '{tmp_path / 'my mixture.yaml'}'"


def test_an_interrupted_process_prints_what_is_buffered(monkeypatch):
    def interrupt(*args, **options):
        print("a line")
        raise KeyboardInterrupt

    stream, seen = io.TextIOWrapper(io.BytesIO()), []
    monkeypatch.setattr(cli.os, "_exit", lambda status: seen.append((status, stream.buffer.getvalue())))
    monkeypatch.setattr("hf_nexus.hub.uploader.push_queue", interrupt)
    monkeypatch.setattr(sys, "argv", ["hf-nexus", "push", "."])
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == [(130, b"a line\n")]
