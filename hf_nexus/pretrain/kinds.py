"""The fields of the sections of a configuration and their types, as far as they are known without torch."""

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from ..schema import kind_of
from .flags import described, packaged_schema
from .sections import check_values

__all__ = ["check_sections", "known_kinds"]

_LLAMA = ("configuration_utils.py", "models/llama/configuration_llama.py")


@cache
def known_kinds() -> dict[str, dict[str, Any]]:
    """
    The types of the fields of each section. The fields of other packages are those of the JSON schema, and those in
    the source code of what is installed, whose types are not known.
    """
    # A newer version may have more values of an enumeration.
    exact = Version(version("transformers")) <= Version(packaged_schema()["$comment"].partition(" ")[2])
    kinds: dict[str, dict[str, Any]] = {
        section: {name: kind_of(field, exact) for name, field in described(section).items()}
        for section in ("model", "data", "training", "hardware")
    }
    kinds["training"] = dict.fromkeys(_declared("training_args.py"), Any) | kinds["training"]
    return kinds


def check_sections(
    sections: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    where: str = "",
) -> None:
    """
    Check the keys and values of sections, which may hold some of their fields. `model` has all fields of the model:
    they decide which keys the section `model` may have.

    Raises:
        ValueError: an unknown key or a value of the wrong type. The message starts with `where`, such as the file.
    """
    llama = model.get("path") is None and model.get("model_type") in (None, "llama")
    more = [name for file in _LLAMA for name in _declared(file)] if llama else sections.get("model", {})
    kinds = {**kinds, "model": {**dict.fromkeys(more, Any), **kinds["model"]}}  # another model may have any field
    for section, values in sections.items():
        check_values(section, values, kinds, where)


@cache
def _declared(file: str) -> list[str]:
    """The fields of the classes in a file of transformers, which is not imported."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations is not None
    text = Path(package.submodule_search_locations[0], file).read_text(encoding="utf-8")
    return re.findall(r"^    (\w+): ", text, re.MULTILINE)
