"""The launcher of `hf-nexus train` on several devices."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import NoReturn

from ..pretrain.command_line import CommandLine

__all__ = ["launch"]


def launch(command_line: CommandLine, argv: list[str], accelerate_config: str | None) -> NoReturn:
    """
    Run torchrun in this process, or `accelerate launch` if its file is given. Each process runs `hf-nexus train` with
    `argv`, which was read as `command_line` and is checked first. The exit status is that of these processes. They get
    the signals of this process, but not from `accelerate launch` of a single process.

    Raises:
        ValueError: a wrong argument, a missing file, or more devices than the machine has.
    """
    if accelerate_config is not None and not os.path.isfile(accelerate_config):
        raise ValueError(
            f"--accelerate_config: there is no file {accelerate_config!r}. `accelerate config` writes one."
        )
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from ..pretrain.parsing import resolve

    arguments = resolve(replace(command_line, dry_run=True))
    devices = arguments.hardware.devices
    # The dry run, which checks on any machine, has its own `use_cpu`.
    here = 0 if arguments.resolved["training"]["use_cpu"] else torch.accelerator.device_count()
    if devices is not None and 0 < here < devices:
        raise ValueError(f"--devices {devices}: this machine has {here}. Use {here} or fewer, or add --use_cpu.")
    sys.stdout.flush()
    os.environ["PYTHONSAFEPATH"] = "1"  # `-m` would look for modules in the current folder first
    command = ["-m", "hf_nexus.cli", "train", *argv]
    try:
        if accelerate_config is None:
            torchrun(["--standalone", "--nproc_per_node", str(devices), *command])
        else:
            number = [] if devices is None else ["--num_processes", str(devices)]
            given = ["--config_file", accelerate_config, *number, *command]
            launch_command(launch_command_parser().parse_args(given))
    except SignalException as stop:  # the processes have had the same signal, and have ended
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _end(failure.exitcode, f"rank {rank}")
    except subprocess.CalledProcessError as error:
        _end(error.returncode, "the process")
    raise SystemExit(0)


def _end(status: int, what: str) -> NoReturn:
    """End with the status of a process, which has said why unless a signal has killed it."""
    if status < 0:
        name = signal.Signals(-status).name
        print(f"error: {what} was ended by {name}. SIGKILL is often a lack of memory.", file=sys.stderr)
    raise SystemExit(status if status >= 0 else 128 - status)
