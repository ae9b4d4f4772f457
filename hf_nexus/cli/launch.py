"""The launcher of `hf-nexus train` on several devices."""

import os
import sys
from typing import NoReturn

__all__ = ["launch"]


def launch(argv: list[str], devices: int | None, accelerate_config: str | None) -> NoReturn:
    """
    Replace this process by torchrun, or by `accelerate launch` if its file is given. The launcher gets the signals of
    this process, and its exit status is that of the command. Arguments are checked once, before the launch.

    Raises:
        ValueError: a wrong argument, a missing file, or more devices than the machine has.
    """
    import torch

    from ..pretrain.parsing import parse_arguments

    arguments = parse_arguments(["--dry_run=True", "--config", *argv])
    here = 0 if arguments.resolved["training"]["use_cpu"] else torch.accelerator.device_count()
    if devices is not None and 0 < here < devices:
        raise ValueError(f"--devices {devices}: this machine has {here}. Use {here} or fewer, or add --use_cpu.")
    if accelerate_config is not None and not os.path.isfile(accelerate_config):
        raise ValueError(
            f"--accelerate_config: there is no file {accelerate_config!r}. `accelerate config` writes one."
        )
    if accelerate_config is None:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(devices)]
    else:
        number = [] if devices is None else ["--num_processes", str(devices)]
        launcher = ["accelerate.commands.launch", "--config_file", accelerate_config, *number]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *launcher, "-m", "hf_nexus.cli", "train", *argv])
