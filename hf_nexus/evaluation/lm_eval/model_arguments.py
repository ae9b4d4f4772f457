"""Arguments with which lm-eval loads a model."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ...files import checkpoints_of
from ..models import adapter_config

__all__ = ["model_arguments"]


def model_arguments(model: str, revision: str | None = None, dtype: str = "auto") -> dict[str, Any]:
    """
    Arguments of the `hf` model of lm-eval for a folder or Hub id, of a whole model or of a LoRA adapter with its base
    model. A Hub id may have a `revision`: a branch, tag or commit. The dtype `"auto"` is that of the checkpoint.

    Raises:
        ValueError: the folder or the Hub has no such model, or `revision` is given with a folder.
        ImportError: an adapter, and peft is not installed.

    Example:
        >>> from hf_nexus.evaluation.lm_eval.model_arguments import model_arguments
        >>> model_arguments("./none")
        Traceback (most recent call last):
        ...
        ValueError: model='./none' is not a model: there is no such folder.
    """
    folder = Path(model)
    if folder.is_dir() or model.startswith((".", "/", "~")) or _is_missing_folder(folder):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is only for models on the Hub, and {model} is a folder.")
        _check_folder(model, folder)
        adapter = adapter_config(model)
        if adapter is None:
            return {"pretrained": str(folder.resolve()), "dtype": dtype}
    else:
        adapter = _check_hub(model, revision)
        if adapter is None:
            return {"pretrained": model, "revision": revision or "main", "dtype": dtype}
        # By its Hub id, lm-eval would look for the base model at `revision`, too.
        folder = Path(snapshot_download(model, revision=revision))
    folder, base = folder.resolve(), adapter.base_model_name_or_path
    if not base:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base model. Set `base_model_name_or_path`.")
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    arguments = {"pretrained": base, "peft": str(folder), "dtype": dtype}
    if adapter.revision:
        arguments["revision"] = adapter.revision
    if (folder / "tokenizer_config.json").exists():
        arguments["tokenizer"] = str(folder)
    return arguments


def _is_missing_folder(folder: Path) -> bool:
    """Whether a path cannot be a Hub id, or is rather a mistyped folder because its parent folder exists."""
    return len(folder.parts) > 2 or (len(folder.parts) == 2 and folder.parent.is_dir())


def _check_folder(model: str, folder: Path) -> None:
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return
    checkpoints = checkpoints_of(folder)
    problem = "it has neither config.json nor adapter_config.json" if folder.is_dir() else "there is no such folder"
    hint = f" Did you mean {checkpoints[-1]}?" if checkpoints else ""
    raise ValueError(f"model={model!r} is not a model: {problem}.{hint}")


def _check_hub(model: str, revision: str | None) -> Any | None:
    """Configuration of an adapter; `None` for a whole model. Fails if the Hub has neither."""
    from transformers.utils.hub import cached_file

    try:
        adapter = adapter_config(model, revision)
        if adapter is None:
            cached_file(model, "config.json", revision=revision)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model={model!r} is neither a folder nor a model on the Hub: {reason}") from error
    return adapter
