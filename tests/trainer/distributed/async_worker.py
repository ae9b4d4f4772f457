"""Run on two CPU processes: checkpoints that are written while training goes on, under DDP and FSDP2."""

import contextlib
import errno
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from hf_nexus.trainer.checkpoints import is_complete
from tests.trainer.distributed.fsdp_worker import llama, make, trained

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "checkpoint_async": True}
SAVING |= {"eval_strategy": "steps", "eval_steps": 1}  # an evaluation leaves parameters of FSDP2 gathered


def resumed(out: Path, checkpoint: Path, **config: Any) -> list[float]:
    dist.barrier()
    return trained(make(out, llama(seed=5), **SAVING, **config), resume_from_checkpoint=str(checkpoint))


def failed(out: Path) -> str:
    """The error of a run in which rank 1 cannot write."""
    trainer = make(out, fsdp=False, **SAVING)
    full = patch.object(FileSystemWriter, "write_data", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full if dist.get_rank() == 1 else contextlib.nullcontext():
        try:
            trainer.train()
        except OSError as error:
            return str(error)
    return ""


def main(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"failed": failed(out / "failed")}
    for kind in ("ddp", "fsdp"):
        fsdp = kind == "fsdp"
        checkpoint = out / kind / "checkpoint-3"
        found[kind] = {
            "whole": trained(make(out / kind, fsdp=fsdp, **SAVING)),
            "complete": is_complete(checkpoint),
            "again": resumed(out / kind / "again", checkpoint, fsdp=fsdp),
            "other": resumed(out / kind / "other", checkpoint, fsdp=not fsdp),
        }
    return found
