"""
Model and optimizer in sharded files, which are written while training goes on and read on any number of ranks.

The folders are those of accelerate for FSDP: `pytorch_model_fsdp_0` and `optimizer_0`, each a checkpoint of
`torch.distributed.checkpoint` with parameters by name.
"""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .distributed import reshard

__all__ = ["ShardedWriter", "is_sharded", "load_model", "load_optimizer"]

_MODEL, _OPTIMIZER = f"{FSDP_MODEL_NAME}_0", f"{OPTIMIZER_NAME}_0"


def is_sharded(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has its model in sharded files."""
    return Path(checkpoint, _MODEL).is_dir()


class ShardedWriter:
    """Writes sharded files from a copy in host memory, in threads."""

    def __init__(self) -> None:
        self._groups: list[Any] = []

    def begin(self, folder: Path, model: nn.Module, optimizer: Any) -> list[Future]:
        """
        Copy the weights and the state of the optimizer, unless it is `None`, and begin to write them into a folder.
        All ranks must call it. A future is done when all ranks have written.

        Raises:
            ValueError: the optimizer trains parameters that the model does not have.
        """
        reshard(model)  # parameters of FSDP2 that an evaluation leaves gathered are not those of the optimizer
        states: dict[str, dict[str, Any]] = {}
        if optimizer is not None:
            try:
                states[_OPTIMIZER] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            except KeyError as error:
                raise ValueError(
                    "checkpoint_async=True needs the name of each parameter that is trained, and the optimizer "
                    "trains some that are not the model's. Leave checkpoint_async out."
                ) from error
        # The larger first: the second copy is made while the first is written.
        states[_MODEL] = {"model": get_model_state_dict(model)}
        if dist.is_initialized() and not self._groups:
            # With their own groups, the writing threads do not wait for collectives of training.
            self._groups = [dist.new_group(backend="gloo") for _ in (_MODEL, _OPTIMIZER)]
        groups = self._groups or [None, None]
        found: list[Any] = [
            dcp.async_save(state, checkpoint_id=folder / name, process_group=group)
            for (name, state), group in zip(states.items(), groups, strict=False)
        ]
        return found


def load_model(model: nn.Module, checkpoint: str | Path) -> None:
    """Load the weights. All ranks must call it."""
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=Path(checkpoint, _MODEL))
    set_model_state_dict(model, state["model"])


def load_optimizer(model: nn.Module, optimizer: Any, checkpoint: str | Path) -> None:
    """Load the state of the optimizer of a model. All ranks must call it."""
    folder = Path(checkpoint, _OPTIMIZER)
    state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    # Parameters that never had a gradient have no state.
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    prefixes = {key[:i] for key in saved for i, character in enumerate(key) if character == "."}
    found = {name: kept for name, kept in state["optimizer"]["state"].items() if f"optimizer.state.{name}" in prefixes}
    state["optimizer"]["state"] = found
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(strict=False))
