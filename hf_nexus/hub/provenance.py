"""Where a model, its code and its data come from, as far as that may be published."""

import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from transformers.utils import is_peft_available

from ..mixture.config import BUILTIN_PREFIX
from .check import is_repo_id

__all__ = ["find_commit", "find_origin", "hub_id", "public_path"]


def find_origin(model: Any) -> dict[str, Any]:
    """The base model and the adapter, of a model that was loaded; a new one has neither."""
    base = model.config._name_or_path or None
    found: dict[str, Any] = {}
    if is_peft_available():
        from peft import PeftModel, PeftType

        if isinstance(model, PeftModel):
            adapter = model.peft_config[model.active_adapter]
            base, kind = adapter.base_model_name_or_path or base, str(PeftType(adapter.peft_type).value)
            found = {"adapter": "LoRA" if kind == "LORA" else kind, "tags": [kind.lower()]}
    # A folder, even if a repository could have its name, is marked as one.
    return found | {"base_model": f"./{Path(base).name}" if base and Path(base).exists() else base}


@cache
def find_commit() -> str | None:
    """The commit of this library's checkout, or what pip installed it from; `None` for a release."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=, changed", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of someone else's
            return None
    try:
        origin = distribution("hf-nexus").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None


def hub_id(path: str | None) -> str | None:
    """The path itself if it can be the id of a dataset of the Hub."""
    if path is None or path.startswith(BUILTIN_PREFIX) or Path(path).exists():
        return None
    return path if "/" in path and is_repo_id(path) else None  # the name of a file alone passes for an id, too


def public_path(path: str) -> str:
    """Of a local path the last part: where it lay on the machine that trained is nobody's business."""
    return path if path.startswith(BUILTIN_PREFIX) or hub_id(path) else Path(path).name
