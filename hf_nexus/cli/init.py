"""The command `hf-nexus init`."""

import sys
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

    print(starter_yaml(files, ood or (), tokenizer), end="")
