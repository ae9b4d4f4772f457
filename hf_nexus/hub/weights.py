"""The type of the weights in the files of a saved model."""

import json
from pathlib import Path

from ..files import write_atomic

__all__ = ["convert_weights", "name_dtype"]


def convert_weights(source: Path, target: Path, dtype: str) -> dict[str, Path]:
    """
    Write the float32 weights of a saved model or of its adapters as `dtype` (`"bfloat16"`), and a configuration that
    names it, into the folder `target`, which may be `source`. Returns the files by name.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    written, size = {}, 0
    for path in source.glob("*model*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            metadata = file.metadata()
        kinds = {name: getattr(torch, dtype) if t.dtype == torch.float32 else t.dtype for name, t in tensors.items()}
        tensors = {name: tensor.to(kinds[name]) for name, tensor in tensors.items()}
        size += sum(tensor.nbytes for tensor in tensors.values())
        scratch = target / f"{path.name}.tmp"
        save_file(tensors, scratch, metadata)
        written[path.name] = scratch.replace(target / path.name)
    for path in source.glob("*model*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = size
        written[path.name] = target / path.name
        write_atomic(target / path.name, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written | name_dtype(source, target, dtype)


def name_dtype(source: Path, target: Path, dtype: str) -> dict[str, Path]:
    """Write the configuration of a saved model, if it has one, with the type in which its weights are loaded."""
    path = source / "config.json"
    if not path.exists():
        return {}
    config = {**json.loads(path.read_text(encoding="utf-8")), "dtype": dtype}
    write_atomic(target / path.name, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return {path.name: target / path.name}
