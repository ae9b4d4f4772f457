"""The package as a whole: its import directions, its public names, and what importing it costs."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_nexus

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_nexus.__file__).parent  # elsewhere where the tests run against an installed wheel

# The four rooms, and the glue above them in the order in which it may be imported.
ROOMS = {
    "nexus": "algorithm",
    "snapshot": "algorithm",
    "mixture": "data",
    "evaluation": "evidence",
    "hub": "hub",
    "distributed": "distributed",
}


def imports(path: Path) -> set[str]:
    """First component, below hf_nexus, of each module that a file of the package imports."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_nexus."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hf_nexus.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_neither_one_another_nor_what_lies_above(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if module not in ROOMS:
        return
    for imported in imports(path):
        assert ROOMS.get(imported) == ROOMS[module], f"{path.name} imports {imported}"


def test_the_directions_test_sees_imports():
    assert {"nexus", "mixture_trainer", "precision", "distributed"} <= imports(PACKAGE / "trainer.py")
    assert imports(PACKAGE / "nexus.py") == {"snapshot"}


def test_the_core_imports_without_the_optional_packages_and_costs_nothing_itself():
    """In a process where datasets, evaluate, peft and matplotlib cannot be imported."""
    code = """
import json, sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
hidden = {"datasets", "evaluate", "peft", "matplotlib", "lm_eval", "trl"}
PathFinder.find_spec = staticmethod(
    lambda name, *args: None if name.split(".")[0] in hidden else find_spec(name, *args)
)
import hf_nexus
alone = sorted(m for m in ("torch", "transformers") if m in sys.modules)
from hf_nexus import Nexus, NexusConfig, NexusTrainer
assert not hidden & set(sys.modules)
print(json.dumps(alone))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_public_names_resolve_and_unknown_ones_do_not():
    for name in hf_nexus.__all__:
        assert getattr(hf_nexus, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nexuss'"):
        hf_nexus.Nexuss  # noqa: B018


def test_the_version_is_the_projects():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{hf_nexus.__version__}"' in text


def test_constraints_are_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)


@pytest.mark.skipif(PACKAGE.parent != ROOT, reason="there is no source beside the tests to build it from")
def test_the_wheel_holds_all_of_the_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "No module named hatchling" in done.stderr:
        pytest.skip("needs hatchling")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {str(p.relative_to(PACKAGE.parent)) for p in files}
    assert {name for name in names if ".dist-info/" not in name} == expected
    configs = [f"hf_nexus/configs/{name}.yaml" for name in ("demo", "130m", "300m", "1b", "3b")]
    data = ["hf_nexus/py.typed", "hf_nexus/hub/card_template.md", "hf_nexus/experiments/configs/compare.yaml"]
    assert {*configs, *data} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata and "hf-nexus = hf_nexus.cli:main" in entry_points


def test_the_citation_is_the_projects():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {hf_nexus.__version__}\n" in citation and "2604.09258" in citation
