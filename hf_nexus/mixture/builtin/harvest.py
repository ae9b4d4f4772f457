"""
Text that every installation of hf_nexus has: the standard library and the packages that hf_nexus depends on.

Packages are found without being imported. The order depends on names alone, not on the file system.
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

# Byte tables, packages of other projects, and modules that some distributions of Python leave out.
_NOT_CODE = "dist-packages distutils encodings ensurepip idlelib lib2to3 pydoc_data site-packages"
_TESTS = "test tests testing idle_test"
_DOCUMENTED = "numpy torch/nn torch/optim networkx sympy pandas transformers huggingface_hub"
_REQUIRED = "torch transformers accelerate datasets numpy pyyaml rich typer"
_LICENSE_FILE = re.compile(r"\.dist-info/(.*/)?[^/]*(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)


def split(text: str, size: int = 3000) -> Iterator[str]:
    """
    Cut a text into pieces of about `size` characters.

    A piece ends before an unindented line that follows a blank line. A piece of twice `size` ends at any blank line,
    and one of four times `size` at any line. Pieces under 200 characters are dropped.

    Args:
        text (`str`):
            Source code or prose.
        size (`int`, *optional*, defaults to `3000`):
            The length in characters after which a piece may end.
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
    """The names in the order of their hashes. The first ones are a sample of all."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _files(root: Path, suffix: str, skip: Collection[str] = ()) -> Iterator[str]:
    """Scattered paths, relative to `root`, of the files that are in no folder named in `skip`."""
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(suffix)]
    yield from _scattered(found)


def _text(path: Path) -> str:
    """The text of a file with `\\n` line ends, or an empty one if the file is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        return ""


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in strings that are not raw
        return ast.parse(_text(path))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The built-in corpus reads the files of {name}, which is not installed: pip install {name}")
    return Path(spec.submodule_search_locations[0])


def code() -> Iterator[str]:
    """Pieces of the modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in _files(root, ".py", (*_NOT_CODE.split(), *_TESTS.split())):
        if not name.startswith(("_sysconfigdata", "config-")):  # These contain paths of the machine.
            yield from split(_text(root / name))


def documentation(size: int) -> Iterator[str]:
    """
    Python's help topics, then docstrings of several packages.

    Args:
        size (`int`):
            Number of bytes, about equal for each package.
    """
    topics = list(_help_topics())
    yield from topics
    budget = (size - sum(len(text.encode()) for text in topics)) / len(_DOCUMENTED.split())
    for place in _DOCUMENTED.split():
        name, _, folder = place.partition("/")
        left = budget
        for text in _docstrings(_package(name) / folder, place.replace("/", ".")):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def _help_topics() -> Iterator[str]:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if path.exists():  # Some distributions of Python have it in a separate package.
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.Dict):
                for topic in node.values:
                    yield from split(str(ast.literal_eval(topic)))


def _docstrings(root: Path, package: str) -> Iterator[str]:
    for name in _files(root, ".py", _TESTS.split()):
        module = f"{package}.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        yield from _described(_parsed(root / name), module)


def _described(node: ast.AST, name: str) -> Iterator[str]:
    """A document for each docstring of 300 characters or more, with the signature as its first line."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= 300:
            arguments = "" if isinstance(node, ast.Module | ast.ClassDef) else f"({ast.unparse(node.args)})"
            yield from split(f"{name}{arguments}\n\n{inspect.cleandoc(text)}")
        for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _described(child, f"{name}.{child.name}")


def headers() -> Iterator[str]:
    """Pieces of the C++ headers of torch, without the generated ones and those of other projects."""
    root = _package("torch") / "include"
    for name in _files(root, ".h", ("ops",)):
        if name.startswith(("ATen/", "c10/", "torch/csrc/")):
            yield from split(_text(root / name))


def readmes() -> Iterator[str]:
    """Pieces of the long descriptions of the required packages."""
    packages = required_packages()
    for name in _scattered(packages):
        metadata = packages[name].metadata
        if "Description" in metadata:
            yield from split(metadata["Description"])


def licenses() -> Iterator[str]:
    """Pieces of the licence texts of the required packages. A text that mostly repeats earlier ones is left out."""
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
    """The installed packages that hf_nexus needs, directly or not, by name. Extras do not count."""
    found: dict[str, Distribution] = {}

    def add(name: str) -> None:
        name = canonicalize_name(name)
        if name in found:
            return
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            return
        for needed in map(Requirement, found[name].requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                add(needed.name)

    for name in _REQUIRED.split():
        add(name)
    return dict(sorted(found.items()))
