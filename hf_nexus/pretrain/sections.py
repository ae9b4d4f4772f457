"""The sections of a YAML file as plain data, and checks of their keys and values. Nothing here needs torch."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import Secret, nearest, shown
from ..strict import check, load_yaml, parse_yaml

__all__ = [
    "CONFIG_NAME",
    "DEFAULT_CONFIG",
    "SECTION_NAMES",
    "STARTER",
    "check_values",
    "complete_config",
    "load_config",
    "naming",
]

DEFAULT_CONFIG = "3b"
CONFIG_NAME = "pretrain.yaml"  # of the configuration that a run saves in its output folder
STARTER = resources.files(__package__).joinpath("starter.yaml").read_text(encoding="utf-8")
SECTION_NAMES = ("model", "data", "training")


def load_config(name_or_path: str) -> dict[str, dict[str, Any]]:
    """
    Read a configuration by name (`"demo"`) or path, and complete it.

    Raises:
        ValueError: no such configuration, an unknown section, or no sources. The message names the file.
    """
    return complete_config(name_or_path, load_yaml(name_or_path, "pretrain", "configuration"))


def complete_config(name_or_path: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    The fields of all sections, from the content of a YAML file. A mixture alone, with its fields at the top level,
    gets the training settings of `hf-nexus init`. If no steps are named, the run logs every 10, and evaluates 10 times
    if it has held-out rows. The Trainer would log every 500, and not evaluate.

    Raises:
        ValueError: an unknown section, or no sources. The message starts with the name of the file.
    """
    if "sources" in config:
        if section := next((name for name in SECTION_NAMES if name in config), None):
            raise ValueError(
                f"{name_or_path}: sources: next to the section {section!r}, fields of the mixture belong to the "
                "section 'data'. Move them there."
            )
        config = {"data": config, "training": _starter_training(name_or_path, config["sources"])}
    for section, values in config.items():
        if section not in SECTION_NAMES:
            raise ValueError(
                f"{name_or_path}: {section}: unknown section.{nearest(section, SECTION_NAMES)} "
                f"Allowed: {', '.join(SECTION_NAMES)}."
            )
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{name_or_path}: {section}: {shown(values)} is not allowed; it must be a mapping of fields."
            )
        if isinstance(token := values.get("hub_token"), str):
            config[section] = {**values, "hub_token": Secret(token)}
    sources = config.get("data", {}).get("sources")
    if not sources:
        raise ValueError(f"{name_or_path}: data.sources: missing. Name one source or more.")
    evaluation = {"eval_strategy": "steps", "eval_steps": 0.1} if _holds_out(sources) else {}
    return {**config, "training": {"logging_steps": 10, **evaluation, **config.get("training", {})}}


def _holds_out(sources: Any) -> bool:
    found = [s for s in sources.values() if isinstance(s, Mapping)] if isinstance(sources, Mapping) else []
    return any(s.get("eval_rows") or s.get("eval_split") or s.get("role") == "ood" for s in found)


def _starter_training(path: str, sources: Any) -> dict[str, Any]:
    """The section `training` for a mixture alone, in the file `path`: what the starter has for any data."""
    found: dict[str, Any] = parse_yaml(STARTER, "starter.yaml")["training"]
    found = {key: value for key, value in found.items() if not str(value).startswith("$")}
    if not _holds_out(sources):
        found |= {"eval_strategy": "no", "eval_on_start": False}
    return found | {"output_dir": f"runs/{Path(path).stem}", "learning_rate": 5e-3}


def check_values(
    section: str,
    values: Mapping[str, Any],
    kinds: Mapping[str, Mapping[str, Any]],
    where: str = "",
    suggested: Iterable[str] = (),
) -> dict[str, Any]:
    """
    The values of a section by the types of its fields (`kinds`, by section): a float in place of a whole number, for
    example. An error starts with `where`, such as the file. For an unknown key, also `suggested` ones are suggested.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    found = {}
    for key, value in values.items():
        if key not in kinds[section]:
            home = next((name for name in SECTION_NAMES if key in kinds[name]), None)
            known = [*kinds[section], *suggested]
            hint = f" It belongs to the section {home!r}." if home else nearest(key, known)
            raise ValueError(f"{where}{section}.{key}: unknown key.{hint}")
        found[key] = check(value, kinds[section][key], f"{where}{section}.{key}")
    return found


@contextmanager
def naming(config: str, section: str, flags: Mapping[str, Any]) -> Iterator[None]:
    """Name the configuration in an error, unless flags changed the section."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # the Trainer's checks vary
        raise ValueError(f"{section}{error}" if flags else f"{config}: {section}{error}") from error
