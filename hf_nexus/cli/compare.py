"""The command `hf-nexus compare`."""

from collections.abc import Sequence

from ..compare.comparison import Comparison
from ..compare.config import ComparisonConfig
from ..compare.plan import pilot_of, print_plan
from ..files import require_folder
from ..lock import locked

__all__ = ["compare"]


def compare(
    name_or_path: str = "compare",
    output_dir: str | None = None,
    *,
    run: str | None = None,
    report: bool = False,
    plan: bool = False,
    pilot: bool = False,
    differences: Sequence[float] = (),
) -> None:
    """
    Run a comparison and print its results, or print its plan.

    Args:
        name_or_path (`str`, *optional*, defaults to `"compare"`):
            Name of a comparison of the package, or path of a YAML file.
        output_dir (`str`, *optional*):
            Replaces the file's `output_dir`.
        run (`str`, *optional*):
            The only run to make, such as `"nexus/seed-2"`.
        report (`bool`, *optional*, defaults to `False`):
            Only write the report on the finished runs.
        plan (`bool`, *optional*, defaults to `False`):
            Train nothing. Print runs, tokens, device hours, and the seeds that each of `differences` needs.
        pilot (`bool`, *optional*, defaults to `False`):
            Run only the primary arm and the baseline on other seeds, in a subfolder, for the plan.
        differences (`Sequence[float]`, *optional*):
            Sizes of the difference in the primary metric to plan for.

    Raises:
        ValueError: an error in the configuration, or another comparison is running in the same folder.
        SystemExit: runs failed.

    Example:
        >>> from hf_nexus.cli.compare import compare
        >>> compare("compare", output_dir="runs/compare")  # doctest: +SKIP
    """
    from rich.console import Console

    config = ComparisonConfig.load(name_or_path, output_dir)
    command = f"hf-nexus compare {name_or_path}" + (f" --output_dir {output_dir}" if output_dir else "")
    if plan:
        print_plan(config, command, differences, Console())
        return
    comparison = Comparison(pilot_of(config) if pilot else config, Console())
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
    if pilot:
        print_plan(config, command, differences, Console())
    if comparison.failed:
        raise SystemExit(f"{len(comparison.failed)} runs failed; the same command runs only what is missing.")
