"""`hf-nexus compare`: its folder, and options that exclude each other."""

import errno

import pytest

from hf_nexus.cli.compare import compare


def test_a_folder_has_one_comparison(tmp_path, monkeypatch):
    def held(*args):
        raise BlockingIOError(errno.EAGAIN, "held")

    monkeypatch.setattr("fcntl.flock", held)
    monkeypatch.setattr("hf_nexus.compare.comparison.Comparison.run", lambda comparison: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="is used by another process"):
        compare("compare", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"report": True, "run": "nexus/seed-2"}, "--report and --run exclude each other"),
        ({"plan": True, "report": True, "run": "nexus/seed-2"}, "--plan and --report and --run exclude"),
        ({"plan": True, "pilot": True}, "--plan and --pilot exclude"),
        ({"difference": [0.1]}, "--difference is only printed with --plan or --pilot"),
    ],
)
def test_no_option_is_ignored(options, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        compare("compare", str(tmp_path), **options)


def test_the_command_of_a_plan_can_be_pasted(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr("hf_nexus.compare.plan.print_plan", lambda whole, command, *others: commands.append(command))
    compare("compare", str(tmp_path / "my runs"), plan=True)
    assert commands == [f"hf-nexus compare compare --output_dir '{tmp_path}/my runs'"]
