"""The command `hf-nexus compare`."""

from ..compare.comparison import Comparison
from ..compare.config import ComparisonConfig
from ..files import require_folder
from ..lock import locked

__all__ = ["compare"]


def compare(
    name_or_path: str = "compare", output_dir: str | None = None, run: str | None = None, report: bool = False
) -> None:
    """
    Run a comparison and print its results.

    Args:
        name_or_path (`str`, *optional*, defaults to `"compare"`):
            Name of a comparison of the package, or path of a YAML file.
        output_dir (`str`, *optional*):
            Replaces the file's `output_dir`.
        run (`str`, *optional*):
            The only run to make, such as `"nexus/seed-2"`.
        report (`bool`, *optional*, defaults to `False`):
            Only write the report on the finished runs.

    Raises:
        ValueError: an error in the configuration, or another comparison is running in the same folder.
        SystemExit: runs failed.

    Example:
        >>> from hf_nexus.cli.compare import compare
        >>> compare("compare", output_dir="runs/compare")  # doctest: +SKIP
    """
    from rich.console import Console

    comparison = Comparison(ComparisonConfig.load(name_or_path, output_dir), Console())
    if report:
        comparison.report()
    elif run is not None:  # other machines may make others: the run locks its own folder
        require_folder(comparison.folder)
        comparison.check()
        comparison.run_one(run)
    else:
        with locked(comparison.folder):
            comparison.check()
            comparison.run()
    if comparison.failed:
        raise SystemExit(f"{len(comparison.failed)} runs failed; the same command runs only what is missing.")
