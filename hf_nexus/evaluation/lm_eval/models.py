"""How lm-eval is told which model to load: a folder or a Hub id, whole or an adapter."""

import importlib.util
import json
from pathlib import Path
from typing import Any

__all__ = ["model_arguments"]


def model_arguments(model: str, revision: str | None = None, dtype: str = "auto") -> dict[str, Any]:
    """
    How lm-eval is to load a model.

    Args:
        model (`str`):
            A folder or a Hub id, of a whole model or of a LoRA adapter, whose base model is then loaded too.
        revision (`str`, *optional*):
            Branch, tag or commit; of a Hub id only.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"auto"` for that of the checkpoint, or `"bfloat16"`, `"float16"`, `"float32"`.

    Returns:
        `dict[str, Any]`: arguments of lm-eval's `hf` model.

    Raises:
        ValueError: the folder holds no model, or `revision` is given with a folder.
        ImportError: an adapter, and peft is missing.

    Example:
        >>> from hf_nexus.evaluation.lm_eval.models import model_arguments
        >>> model_arguments("./none")
        Traceback (most recent call last):
        ...
        ValueError: model='./none' is no folder that holds a model: there is no such folder.
    """
    folder = Path(model)
    if folder.is_dir() or model.startswith((".", "/", "~")) or _is_missing_folder(folder):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models of the Hub, and {model} is a folder: leave it out.")
        _check_folder(model, folder)
        if not (folder / "adapter_config.json").exists():
            return {"pretrained": str(folder.resolve()), "dtype": dtype}
    else:
        adapter = _fetch_adapter(model, revision)
        if adapter is None:
            return {"pretrained": model, "revision": revision or "main", "dtype": dtype}
        folder = adapter
    return _adapter_arguments(folder.resolve()) | {"dtype": dtype}


def _is_missing_folder(folder: Path) -> bool:
    """Whether a path cannot be a Hub id, or is more likely a mistyped folder: what it would lie in exists."""
    return len(folder.parts) > 2 or (len(folder.parts) == 2 and folder.parent.is_dir())


def _check_folder(model: str, folder: Path) -> None:
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return
    checkpoints = sorted(folder.glob("checkpoint-*/"), key=lambda path: path.stat().st_mtime)
    problem = "it has neither config.json nor adapter_config.json" if folder.is_dir() else "there is no such folder"
    hint = f"; did you mean {checkpoints[-1]}?" if checkpoints else "."
    raise ValueError(f"model={model!r} is no folder that holds a model: {problem}{hint}")


def _fetch_adapter(model: str, revision: str | None) -> Path | None:
    """A copy of an adapter of the Hub, as lm-eval would look for its base model at the adapter's revision."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            hf_hub_download(model, "adapter_config.json", revision=revision)
        except EntryNotFoundError:  # not there, or not to be reached: the latter ends in an error here
            hf_hub_download(model, "config.json", revision=revision)
            return None
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model={model!r} is no folder, and the Hub does not give a model of that name: {reason}"
        ) from (error)
    return Path(snapshot_download(model, revision=revision))


def _adapter_arguments(folder: Path) -> dict[str, Any]:
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{folder} is an adapter, and loading it needs peft: pip install 'peft>=0.21'")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base model: fill in `base_model_name_or_path`.")
    arguments = {"pretrained": str(Path(base).resolve()) if Path(base).is_dir() else base, "peft": str(folder)}
    if config.get("revision"):
        arguments["revision"] = config["revision"]
    if (folder / "tokenizer_config.json").exists():
        arguments["tokenizer"] = str(folder)
    return arguments
