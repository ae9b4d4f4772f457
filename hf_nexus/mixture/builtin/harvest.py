"""Text that lies on every machine which can run hf_nexus: the standard library, and the packages it depends on.

Packages are found without being imported, and everything is read in an order that depends on names alone.
"""

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Byte tables, tests, other people's packages, and what distributions of Python tend to leave out.
_NOT_CODE = (
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
)
_TESTS = ("test", "tests", "testing", "idle_test")
_DOCUMENTED = (
    "numpy",
    "torch/nn",
    "torch/optim",
    "networkx",
    "sympy",
    "matplotlib",
    "transformers",
    "huggingface_hub",
)
# What these need in turn is found from their metadata.
_REQUIRED = ("torch", "transformers", "accelerate", "datasets", "numpy", "pyyaml", "matplotlib", "rich", "typer")
_LICENSE_FILE = re.compile(r"\.dist-info/(.*/)?[^/]*(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)


def split(text: str, size: int = 3000) -> Iterator[str]:
    """
    Cuts a text into pieces: past `size` characters at a blank line before unindented text, past twice `size` at any
    blank line, past four times `size` at any line. Pieces under 200 characters are dropped: they say mostly where
    documents end.

    Args:
        text (`str`):
            Source code or prose.
        size (`int`, *optional*, defaults to `3000`):
            The length in characters that pieces are cut at when the text allows it.

    Example:
        >>> from hf_nexus.mixture.builtin.harvest import split
        >>> [len(piece) for piece in split("\\n\\n".join(["word " * 100] * 12))]
        [3005, 3005]
    """
    piece: list[str] = []
    length = 0
    for line in text.splitlines():
        limit = 4 * size if not piece or piece[-1] else 2 * size if line[:1].isspace() else size
        if line.strip() and length > limit:
            yield from _piece(piece)
            piece, length = [], 0
        piece.append(line.rstrip())
        length += len(line) + 1
    yield from _piece(piece)


def _piece(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines).strip("\n")
    if len(text) >= 200:
        yield text + "\n"


def _scattered(names: Iterable[str]) -> list[str]:
    """The names in the order of their hashes: whatever comes first is a sample of the whole."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _files(root: Path, suffix: str, skip: Collection[str] = ()) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The files below `root`, scattered, and the parts of their paths from there; `skip` names directories."""
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(suffix)]
    for name in _scattered(found):
        yield root / name, tuple(name.split("/"))


def _text(path: Path) -> str:
    """The file's text, or nothing where it is not UTF-8. Line ends are "\\n" everywhere."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        return ""


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The built-in corpus reads the files of {name}, which is missing: pip install {name}.")
    return Path(spec.submodule_search_locations[0])


def code() -> Iterator[str]:
    """Pieces of the standard library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    for path, parts in _files(root, ".py", (*_NOT_CODE, *_TESTS)):
        # Directories such as config-3.12-x86_64 and files such as _sysconfigdata hold the paths of this machine.
        if not parts[0].startswith(("_sysconfigdata", "config-")):
            yield from split(_text(path))


def documentation(size: int) -> Iterator[str]:
    """
    Python's help topics, then docstrings of several packages in equal shares.

    Args:
        size (`int`):
            Bytes wanted. A package that has more than its share is left early.
    """
    topics = 0
    for text in _help_topics():
        topics += len(text.encode())
        yield text
    share = (size - topics) / len(_DOCUMENTED)
    for place in _DOCUMENTED:
        name, _, below = place.partition("/")
        left = share
        for text in _docstrings(_package(name) / below, place.replace("/", ".")):
            left -= len(text.encode())
            yield text
            if left <= 0:
                break


def _help_topics() -> Iterator[str]:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if path.exists():  # Some distributions of Python keep it in a package of its own.
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.Dict):
                for topic in node.values:
                    yield from split(str(ast.literal_eval(topic)))


def _docstrings(root: Path, package: str) -> Iterator[str]:
    for path, parts in _files(root, ".py", _TESTS):
        module = ".".join((package, *parts[:-1], path.stem)).removesuffix(".__init__")
        yield from _described(_parsed(path), module)


def _described(node: ast.AST, name: str) -> Iterator[str]:
    """A document for each docstring of some length, headed by what it describes."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= 300:
            arguments = "" if isinstance(node, ast.Module | ast.ClassDef) else f"({ast.unparse(node.args)})"
            yield from split(f"{name}{arguments}\n\n{inspect.cleandoc(text)}")
        for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _described(child, f"{name}.{child.name}")


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in a string that is not raw: theirs, not ours.
        return ast.parse(_text(path))


def headers() -> Iterator[str]:
    """Pieces of the C++ headers that torch ships, without the generated ones and those of other projects."""
    root = _package("torch") / "include"
    for path, parts in _files(root, ".h", ("ops",)):
        if parts[0] in ("ATen", "c10") or parts[:2] == ("torch", "csrc"):
            yield from split(_text(path))


def readmes() -> Iterator[str]:
    """Pieces of the long descriptions of all packages that hf_nexus needs."""
    packages = required_packages()
    for name in _scattered(packages):
        metadata = packages[name].metadata
        if "Description" in metadata:
            yield from split(metadata["Description"])


def licenses() -> Iterator[str]:
    """Pieces of the licence texts of all packages that hf_nexus needs; one that says little new is left out."""
    seen: set[str] = set()
    for package in required_packages().values():
        for file in sorted(package.files or (), key=str):
            if _LICENSE_FILE.search(file.as_posix()):
                text = _text(Path(str(package.locate_file(file))))
                paragraphs = [re.sub(r"\W+", " ", part).lower() for part in re.split(r"\n\s*\n", text)]
                new = sum(len(part) for part in paragraphs if part not in seen)
                seen.update(paragraphs)
                if new > 0.3 * sum(map(len, paragraphs)):
                    yield from split(text)


def required_packages() -> dict[str, Distribution]:
    """Every installed package that hf_nexus needs, directly or not, in the order of names; extras do not count."""
    found: dict[str, Distribution] = {}
    waiting: Iterable[str] = _REQUIRED
    while waiting:
        needed: list[str] = []
        for name in map(canonicalize_name, waiting):
            try:
                package = found[name] if name in found else distribution(name)
            except PackageNotFoundError:
                continue
            if name not in found:
                found[name] = package
                needed += _needs(package)
        waiting = needed
    return dict(sorted(found.items()))


def _needs(package: Distribution) -> list[str]:
    requirements = map(Requirement, package.requires or ())
    return [needed.name for needed in requirements if not needed.marker or needed.marker.evaluate({"extra": ""})]
