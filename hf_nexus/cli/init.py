"""The command `hf-nexus init`."""

import io
import os
import sys
from glob import glob
from typing import Annotated

import typer

__all__ = ["init"]


def init(
    files: Annotated[list[str], typer.Argument(help="Training sources: files, folders or globs, each one source.")],
    ood: Annotated[list[str] | None, typer.Option(help="A source that is only evaluated. Can be repeated.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or path of a tokenizer, instead of training one on the sources.")
    ] = None,
) -> None:
    """
    Write a configuration for your own files: hf-nexus init data/*.jsonl --ood law.parquet > mine.yaml

    The model and the number of steps are chosen for some minutes on this machine. Progress is printed to stderr.
    """
    print("Looking at the files ...", file=sys.stderr, flush=True)
    from ..pretrain.starter import starter_yaml

    if sys.platform == "win32":  # its shells leave globs to the program, and hide which were in quotes
        files = [file for path in files for file in _as_of_a_shell(path)]
    content = starter_yaml(files, ood or (), tokenizer)
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():  # a file is read as UTF-8
        sys.stdout.reconfigure(encoding="utf-8", errors=sys.stdout.errors)
    print(content, end="")


def _as_of_a_shell(path: str) -> list[str]:
    """What the shells of other systems pass on for an argument."""
    return [path] if os.path.exists(path) else sorted(glob(path)) or [path]
