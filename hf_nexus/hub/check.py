"""The Hub's rules for the metadata of a card, checked before the upload."""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..files import nearest

__all__ = ["check_card", "is_repo_id", "split_card"]

# Identifiers from the page "Licenses" of the Hub's documentation.
_LICENSE_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
"""
LICENSES = frozenset(_LICENSE_IDS.split())


def check_card(card: ModelCard | str) -> None:
    """
    Check a card without a network: metadata, types, licence, ids, model-index, and that it has no token.

    Raises:
        ValueError: the card is not valid. The message lists all problems.
    """
    text = str(card)
    metadata, _ = split_card(text)
    problems = [*_field_problems(metadata), *_license_problems(metadata), *_index_problems(metadata)]
    if re.search(r"\bhf_[A-Za-z0-9]{30,}", text):
        problems.append("the text contains an access token (hf_...): remove it and revoke the token")
    if problems:
        raise ValueError("The model card is not valid:\n- " + "\n- ".join(problems))


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a README into its metadata, `{}` if it has none, and its text. Invalid metadata raise `ValueError`."""
    match = re.match(r"\s*---[ \t]*\n(.*?)^---[ \t]*$\n?", text, flags=re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(match[1])):  # a few can expand to gigabytes
            raise ValueError("aliases (*name) are not allowed")
        metadata = yaml.safe_load(match[1]) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"The metadata of the card are not YAML, correct or delete them: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"The metadata of the card are a {type(metadata).__name__}, not a mapping. Write `key: value` lines."
        )
    return metadata, text[match.end() :]


def is_repo_id(name: str) -> bool:
    """Whether a name is valid for a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _field_problems(metadata: dict[str, Any]) -> Iterator[str]:
    """Problems of types, ids and codes. In YAML, an unquoted `no` is a bool and not a language."""
    for key in ("language", "datasets", "base_model", "tags", "metrics"):
        for value in raw if isinstance(raw := metadata.get(key, []), list) else [raw]:
            if not isinstance(value, str) or not value:
                yield f"`{key}` must be a string or a list of strings, got {value!r}: quote it"
            elif key == "language" and not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", value):
                yield f"`language` must be ISO 639 codes (`en`), `code` or `multilingual`, got {value!r}"
            elif key in ("datasets", "base_model") and (value.startswith("builtin/") or not is_repo_id(value)):
                yield f"`{key}` must be ids of the Hub, got {value!r}: leave out what is not on the Hub"
            elif key == "tags" and value.startswith("base_model:") and not is_repo_id(value.rpartition(":")[2]):
                yield f"`tags` must name base models by ids of the Hub, got {value!r}: leave it out"
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(metadata.get(key, ""), str):
            yield f"`{key}` must be a string, got {metadata[key]!r}"


def _license_problems(metadata: dict[str, Any]) -> Iterator[str]:
    name = metadata.get("license")
    if name is None:
        return
    if not isinstance(name, str) or name not in LICENSES:
        hint = nearest(str(name).lower(), LICENSES) or " Use `other` with a `license_name`."
        yield f"`license` must be one of the Hub's identifiers, got {name!r}.{hint}"
    elif name == "other" and not metadata.get("license_name"):
        yield "`license: other` needs a `license_name` (and a `license_link`)"


def _index_problems(metadata: dict[str, Any]) -> Iterator[str]:
    """Problems of `model-index`. The Hub rejects a card with NaN, which JSON does not have."""
    models = metadata.get("model-index", [])
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        yield f"`model-index` must be a list of mappings, got {models!r}"
        return
    for model in models:
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            yield f"`model-index` entries need a `name` and a list of `results`, got {model!r}"
            continue
        for result in model["results"]:
            try:
                needed = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
                needed += [metric["type"] for metric in result["metrics"]]
                values = [metric["value"] for metric in result["metrics"]]
            except (KeyError, TypeError) as error:
                yield f"a result of `model-index` lacks {error} (it needs task, dataset and metrics): {result!r}"
                continue
            if not values or not all(isinstance(text, str) and text for text in needed):
                yield f"a result of `model-index` needs a metric, and strings as types and names: {result!r}"
            if bad := [
                v for v in values if isinstance(v, bool | None) or (isinstance(v, float) and not math.isfinite(v))
            ]:
                yield f"metric values in `model-index` must be finite numbers, got {bad}: {result['dataset']!r}"
