"""Facts that a card states: machine, versions and commit, and what model and data are and come from."""

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_peft_available

from .. import __version__
from ..mixture.config import BUILTIN_PREFIX
from ..tensors import accelerator_or_cpu
from .check import is_repo_id
from .run_summary import LANGUAGE_MODEL

__all__ = [
    "describe_hardware",
    "find_commit",
    "find_origin",
    "find_pipeline_tag",
    "hub_id",
    "installed_versions",
    "public_model",
    "public_path",
]

_PACKAGES = ("transformers", "torch", "accelerate", "datasets", "tokenizers", "huggingface-hub")
_OPTIONAL = ("trl", "peft", "evaluate", "lm-eval", "bitsandbytes")
# Tags of the Hub for which transformers has an Auto class, but no pipeline.
_WITHOUT_PIPELINE = {
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "visual-question-answering": "AutoModelForVisualQuestionAnswering",
    "image-segmentation": "AutoModelForUniversalSegmentation",
}


# ---- Machine and code ----


def installed_versions(optional: bool = False) -> dict[str, str]:
    """Versions of Python and of the installed packages that runs need, or that some runs need (`optional`)."""
    found = {"python": platform.python_version(), "hf-nexus": __version__}
    for name in (*_PACKAGES, *(_OPTIONAL if optional else ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_hardware(device: str | None = None, processes: int | None = None) -> str:
    """
    Number and name of the devices, of a type such as `"cuda"`, on which the processes of a run train; by default, of
    those of this machine.
    """
    kind = device or accelerator_or_cpu().type
    if kind != "cpu":
        get_name = getattr(torch.get_device_module(kind), "get_device_name", None)  # mps has none
        return f"{processes or torch.accelerator.device_count()} x {get_name() if get_name else kind}"
    threads, more = torch.get_num_threads(), f", {processes} processes" if processes and processes > 1 else ""
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}{more}"


@cache
def find_commit() -> str | None:
    """Commit of this library's checkout, or the commit that pip installed; `None` for a release."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=, changed", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # git is missing, or does not trust the owner of the checkout
            return None
    try:
        origin = distribution("hf-nexus").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None


# ---- Model ----


def find_origin(model: Any) -> dict[str, Any]:
    """`base_model`, and `adapter` and `tags` of an adapter: fields of [`RunSummary`] that follow from a model."""
    base = model.config._name_or_path or None
    found: dict[str, Any] = {}
    if is_peft_available():
        from peft import PeftModel, PeftType

        if isinstance(model, PeftModel):
            adapter = model.peft_config[model.active_adapter]
            base, kind = adapter.base_model_name_or_path or base, str(PeftType(adapter.peft_type).value)
            found = {"adapter": "LoRA" if kind == "LORA" else kind, "tags": [kind.lower()]}
    return found | {"base_model": base and public_model(base)}


def public_model(model: str) -> str:
    """
    The id of a model on the Hub, or the name of a local folder. Before it is "./", or it could be taken for an id.
    """
    return f"./{Path(model).name}" if Path(model).exists() else model


def find_pipeline_tag(model: Any) -> dict[str, str | None]:
    """
    Find the Hub's name for the task of a model, and the Auto class that loads it, in the mappings of transformers.

    Returns `pipeline_tag` and `auto_class` of [`RunSummary`] for an unwrapped model or an adapter of peft. Both are
    `None` if transformers does not know the class of the model.
    """
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            model = model.get_base_model()
    for name in (parent.__name__ for parent in type(model).__mro__):
        found = [row for row in _pipelines() if name in row[2]]
        # No mapping lists the classes of remote code, but their names end like those of other models.
        found += [row for row in _pipelines() if name.endswith(row[1].removeprefix("AutoModel"))]
        if found:
            return {"pipeline_tag": found[0][0], "auto_class": found[0][1]}
    return {"pipeline_tag": None, "auto_class": None}


@cache
def _pipelines() -> list[tuple[str, str, frozenset[str]]]:
    """
    Pipeline tags, each with an Auto class and the names of the model classes that it loads.

    Some model classes are listed several times. Language models come first, then the Auto classes that load the fewest
    model classes, as these are the most specific.
    """
    from transformers.models.auto import modeling_auto
    from transformers.pipelines import SUPPORTED_TASKS

    pipelines: dict[str, Any] = SUPPORTED_TASKS
    pairs = [(tag, auto.__name__) for tag, pipeline in pipelines.items() for auto in pipeline["pt"]]
    found = []
    for tag, auto_class in (*pairs, *_WITHOUT_PIPELINE.items()):
        if auto_class != "AutoModel":  # loads models without a head
            listed = getattr(modeling_auto, auto_class)._model_mapping._model_mapping.values()
            names = frozenset(name for entry in listed for name in ([entry] if isinstance(entry, str) else entry))
            found.append((tag, auto_class, names))
    return sorted(found, key=lambda row: (row[1] != LANGUAGE_MODEL, len(row[2])))


# ---- Data ----


def hub_id(path: str | None) -> str | None:
    """The path of a source if it is the id of a dataset on the Hub, else `None`."""
    if path is None or path.startswith(BUILTIN_PREFIX) or Path(path).exists():
        return None
    return path if "/" in path and is_repo_id(path) else None  # a bare file name is a valid id, too


def public_path(path: str) -> str:
    """The path of a source without the folders of this machine, and without what follows an address."""
    return path if path.startswith(BUILTIN_PREFIX) or hub_id(path) else Path(path.partition("?")[0]).name
