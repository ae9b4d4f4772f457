"""A command line and its YAML file, read in less than a second, without torch."""

import importlib.util
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from ..files import hide_token
from ..mixture.config import MixtureConfig
from ..mixture.data_files import find_files, is_remote, means_files
from ..schema import kind_of
from .flags import RUN, described, packaged_schema, read_flags
from .sections import DEFAULT_CONFIG, check_values, load_config, naming

__all__ = ["CommandLine", "read_command_line"]

_LLAMA = ("configuration_utils.py", "models/llama/configuration_llama.py")


@dataclass(frozen=True)
class CommandLine:
    """The YAML file of a run, and the flags on top of it."""

    config: str  # name or path of the file
    sections: dict[str, dict[str, Any]]  # of the file
    flags: dict[str, dict[str, Any]]  # by section
    mixture: MixtureConfig  # the section `data` with its flags
    dry_run: bool  # the run is only planned


def read_command_line(argv: list[str]) -> CommandLine:
    """
    Read a command line, such as `["--config", "demo", "--max_steps", "20"]`, and the YAML file that `--config` names.

    What is known without torch is checked. The fields of other packages are those of the JSON schema, and those in
    the source code of what is installed: a value of theirs is not checked, and a flag is text.

    Raises:
        ValueError: an unknown key or flag, a value that is not allowed, or a missing data file, named in the message.
            With `--dry_run`, data files may be missing.
    """
    # A newer version may have more values of an enumeration.
    exact = Version(version("transformers")) <= Version(packaged_schema()["$comment"].partition(" ")[2])
    kinds: dict[str, dict[str, Any]] = {
        section: {name: kind_of(field, exact) for name, field in described(section).items()}
        for section in ("model", "data", "training", "hardware")
    }
    kinds["training"] = dict.fromkeys(_declared("training_args.py"), Any) | kinds["training"]
    flags = read_flags(hide_token(argv), {"run": RUN, **kinds})
    name, dry_run = flags["run"].get("config", DEFAULT_CONFIG), flags["run"].get("dry_run", False)
    config = load_config(name)
    model, checked = {**config.get("model", {}), **flags["model"]}, dict(config)
    if model.get("path") is None and model.get("model_type") in (None, "llama"):
        kinds["model"] = dict.fromkeys((n for file in _LLAMA for n in _declared(file)), Any) | kinds["model"]
    else:  # its configuration class may have any other field
        checked["model"] = {key: value for key, value in config.get("model", {}).items() if key in kinds["model"]}
    for section, values in checked.items():
        check_values(section, values, kinds, f"{name}: ")
    with naming(name, "data.", flags["data"]):
        mixture = MixtureConfig(**{**config["data"], **flags["data"]})
    for source, field in mixture.sources.items() if not dry_run else ():
        path = field.path
        if means_files(path) and not (is_remote(path) or os.path.exists(path) or find_files(path)[1]):
            raise ValueError(f"{name}: data.sources.{source}.path: no file matches {path!r} in {os.getcwd()!r}.")
    return CommandLine(name, config, flags, mixture, dry_run)


def _declared(file: str) -> list[str]:
    """The fields of the classes in a file of transformers, which is not imported."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations is not None
    text = Path(package.submodule_search_locations[0], file).read_text(encoding="utf-8")
    return re.findall(r"^    (\w+): ", text, re.MULTILINE)
