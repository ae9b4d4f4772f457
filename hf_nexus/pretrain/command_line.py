"""A command line and its YAML file, read in less than a second, without torch."""

import os
from dataclasses import dataclass
from typing import Any

from ..files import hide_token
from ..mixture.config import MixtureConfig
from ..mixture.data_files import find_files, is_remote, means_files
from .flags import RUN, read_flags
from .kinds import check_sections, known_kinds
from .sections import DEFAULT_CONFIG, complete_config, load_config, naming

__all__ = ["CommandLine", "from_sections", "read_command_line"]


@dataclass(frozen=True)
class CommandLine:
    """The YAML file of a run, and the flags on top of it."""

    name: str  # of the configuration, or the path of its file
    sections: dict[str, dict[str, Any]]  # of the file
    flags: dict[str, dict[str, Any]]  # by section
    mixture: MixtureConfig  # the section `data` with its flags
    dry_run: bool  # the run is only planned


def read_command_line(argv: list[str]) -> CommandLine:
    """
    Read a command line, such as `["--config", "demo", "--max_steps", "20"]`, and the YAML file that `--config` names.

    What is known without torch is checked. A flag whose type is not known, as that of a newer package, is text.

    Raises:
        ValueError: an unknown key or flag, a value that is not allowed, or a missing data file, named in the message.
            With `--dry_run`, data files may be missing.
    """
    flags = read_flags(hide_token(argv), {"run": RUN, **known_kinds()})
    run = flags.pop("run")
    name = run.get("config", DEFAULT_CONFIG)
    return _with_flags(name, load_config(name), flags, run.get("dry_run", False))


def from_sections(name: str, content: dict[str, Any], dry_run: bool = False) -> CommandLine:
    """As [`read_command_line`], for the content of a YAML file without flags. Errors start with `name`."""
    return _with_flags(name, complete_config(name, content), {section: {} for section in known_kinds()}, dry_run)


def _with_flags(
    name: str, sections: dict[str, dict[str, Any]], flags: dict[str, dict[str, Any]], dry_run: bool
) -> CommandLine:
    kinds = known_kinds()
    check_sections(sections, kinds, {**sections.get("model", {}), **flags["model"]}, f"{name}: ")
    with naming(name, "data.", flags["data"]):
        mixture = MixtureConfig(**{**sections["data"], **flags["data"]})
    for source_name, source in mixture.sources.items() if not dry_run else ():
        path = source.path
        there = not means_files(path) or is_remote(path) or os.path.exists(path)
        if not there and not any(map(os.path.exists, find_files(path)[1])):
            raise ValueError(f"{name}: data.sources.{source_name}.path: no file matches {path!r} in {os.getcwd()!r}.")
    return CommandLine(name, sections, flags, mixture, dry_run)
