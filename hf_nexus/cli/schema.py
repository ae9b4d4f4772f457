"""`hf-nexus schema`: a JSON schema of every YAML file that the package reads."""

from importlib.metadata import version
from typing import Any

from ..compare.config import RESERVED, ComparisonConfig
from ..mixture.config import MixtureConfig
from ..pretrain.fields import SECTIONS, HardwareArguments, PretrainConfig
from ..schema import json_schema
from ..strict import field_types
from ..trainer.config import NexusConfigMixin

__all__ = ["nexus_schema"]


def nexus_schema() -> dict[str, Any]:
    """The JSON schema (draft 7) of all configurations: comparisons have `arms`, and mixtures have `sources`."""
    definitions: dict[str, Any] = {}
    sections = {name: json_schema(cls, definitions) for name, cls in SECTIONS.items()}
    for cls in (HardwareArguments, NexusConfigMixin):  # for the help of the commands
        json_schema(cls, definitions)
    model = definitions["ModelArguments"]
    del model["additionalProperties"]  # the fields of the configuration class, if it is not that of the defaults
    model["if"] = {"not": {"anyOf": [{"required": ["model_type"]}, {"required": ["path"]}]}}
    model["then"] = {"propertyNames": {"enum": list(model["properties"])}}
    definitions["Pretraining"] = {
        "description": "Configuration of a pretraining run.",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
        "required": ["data"],
    }
    comparison = json_schema(ComparisonConfig, definitions)
    _describe_comparison(definitions)
    mixture = {"$ref": f"#/definitions/{MixtureConfig.__name__}"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": f"transformers {version('transformers')}",
        "title": "hf-nexus",
        "type": "object",
        "if": {"required": ["arms"]},
        "then": comparison,
        "else": {"if": {"required": ["sources"]}, "then": mixture, "else": {"$ref": "#/definitions/Pretraining"}},
        "definitions": definitions,
    }


def _describe_comparison(definitions: dict[str, Any]) -> None:
    """Describe the sections, which change some fields of the base, and arms and grids, which hold training fields."""
    found = definitions[ComparisonConfig.__name__]["properties"]
    sections = {name: _some_fields(cls) for name, cls in SECTIONS.items()}
    for name in sections:
        found[name] |= sections[name]
    grid = {
        "type": "object",
        "propertyNames": {"enum": list(sections["training"]["properties"])},
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    definitions["Tuning"]["properties"]["grid"] |= grid
    arm = _some_fields(PretrainConfig, tuning=grid) | {"type": ["object", "null"]}
    found["arms"] |= {"minProperties": 2, "additionalProperties": arm}


def _some_fields(cls: type, **more: Any) -> dict[str, Any]:
    names = [name for name in field_types(cls) if name not in RESERVED]
    fields = {name: {"$ref": f"#/definitions/{cls.__name__}/properties/{name}"} for name in names}
    return {"type": "object", "properties": fields | more, "additionalProperties": False}
