"""`hf-nexus`: the commands, each in a few lines. Everything heavy is imported by the command that needs it."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..files import one_line_errors

__all__ = ["app", "main"]

app = typer.Typer(
    help="Pretrain language models on a mixture of sources with the Nexus update.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
_Config = Annotated[str, typer.Argument(help="Name of a configuration (demo, 130m, 300m, 1b, 3b) or a YAML file.")]

# Shown below a command's help; an empty line in it begins a new line.
_DEBUG_HELP = "\n\n--debug, before or after the command, shows the traceback of an error."
_FIELDS_HELP = (
    "\n\nAny field of the configuration can follow as a flag: of the model (--hidden_size), of the data "
    "(--sequence_length), of TrainingArguments (--max_steps, --learning_rate, --output_dir, --resume_from_checkpoint) "
    "and of NexusConfig (--inner_lr, --inner_direction). The configurations show them with comments: "
    f"{Path(__file__).parents[1] / 'pretrain' / 'configs'}{_DEBUG_HELP}"
)
_TRAIN_HELP = (
    "For example: hf-nexus train mine.yaml --output_dir runs/mine --resume_from_checkpoint last" + _FIELDS_HELP
)
_PLAN_HELP = (
    "For example: hf-nexus plan 3b --devices 8 --sharding fsdp2 --mfu 0.35 --price_per_hour 3"
    "\n\nWhat to plan for: --devices, --sharding (ddp or fsdp2), --mfu (share of the peak that is reached), "
    "--peak_tflops (of a device), --link (GB/s that a device sends), --price_per_hour (of a device)." + _FIELDS_HELP
)


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
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = debug


def _one_line(context: typer.Context) -> AbstractContextManager[None]:
    """End with one line for an error that the user can mend, and with its traceback after `--debug`."""
    return one_line_errors(debug=bool(context.obj), errors=(ValueError, RuntimeError, OSError, ImportError))


def _words(context: typer.Context, config: str) -> list[str]:
    """
    What follows a command, without a `--debug` of ours, which is noted in `context.obj`.

    One with a value stays: it is the `debug` of TrainingArguments.
    """
    words = [config, *context.args]
    following = [*words[1:], "--"]
    kept = [
        word
        for position, (word, after) in enumerate(zip(words, following, strict=True))
        if word != "--debug" or (position > 0 and not after.startswith("--"))
    ]
    context.obj = context.obj or len(kept) < len(words)
    return kept


@app.command(context_settings=_PASS_ON, epilog=_TRAIN_HELP)
def train(context: typer.Context, config: _Config) -> None:
    """Train. Any field follows the configuration: hf-nexus train demo --max_steps 20 --inner_lr 0.1"""
    from ..pretrain import run as pretrain

    words = _words(context, config)
    pretrain.main(["--config", *words], debug=context.obj)


@app.command(context_settings=_PASS_ON, epilog=_PLAN_HELP)
def plan(context: typer.Context, config: _Config) -> None:
    """Print parameters, tokens, steps, mixture, memory and cost of a run, without network or GPU: hf-nexus plan 3b"""
    from ..pretrain import run as pretrain

    words = _words(context, config)
    pretrain.main(["--dry_run=True", "--config", *words], debug=context.obj)


@app.command()
def compare(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="Name of a comparison (compare) or a YAML file.")] = "compare",
    output_dir: Annotated[
        str | None,
        typer.Option("--output_dir", help="Folder of all results, instead of the file's. Finished runs are skipped."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare arms over seeds and write a report: hf-nexus compare mine.yaml --output_dir runs/mine"""
    from .compare import compare

    context.obj = context.obj or debug
    with _one_line(context):
        compare(config, output_dir)


@app.command()
def benchmark(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or a Hub id, of a model or a LoRA adapter.")],
    tasks: Annotated[
        str, typer.Option(help="paper, quick, gsm8k, ..., a task file or a folder of them; several by commas.")
    ] = "paper",
    output: Annotated[str | None, typer.Option(help="Where to write; the model's folder by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model of the Hub.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many examples of each task, or of each part.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto.")] = "8",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda:1, cpu, ...; the first accelerator by default.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a task is ended.")] = 4 * 3600,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let HumanEval and MBPP run what the model writes.")
    ] = False,
) -> None:
    """Score a model through lm-eval: hf-nexus benchmark runs/my-model --tasks quick. Fails if a task failed."""
    from .benchmark import benchmark as run

    with _one_line(context):
        outcomes = run(
            model,
            [name.strip() for name in tasks.split(",")],
            output=output,
            revision=revision,
            dtype=dtype,
            limit=limit,
            allow_code_execution=allow_code_execution,
            batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
            device=device,
            timeout=timeout,
        )
    raise SystemExit(any(outcome.error for outcome in outcomes))


@app.command()
def push(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The output_dir of a run.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to instead of the run's; created when missing.")
    ] = None,
) -> None:
    """Send to the Hub what a run could not: hf-nexus push runs/nexus-demo --revision rescued

    Fails if something stays behind. Log in with `hf auth login` before."""
    from ..hub.pushing import push_rest

    with _one_line(context):
        line, complete = push_rest(Path(folder), revision)
    print(line)
    raise SystemExit(not complete)


@app.command()
def closeness(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id, of a model or of a LoRA adapter.")],
    config: Annotated[
        str | None,
        typer.Option(help="Configuration or YAML file with the sources; by default the pretrain.yaml beside MODEL."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model of an adapter, if not the one it names.")] = None,
    batches: Annotated[int, typer.Option(help="Held-out batches of each source that gradients are taken on.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    projection: Annotated[
        int | None, typer.Option(help="Numbers to reduce each gradient to, for cheap cosines; 1024: error 0.03.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the projection.")] = 0,
    minima: Annotated[
        str | None, typer.Option(help="Models trained on from MODEL on one source each: code=DIR,math=DIR.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="JSON file to write; by default closeness.json in MODEL.")] = None,
) -> None:
    """Measure how close a model's sources are: hf-nexus closeness runs/nexus-demo --projection 1024"""
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from .closeness import REPORT_NAME, measure_closeness, print_closeness
    from .closeness_inputs import mixture_of, parse_minima

    disable_progress_bar()  # of reading weights
    with _one_line(context):
        found = measure_closeness(
            model,
            mixture_of(model, config),
            base=base,
            batches=batches,
            batch_size=batch_size,
            projection=projection,
            seed=seed,
            minima=parse_minima(minima),
        )
        path = found.save(output or (Path(model) / REPORT_NAME if Path(model).is_dir() else REPORT_NAME))
    print_closeness(found, Console())
    print(f"Saved in {path}")


@app.command()
def card(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The output_dir of a run.")],
) -> None:
    """Render a run's card anew, keeping what you wrote into it: hf-nexus card runs/nexus-demo"""
    from ..hub.card import save_card
    from ..hub.run_summary import SUMMARY_NAME, RunSummary

    with _one_line(context):
        if not Path(folder, SUMMARY_NAME).is_file():
            raise ValueError(f"{folder} holds no {SUMMARY_NAME}, which a finished run leaves in its output_dir.")
        path = save_card(RunSummary.load(folder), folder)
    print(f"Rendered {path}")


@app.command()
def schema() -> None:
    """Print the JSON schema of all configurations, for editors: hf-nexus schema > nexus.schema.json"""
    from ..files import finite_json
    from .schema import nexus_schema

    print(finite_json(nexus_schema(), indent=1))


@app.command()
def env() -> None:
    """Print the versions of the packages and the devices found; put them into bug reports: hf-nexus env"""
    from rich.console import Console
    from rich.table import Table

    from ..hub.environment import describe_hardware, installed_versions

    table = Table(show_header=False, title="hf-nexus env")
    for name, version in {**installed_versions(optional=True), "hardware": describe_hardware()}.items():
        table.add_row(name, version)
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """
    Console entry point; `argv` is the process's own by default. What is wrong before the first step ends in one line
    and exit status 1, or with its traceback after `hf-nexus --debug`; `--debug` may also follow train, plan and
    compare. A command that does not exist, or an option of the others, ends in exit status 2.

    Example:
        >>> from hf_nexus.cli.app import main
        >>> main(["plan", "130m"])  # doctest: +SKIP
    """
    app(args=argv, prog_name="hf-nexus")


if __name__ == "__main__":
    main()
