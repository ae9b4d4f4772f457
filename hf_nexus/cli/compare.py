"""The command `hf-nexus compare`."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import require_folder
from ..lock import locked

if TYPE_CHECKING:
    from ..compare.comparison import Comparison

__all__ = ["compare"]


def compare(
    config: Annotated[str, typer.Argument(help="Name of a comparison (compare), or a YAML file.")] = "compare",
    output_dir: Annotated[
        str | None,
        typer.Option("--output_dir", help="Folder of all results, instead of the file's. Finished runs are skipped."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(help="Train only this run (nexus/seed-2). Other machines can train others at the same time."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write the report on the finished runs.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing. Print runs, tokens, device hours and the seeds to use.")
    ] = False,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Run only the primary arm and the baseline on five other seeds.")
    ] = False,
    difference: Annotated[
        list[float] | None,
        typer.Option(
            min=1e-9, help="With --plan or --pilot: print how many seeds would find this difference. Can be repeated."
        ),
    ] = None,
) -> None:
    """Compare arms over seeds and write a report: hf-nexus compare mine.yaml --output_dir runs/mine"""
    from ..compare.config import ComparisonConfig

    _check_modes({"--plan": plan, "--report": report, "--run": run is not None, "--pilot": pilot and plan})
    if difference and not (plan or pilot):
        raise ValueError("--difference is only printed with --plan or --pilot. Add one of them.")
    whole = ComparisonConfig.load(config, output_dir)  # before heavy packages are imported

    from ..compare.comparison import Comparison
    from ..compare.plan import pilot_of, print_plan
    from ..terminal import new_console

    console, differences = new_console(), difference or ()
    command = shlex.join(["hf-nexus", "compare", config, *(["--output_dir", output_dir] if output_dir else [])])
    if plan:
        print_plan(whole, command, differences, console)
        return
    comparison = Comparison(pilot_of(whole) if pilot else whole, console)
    if report:
        comparison.report()
    else:
        _train(comparison, run)
    if pilot:
        print_plan(whole, command, differences, console)
    if comparison.failed:
        raise SystemExit(f"{len(comparison.failed)} runs failed; the same command runs only what is missing.")


def _train(comparison: "Comparison", run: str | None) -> None:
    """Make one run, or all that are missing."""
    if run is not None:  # other machines may make others: the run locks its own folder
        require_folder(comparison.folder)
        comparison.check()
        comparison.run_one(run)
    else:
        with locked(comparison.folder):
            comparison.check()
            comparison.run()


def _check_modes(modes: dict[str, bool]) -> None:
    if len(given := [flag for flag, is_given in modes.items() if is_given]) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other. Give one of them.")
