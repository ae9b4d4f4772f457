"""Data loader workers and the signals that a terminal, a launcher or a cluster sends to all processes of a run."""

import multiprocessing
import os
import signal
from functools import partial
from typing import Any

__all__ = ["keep_from_forkserver", "keep_signals_from_workers"]


def keep_signals_from_workers(loader: Any, args: Any) -> None:
    """
    Let the workers of a data loader outlive the signals after which the run saves a checkpoint: SIGINT, and with
    `enable_jit_checkpoint` SIGTERM. A worker that ends early would be an error in the run.
    """
    loader = getattr(loader, "base_dataloader", loader)  # the wrapper of Accelerate starts no workers itself
    method = args.dataloader_multiprocessing_context or multiprocessing.get_all_start_methods()[0]
    if args.enable_jit_checkpoint and method == "forkserver":
        keep_from_forkserver(signal.SIGTERM)  # the workers end with it
    loader.worker_init_fn = partial(_begin, loader.worker_init_fn, args.enable_jit_checkpoint)


def keep_from_forkserver(number: int) -> None:
    """Start the process that forks workers, unless it runs. It keeps what is ignored now, and so ignores a signal."""
    from multiprocessing import forkserver

    handler = signal.signal(number, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(number, handler)


def _begin(then: Any, saves_after_sigterm: bool, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if saves_after_sigterm:
        # A launcher sends SIGTERM to the group of each rank, and a cluster to each process: a worker gets one at most.
        if hasattr(os, "setpgid"):
            os.setpgid(0, 0)
        # A second one ends it: a worker that hangs when its loader ends gets one from torch, and one at exit.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if then is not None:
        then(worker)
