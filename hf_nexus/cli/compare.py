"""The comparison as a command: what it is told on a command line, and how it ends."""

import argparse
from typing import NoReturn

from filelock import FileLock, Timeout

from ..compare.comparison import Comparison, compare
from ..compare.config import ComparisonConfig
from ..files import nearest, one_line_errors

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(allow_abbrev=False, description="Compare arms over seeds, and report what the numbers support.")
    parser.add_argument("config", nargs="?", default="compare", help="name of a comparison, or path of its YAML")
    parser.add_argument("--output_dir", help="in place of the configuration's")
    options, rest = parser.parse_known_args(argv)
    if rest:
        word = next((argument for argument in rest if argument.startswith("-")), rest[0]).split("=")[0]
        raise ValueError(
            f"Unknown argument {word!r}.{nearest(word, ['--output_dir'])} Allowed is --output_dir; all else is in the "
            "comparison's YAML."
        )
    return options


def main(argv: list[str] | None = None, *, debug: bool = False) -> None:
    """
    Run the comparison that a command line names, `compare` by default, and print what came of it.

    Args:
        argv (`list[str]`, *optional*):
            Name of a comparison or path of its YAML, and `--output_dir DIR`; those of the process by default.
        debug (`bool`, *optional*, defaults to `False`):
            Keep the traceback of a mistake in the configuration.

    Example:
        >>> from hf_nexus.cli.compare import main
        >>> main(["compare", "--output_dir", "runs/compare"])  # doctest: +SKIP
    """
    from rich.console import Console

    with one_line_errors(debug=debug):
        options = _parse(argv)
        config = ComparisonConfig.load(options.config, output_dir=options.output_dir)
        comparison = Comparison(config, Console())
        comparison.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(comparison.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"another comparison is running in {comparison.folder}.") from error
        with lock:
            comparison.check()
            compare(comparison)
    if comparison.failed:
        raise SystemExit(f"{len(comparison.failed)} of the runs failed; the same command runs what is missing.")
