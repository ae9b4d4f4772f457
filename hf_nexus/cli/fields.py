"""The fields of a configuration as options of a command, for its help and its completion."""

import inspect
from typing import Annotated, Any

import typer

from ..pretrain.flags import HARDWARE, NO_FLAGS, described_fields

__all__ = ["field_options"]


def field_options(hardware: bool) -> list[Any]:
    """Options for all fields of a configuration, in panels by section, and for the `hardware` to plan for."""
    parameters = []
    for section, fields in described_fields().items():
        for name, field in sorted(fields.items(), key=lambda pair: pair[1].get("group") != "nexus"):  # nexus first
            if name in NO_FLAGS or (section == HARDWARE and not hardware):
                continue
            text = field.get("description", "").partition(". ")[0].rstrip(".")
            text += f" (default: {field['default']})" if "default" in field else ""
            panel = field.get("group", section)
            option = typer.Option(f"--{name}", help=text, show_default=False, metavar="", rich_help_panel=panel)
            kind = Annotated[str | None, option]
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))

    def command(**fields: Any) -> None: ...

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [option for option in typer.main.get_command(app).params if option.name != "help"]
