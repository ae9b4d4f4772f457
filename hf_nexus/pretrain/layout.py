"""How the devices of a planned run share its weights and its rows."""

import os
from dataclasses import dataclass
from typing import Any

from ..trainer.distributed import check_paths
from .fields import HardwareArguments, PretrainArguments, PretrainConfig
from .model import config_of

__all__ = ["Layout", "check_planned_layout", "launched_sharding", "layout_of"]

_SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # by tensor parallelism, in equal parts


@dataclass(frozen=True)
class Layout:
    """The groups of the devices of a run."""

    model: Any  # the configuration of the language model
    devices: int
    tp: int  # devices of a group with tensor parallelism, which read the same rows
    sharding: str  # "ddp" or "fsdp2"
    machine: int  # devices of a machine
    node_size: int | None  # devices per path with `inner_sync="node"`, if not those of a machine

    @property
    def replicas(self) -> int:
        """Devices that read different rows."""
        return self.devices // self.tp

    @property
    def sharded(self) -> bool:
        """Whether devices share the weights by FSDP2."""
        return self.replicas > 1 and self.sharding == "fsdp2"

    def weights(self, parameters: int) -> int:
        """Of so many, those of one device before FSDP2 shards them. All but the embeddings are divided."""
        if self.tp == 1:
            return parameters
        embeddings = min(parameters, self.model.vocab_size * self.model.hidden_size)
        return embeddings + (parameters - embeddings) // self.tp

    def path(self) -> int:
        """
        Devices per path with `inner_sync="node"`.

        Raises:
            ValueError: the devices cannot be split into paths.
        """
        size, machine = self.node_size, min(self.machine, self.devices)
        check_paths(self.devices, {size} if size else {machine, self.devices % machine or machine})
        return size or machine


def launched_sharding(training: PretrainConfig) -> str:
    """`"fsdp2"` if the training arguments or the launcher say so, else `"ddp"`."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return "fsdp2" if training.fsdp or launched else "ddp"


def check_planned_layout(hardware: HardwareArguments, args: PretrainConfig) -> None:
    """
    Refuse hardware that was named for a plan, and that this run does not have.

    Raises:
        ValueError: number of devices, `tp_size` or sharding differ.
    """
    if hardware.devices not in (None, args.world_size):
        raise ValueError(
            f"devices={hardware.devices} is for a plan only, and this run has {args.world_size}. Remove it and start "
            f"the processes with `torchrun --nproc_per_node {hardware.devices} recipes/pretrain_3b.py ...`, or use "
            f"`hf-nexus train CONFIG --devices {hardware.devices}`."
        )
    if (tp := hardware.tp_size) > 1:
        raise ValueError(
            f"tp_size={tp} is for a plan only. For such a run, load the model with a DistributedConfig in a script "
            "(docs/distributed.md)."
        )
    if (sharding := hardware.sharding) not in (None, launched := launched_sharding(args)):
        how = "Remove the launcher's FSDP, or --sharding"
        if sharding == "fsdp2":
            how = (
                "Replace it by --accelerate_config recipes/accelerate/fsdp2.yaml (of a checkout, or a file of "
                "`accelerate config`), or by --fsdp --fsdp_config '{\"fsdp_version\": 2}'"
            )
        raise ValueError(f"sharding={sharding!r} is for a plan only, and this run uses {launched}. {how}.")


def layout_of(arguments: PretrainArguments, devices: int) -> Layout:
    """
    The layout of a run on that many devices. Without `--sharding` and `--devices_per_node`, it follows the training
    arguments and the launcher.

    Raises:
        ValueError: a `tp_size` that is not possible.
    """
    hardware, t, m = arguments.hardware, arguments.training, config_of(arguments)
    launched = t.world_size > 1 and hardware.devices in (None, t.world_size)  # the devices of the launcher are planned
    machine = int((launched and os.environ.get("LOCAL_WORLD_SIZE")) or 8)
    tp, sharding = hardware.tp_size, hardware.sharding or launched_sharding(t)
    if devices % tp:
        raise ValueError(f"tp_size={tp} with {devices} devices is not allowed: it must divide them. Set --devices.")
    if tp > 1 and t.nexus and t.inner_sync != "global":
        raise ValueError(f"tp_size={tp} with inner_sync={t.inner_sync!r} is not possible. Set inner_sync to 'global'.")
    if tp > 1 and t.checkpoint_async:
        raise ValueError(f"checkpoint_async=True with tp_size={tp} is not possible. Leave one of the two out.")
    if 1 < tp < devices and sharding != "fsdp2":
        raise ValueError(f"tp_size={tp} is combined with FSDP2 only. Add --sharding fsdp2, or --devices {tp}.")
    if tp > 1:
        missing = [name for name in ("hidden_size", "num_hidden_layers") if getattr(m, name, None) is None]
        if missing:
            raise ValueError(f"tp_size={tp} is not planned for a {m.model_type}: no {missing[0]}. Set tp_size to 1.")
        # getattr would raise for a size that differs between the layers of the model.
        sizes = {name: vars(m).get(m.attribute_map.get(name, name), 0) for name in _SPLIT}
        if uneven := [f"{name}={size}" for name, size in sizes.items() if isinstance(size, int) and size % tp]:
            raise ValueError(f"tp_size={tp} with {', '.join(uneven)} is not possible. Set tp_size to a divisor.")
    return Layout(m, devices, tp, sharding, hardware.devices_per_node or machine, t.node_size)
