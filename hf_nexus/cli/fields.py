"""The fields of a configuration as options of a command, for its help and its completion."""

import inspect
from typing import Annotated, Any

import typer

from ..pretrain.flags import NO_FLAGS, described

__all__ = ["field_options"]

# The panels of training fields, by the first word of their names. The others are in the panel `training`.
_PANELS = {"hub": "hub", "push": "hub", "eval": "evaluation", "save": "saving", "dataloader": "data loader"}
_PANELS |= dict.fromkeys(("log", "logging", "report", "run", "project", "trackio", "disable"), "logging")
_PANELS |= dict.fromkeys(("optim", "adam", "weight", "lr", "learning", "warmup"), "optimization")
_PANELS |= dict.fromkeys(("ddp", "fsdp", "deepspeed", "accelerator", "local"), "distributed")


def field_options(hardware: bool) -> list[Any]:
    """Options for all fields of a configuration, in panels by section, and for the `hardware` to plan for."""
    parameters = []
    for section in ("model", "data", "nexus", "training", *(["hardware"] if hardware else [])):
        for name, field in described(section).items():
            if name in NO_FLAGS or (section == "training" and name in described("nexus")):
                continue
            text = field.get("description", "").partition(". ")[0].rstrip(".")
            text += f" (default: {field['default']})" if "default" in field else ""
            panel = _PANELS.get(name.partition("_")[0], section) if section == "training" else section
            option = typer.Option(f"--{name}", help=text, show_default=False, metavar="", rich_help_panel=panel)
            kind = Annotated[str | None, option]
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))

    def command(**fields: Any) -> None: ...

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [option for option in typer.main.get_command(app).params if option.name != "help"]
