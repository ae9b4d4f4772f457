"""The type of the weights in the files of a saved model."""

import json
from pathlib import Path

from ..files import write_atomic

__all__ = ["convert_weights"]


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
    for path in source.glob("*model*.safetensors") if dtype else ():
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            metadata = file.metadata()
        narrow = {name: t.to(getattr(torch, str(dtype))) for name, t in tensors.items() if t.dtype == torch.float32}
        scratch = target / f"{path.name}.tmp"
        try:
            save_file(tensors | narrow, scratch, metadata)
        except SafetensorError as error:
            raise OSError(f"{scratch}: {error}") from error  # the disk is full
        written[path.name] = scratch.replace(target / path.name)
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    if content and (dtype or content.get("dtype") in ("bfloat16", "float16")):
        content["dtype"] = dtype or "float32"
        written[config.name] = target / config.name
        write_atomic(target / config.name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return written
