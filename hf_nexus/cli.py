"""`hf-nexus`: train, plan, push, env. Everything heavy is imported by the command that needs it."""

from typing import Annotated

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    help="Pretrain language models on a mixture of sources with the Nexus update.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
_Config = Annotated[str, typer.Argument(help="Name of a configuration (demo, 130m, 300m, 1b, 3b) or a YAML file.")]


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = debug


@app.command(context_settings=_PASS_ON)
def train(context: typer.Context, config: _Config) -> None:
    """Train. Any field follows the configuration: hf-nexus train demo --max_steps 20 --inner_lr 0.1"""
    from . import pretrain

    pretrain.main(["--config", config, *context.args], debug=context.obj)


@app.command(context_settings=_PASS_ON)
def plan(context: typer.Context, config: _Config) -> None:
    """Print parameters, tokens, steps, mixture and memory of a run, without network or GPU."""
    from . import pretrain

    pretrain.main(["--config", config, "--dry_run", *context.args], debug=context.obj)


@app.command()
def push(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The output_dir of a run.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to instead of the run's; created when missing.")
    ] = None,
) -> None:
    """Send to the Hub what a run could not; fails if something stays behind. Log in with `hf auth login` before."""
    from pathlib import Path

    from .hub.pushing import push_rest

    try:
        line, complete = push_rest(Path(folder), revision)
    except (ValueError, RuntimeError, OSError) as error:
        if context.obj:
            raise
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    print(line)
    raise SystemExit(not complete)


@app.command()
def env() -> None:
    """Print the versions of the packages and the devices found; put it into bug reports."""
    from rich.console import Console
    from rich.table import Table

    from .environment import describe_hardware, installed_versions

    table = Table(show_header=False, title="hf-nexus env")
    for name, version in {**installed_versions(), "hardware": describe_hardware()}.items():
        table.add_row(name, version)
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """
    Console entry point; `argv` is the process's own by default. What is wrong before the first step ends in one line
    and exit status 1, or with its traceback after `hf-nexus --debug`.

    Example:
        >>> from hf_nexus.cli import main
        >>> main(["plan", "130m"])  # doctest: +SKIP
    """
    app(args=argv, prog_name="hf-nexus")


if __name__ == "__main__":
    main()
