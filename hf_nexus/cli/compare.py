"""The command `hf-nexus compare`."""

from ..compare.comparison import Comparison
from ..compare.config import ComparisonConfig
from ..lock import locked

__all__ = ["compare"]


def compare(name_or_path: str = "compare", output_dir: str | None = None) -> None:
    """
    Run a comparison and print its results.

    Args:
        name_or_path (`str`, *optional*, defaults to `"compare"`):
            Name of a comparison of the package, or path of a YAML file.
        output_dir (`str`, *optional*):
            Replaces the file's `output_dir`.

    Raises:
        ValueError: an error in the configuration, or another comparison is running in the same folder.
        SystemExit: runs failed.

    Example:
        >>> from hf_nexus.cli.compare import compare
        >>> compare("compare", output_dir="runs/compare")  # doctest: +SKIP
    """
    from rich.console import Console

    comparison = Comparison(ComparisonConfig.load(name_or_path, output_dir), Console())
    with locked(comparison.folder):
        comparison.check()
        comparison.run()
    if comparison.failed:
        raise SystemExit(f"{len(comparison.failed)} runs failed; the same command runs only what is missing.")
