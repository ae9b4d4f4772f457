"""The type of the weights in the files of a saved model."""

import json
from pathlib import Path

from ..files import write_atomic

__all__ = ["convert_weights"]

_OTHERS = ("checkpoint-", "_")  # folders of an output folder that hold other models


def convert_weights(source: Path, target: Path, dtype: str | None) -> dict[str, Path]:
    """
    Write the float32 weights of a saved model or of its adapters as `dtype`, and a configuration that names it, into
    the folder `target`, which may be `source`. Returns the files by name.

    `None` leaves the weights, some of which are float32, and corrects a configuration that names the type of others.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    written, config = {}, source / "config.json"
    # Adapters with a name are in a folder of that name.
    named = [path for path in source.glob("*/adapter_model*.safetensors") if not path.parent.name.startswith(_OTHERS)]
    for path in [*source.glob("*model*.safetensors"), *named] if dtype else ():
        name = path.relative_to(source)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            metadata = file.metadata()
        narrow = {key: t.to(getattr(torch, str(dtype))) for key, t in tensors.items() if t.dtype == torch.float32}
        scratch = target / f"{name}.tmp"
        scratch.parent.mkdir(exist_ok=True)
        try:
            save_file(tensors | narrow, scratch, metadata)
        except SafetensorError as error:
            raise OSError(f"{scratch}: {error}") from error  # the disk is full
        written[name.as_posix()] = scratch.replace(target / name)
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    if content and (dtype or content.get("dtype") in ("bfloat16", "float16")):
        content["dtype"] = dtype or "float32"
        written[config.name] = target / config.name
        write_atomic(target / config.name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return written
