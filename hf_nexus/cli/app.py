"""The `hf-nexus` commands. Each one imports what it needs when it runs, which keeps `--help` fast."""

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .. import __version__
from ..errors import one_line_errors
from ..files import Secret, hide_token, printable
from ..strict import packaged
from ..terminal import new_console, new_table, quieten
from .benchmark import benchmark
from .closeness import closeness
from .compare import compare
from .fields import field_options
from .init import init

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train language models on a mixture of sources with the Nexus update.\n\n"
    "In a flag, - and _ mean the same. hf-nexus --install-completion completes commands and fields in your shell.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
)

# `train` and `plan` pass the fields of a configuration on, to `pretrain/command_line.py`.
_FIELDS_AS_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
_Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="Name of a configuration (demo, 130m, 300m, 1b, 3b), or a YAML file.",
        autocompletion=lambda: list(packaged("pretrain")),
    ),
]

# An empty line in a help text begins a new line.
_FIELDS_HELP = f"Commented configurations: {Path(__file__).parents[1] / 'pretrain' / 'configs'}"
_TRAIN_HELP = (
    f"For example: hf-nexus train mine.yaml --output_dir runs/mine --resume_from_checkpoint last\n\n{_FIELDS_HELP}"
)
_PLAN_HELP = f"For example: hf-nexus plan mine.yaml --devices 8 --sharding fsdp2 --mfu 0.35\n\n{_FIELDS_HELP}"


class _Completing(TyperCommand):
    """A command that completes flags with `-` and with `_` alike."""

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> Any:  # type: ignore[override]
        name = incomplete.removeprefix("--")
        texts = [incomplete]
        if name != incomplete:
            texts += [f"--{name.replace('-', '_')}", f"--{name.replace('_', '-')}"]
        return next(filter(None, (super(_Completing, self).shell_complete(ctx, text) for text in texts)), [])


# A command is a function with `_Command`, like `card`. What it computes is in the room of its topic, with a test
# there. A command also needs,
# - if it takes a configuration (`_Config`), as `plan` does: `pretrain/command_line.py` (`read_command_line`), which
#   does not import torch; if it needs its data or tokenizer: `pretrain/parsing.py` (`resolve`), `pretrain/run.py`
#   (`load_tokenizer`), `mixture/loading.py` (`load_mixture`); in a test `tests/support/tiny_config.py`
#   (`write_config`);
# - if it reads pending pushes: `hub/queue.py`;
# - if it prints a table, as `env` does: `terminal.py` (`new_table`, `format_bytes`); if it prints paths or text of
#   others: `files.py` (`printable`, `without_credentials`);
# - if it reads the checkpoint that a resume would take: `trainer/checkpoints.py` (`last_checkpoint`), in a test one
#   that `tests/conftest.py` (`make_trainer`) trains;
# - if it changes the folder of a run: `lock.py` (`locked`); if it writes a file there: `pretrain/run_file.py`
#   (`_FILES`);
# - if it has a module: a test of it in `tests/cli/`.
class _Command(_Completing):
    """
    A command whose errors end in one line, or after `--debug` in a traceback, and Ctrl-C in status 130. It imports
    heavy packages, as rich and torch, after what can be checked without them.
    """

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        _announce(ctx.info_name)
        with one_line_errors(debug=bool(ctx.obj), errors=(ValueError, RuntimeError, OSError, ImportError)):
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise SystemExit(130) from None


def _announce(*words: str | None) -> None:
    """Say at once what begins: heavy packages take seconds to load."""
    print(" ".join([f"hf-nexus {__version__}", *map(printable, words)]), file=sys.stderr, flush=True)


class _FieldsCommand(_Completing):
    """A command whose help and completion also have the fields of a configuration, by section."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        if (flag := ctx.params["config"]).startswith("-"):
            raise SystemExit(f"error: Name the configuration first: hf-nexus {self.name} CONFIG {printable(flag)} ...")
        if any(word.partition("=")[0] == "--config" for word in ctx.args):
            raise SystemExit("error: --config contradicts CONFIG, which comes first. Remove one of the two.")
        return super().invoke(ctx)

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        self.params += field_options(hardware=self.name == "plan")
        super().format_help(ctx, formatter)

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> Any:  # type: ignore[override]
        self.params += field_options(hardware=self.name == "plan")
        return super().shell_complete(ctx, incomplete)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hf-nexus {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. It may also be the last argument.")
    ] = False,
) -> None:
    context.obj = debug


@app.command(cls=_FieldsCommand, context_settings=_FIELDS_AS_FLAGS, epilog=_TRAIN_HELP)
def train(
    context: typer.Context,
    config: _Config,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Start this many processes on this machine, one per device.")
    ] = None,
    accelerate_config: Annotated[
        str | None,
        typer.Option("--accelerate_config", help="Start the processes that a file of accelerate describes."),
    ] = None,
) -> None:
    """Train a model: hf-nexus train demo --max_steps 20 --inner_lr 0.1"""
    if "RANK" not in os.environ:
        _announce("train", config)
    from ..pretrain.command_line import read_command_line

    argv, planned = [config, *context.args], [] if devices is None else ["--devices", str(devices)]
    with one_line_errors(debug=context.obj):
        command_line = read_command_line(["--config", *argv, *planned])
        if command_line.dry_run and accelerate_config is not None:
            raise ValueError("--accelerate_config: a plan does not read it. Pass --devices and --sharding instead.")
        if not command_line.dry_run and (devices is not None or accelerate_config is not None):
            from .launch import launch

            launch(command_line, argv, accelerate_config)
    from ..pretrain.run import run_command_line

    run_command_line(command_line, debug=context.obj)


@app.command(cls=_FieldsCommand, context_settings=_FIELDS_AS_FLAGS, epilog=_PLAN_HELP)
def plan(context: typer.Context, config: _Config) -> None:
    """Print parameters, tokens, steps, memory and cost of a run, without training or a GPU: hf-nexus plan 3b"""
    _announce("plan", config)
    from ..pretrain.command_line import read_command_line

    with one_line_errors(debug=context.obj):
        command_line = read_command_line(["--config", config, *context.args, "--dry_run"])
    from ..pretrain.run import run_command_line

    run_command_line(command_line, debug=context.obj)


app.command(cls=_Command)(compare)
app.command(cls=_Command)(benchmark)
app.command(cls=_Command)(closeness)
app.command(cls=_Command)(init)


@app.command(cls=_Command)
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The output_dir of a run.")],
    repo_id: Annotated[
        str | None, typer.Option("--repo", "--repo_id", help="Repository to push to, such as user/model.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to, instead of the run's. It is created if missing.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository, instead of the run's.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Send without asking, including what another user may have queued.")
    ] = False,
) -> None:
    """
    Upload a finished run, or what a run could not upload: hf-nexus push runs/nexus-demo --repo user/model

    The command sends what the run has queued. If that is nothing, --repo publishes the folder of any finished run,
    including one of a stock Trainer. Log in first with `hf auth login`. The exit status is 1 if the upload is not
    complete.
    """
    from ..hub.publisher import Publisher
    from ..hub.uploader import push_queue

    def approve(question: str) -> bool:
        print(question, file=sys.stderr)
        return yes or (sys.stdin.isatty() and typer.confirm("Send it?", err=True))

    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {folder}. Pass the output_dir of a run.")
    if repo_id is not None:
        Publisher(repo_id, folder, private=private, revision=revision).queue_run(approve)
    status, complete = push_queue(Path(folder), repo_id=repo_id, revision=revision, private=private, approve=approve)
    print(status.line(printable(folder)))
    raise SystemExit(not complete)


@app.command(cls=_Command)
def card(folder: Annotated[str, typer.Argument(metavar="DIR", help="The output_dir of a run.")]) -> None:
    """
    Render the card of a run again: hf-nexus card runs/nexus-demo

    Sections that you added are kept.
    """
    from ..hub.card import save_card
    from ..hub.run_summary import SUMMARY_NAME, RunSummary

    if not Path(folder, SUMMARY_NAME).is_file():
        raise ValueError(f"{folder} has no {SUMMARY_NAME}. Pass the output_dir of a finished run.")
    print(f"Rendered {save_card(RunSummary.load(folder), folder)}")


@app.command()
def schema() -> None:
    """Print the JSON schema of all configurations, for editors: hf-nexus schema > nexus.schema.json"""
    from ..files import finite_json
    from .schema import nexus_schema

    print(finite_json(nexus_schema(), indent=1))


@app.command()
def env() -> None:
    """Print the versions of the packages and the devices, for bug reports: hf-nexus env"""

    from ..hub.facts import describe_hardware, installed_versions

    table = new_table("hf-nexus env", "", "", texts=2)
    for name, version in {**installed_versions(optional=True), "hardware": describe_hardware()}.items():
        table.add_row(name, version)
    new_console().print(table)


def main(argv: list[str] | None = None) -> None:
    """
    Entry point of the console script. Errors that the user can fix end in one line and exit status 1, and misspelled
    commands and options in exit status 2. `--debug` as the first or last argument shows tracebacks.
    """
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook, which starts the command, may not be installed
    quieten()
    own_process = argv is None
    argv = hide_token(sys.argv[1:] if argv is None else argv)
    if argv[-1:] == ["--debug"]:
        argv = ["--debug", *argv[:-1]]
    try:
        app(args=argv, prog_name="hf-nexus")
    except SystemExit as stop:
        if stop.code == 130 and "train" not in argv[:2]:  # which says how to resume
            words = ["<hidden>" if isinstance(word, Secret) else word for word in argv]
            print(f"Interrupted. Go on with:\n{shlex.join(['hf-nexus', *words])}", file=sys.stderr, flush=True)
            if own_process:
                with suppress(OSError):
                    sys.stdout.flush()
                os._exit(130)  # to end the interpreter with all packages takes seconds
        raise
