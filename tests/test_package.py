"""The package as a whole: its import directions, its public names, and what importing it costs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_nexus

PACKAGE = Path(hf_nexus.__file__).parent

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
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{hf_nexus.__version__}"' in text


def test_constraints_are_names_and_versions_only():
    lines = (PACKAGE.parent / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
