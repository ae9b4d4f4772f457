"""The package as a whole: its import directions, its public names, and what importing it costs."""

import ast
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_nexus

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_nexus.__file__).parent  # elsewhere where the tests run against an installed wheel

# A module imports from its own room and from those below, that is, to its right.
ROOMS = [
    "cli",
    "compare",
    "pretrain",
    "trainer",
    "plots",
    "hub",
    "evaluation",
    "mixture",
    "nexus",
    "controls",
    "tensors",
    "schema",
    "errors",
    "strict",
    "lock",
    "files",
    "lazy",
    "version",
    "terminal",
]


def modules_of_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, under `TYPE_CHECKING` and in functions as well."""
    package = ["hf_nexus", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
            of_package = module == ["hf_nexus"]  # from which only the version is imported
            found |= {name if is_module(name) or of_package else ".".join(module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found -= {"hf_nexus.__version__"}
    return {name.removeprefix("hf_nexus.") for name in found if name.startswith("hf_nexus.")}


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rooms_below_its_own(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":  # it names the public objects of all rooms, which are loaded when they are used
        return
    rooms = {module.split(".")[0] for module in modules_of_imports(path)}
    assert rooms <= set(ROOMS[ROOMS.index(room) :])


def test_no_modules_import_one_another():
    modules = {p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for p in FILES}
    TopologicalSorter({modules[p]: modules_of_imports(p) for p in FILES if modules[p] != "__init__"}).prepare()


def test_the_tests_of_imports_see_them():
    assert {"hub.run_summary", "trainer.window"} <= modules_of_imports(PACKAGE / "trainer" / "mixin.py")
    assert modules_of_imports(PACKAGE / "nexus.py") == {"controls", "tensors"}


def test_every_call_that_loads_says_whether_code_is_trusted():
    unclear = []
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("recipes/*.py")]:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            # A dataset without a name, or with a constant one, is a format of local files.
            named = name == "load_dataset" and call.args and not isinstance(call.args[0], ast.Constant)
            if named or re.fullmatch(r"Auto\w+\.from_(pretrained|config)", name):
                text = ast.unparse(call)
                if "trust_remote_code" not in text and not (path.name == "finetune.py" and "**options" in text):
                    unclear.append(f"{path.name}: {text}")
    assert unclear == []


def test_the_upload_process_starts_without_heavy_packages():
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, hf_nexus.hub.uploader_process; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_a_run_needs_no_optional_package(tmp_path):
    """sklearn cannot be imported either: transformers uses it if it is there, and it needs scipy."""
    code = f"""
import sys
hidden = dict.fromkeys(["evaluate", "peft", "lm_eval", "trl", "matplotlib", "scipy", "sklearn"])
sys.modules |= hidden
import hf_nexus
assert not {{"torch", "transformers"}} & set(sys.modules)
from pathlib import Path
from hf_nexus.evaluation.statistics import mean
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.run import prepare_run
from tests.support.tiny_config import write_config
run = prepare_run(parse_arguments(["--config", str(write_config(Path({str(tmp_path)!r}))), "--max_steps", "2",
    "--lr_scheduler_type", "constant", "--output_dir", {str(tmp_path / "out")!r}]))
run.train()
assert (run.trainer.args.output_dir / Path("README.md")).exists()
assert "eval_ood_loss" in run.trainer.evaluate()
assert hidden.items() <= sys.modules.items()
try:
    mean([1.0, 2.0])
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Plots need matplotlib: pip install matplotlib scipy") == 1
    assert done.stdout.splitlines()[-1] == "Statistics of a comparison need scipy: pip install matplotlib scipy"


def test_public_names_resolve_and_unknown_ones_do_not():
    for name in hf_nexus.__all__:
        assert getattr(hf_nexus, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nexuss'"):
        hf_nexus.Nexuss  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    assert hf_nexus.__version__ == version("hf-nexus")


def test_constraints_are_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)


@pytest.mark.skipif(PACKAGE.parent != ROOT, reason="there is no source next to the tests to build it from")
def test_the_wheel_holds_all_of_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("hatch_vcs", reason="needs hatch-vcs")
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
    configs = [f"hf_nexus/pretrain/configs/{name}.yaml" for name in ("demo", "130m", "300m", "1b", "3b")]
    data = ["hf_nexus/py.typed", "hf_nexus/hub/template.md", "hf_nexus/compare/configs/compare.yaml"]
    assert {*configs, *data} <= names
    for file in ("LICENSE", "hf_nexus/mixture/builtin/python-license.txt"):
        assert any(name.endswith(f".dist-info/licenses/{file}") for name in names)
    assert "License-Expression: Apache-2.0 AND PSF-2.0\n" in metadata
    assert "hf-nexus = hf_nexus.cli.app:main" in entry_points


def test_names_of_tests_are_short():
    files = (ROOT / "tests").rglob("test_*.py")
    names = [name for path in files for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))]
    assert len(names) > 1000 and [name for name in names if len(name) >= 60] == []


def test_the_citation_is_the_projects():
    citation = (ROOT / "CITATION.cff").read_text()
    assert "2604.09258" in citation
