"""
Run by torchrun on 2 CPU processes: all scenarios once. Each rank writes its failures to `<out>/rank<r>.json`.

Launch it with one restart, because rank 1 is killed in the first attempt.
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.support import fault_processes, faults
from tests.support.faults import (
    IN_INNER_STEPS,
    IN_WINDOWS,
    SAVING,
    STEPS,
    AtEvents,
    Bomb,
    K,
    broken_off,
    displaced,
    make,
)
from tests.support.launcher import report

EPOCH = K + 2  # micro-batches of an epoch on each of two ranks: the windows of a run have 4, 2, 4 and 2
# The points of a window after which the ranks call collectives.
INTERRUPTED = [
    *((sync, "after_forward", i, "SIGTERM") for sync in ("global", "local") for i in range(1, K + 1)),
    *(("global", "forward", i, "SIGINT") for i in range(1, K + 1)),
    *(("global", place, 2, "error") for place in ("backward", "after_backward", "move", "collator")),
    ("local", "backward", 2, "error"),
]


def resumed(out: Path, steps: list[torch.Tensor], logs: dict[str, float], start: int) -> list[str]:
    """The failures of a run that resumes from step `start`."""
    dist.barrier()
    trainer = make(out, faults.model(seed=5), **SAVING)
    began: list[int] = []
    trainer.add_callback(AtEvents(lambda event: began.append(trainer.state.global_step), "on_train_begin"))
    trainer.train(resume_from_checkpoint=True)
    found = displaced(trainer, steps) + fault_processes.unfinished(out, ranks=2)
    if began != [start]:
        found.append(f"resumed from {began}, not from {start}")
    if trainer.state.global_step != STEPS:
        found.append(f"ended at step {trainer.state.global_step}")
    last = faults.last_log(trainer)
    # the order of the sum over two ranks may differ
    found += [f"{key}: {last[key]}, not {value}" for key, value in logs.items() if abs(last[key] - value) > 1e-5]
    return found


def interrupted(out: Path, steps: list[torch.Tensor], place: Any, bomb: Bomb, **config: Any) -> list[str]:
    trainer = make(out, **config)
    if not broken_off(trainer, place, bomb):
        return ["the bomb did not explode"]
    return displaced(trainer, steps)


def in_callback(event: str) -> Any:
    def place(trainer: Any, bomb: Bomb) -> Any:
        trainer.add_callback(AtEvents(lambda event: bomb(), event))
        return fault_processes.keeping_handler()

    return place


def with_nan(out: Path, calls: set[int], **config: Any) -> dict[str, Any]:
    """NaN on rank 1 only."""
    trainer = make(out, **config, **SAVING)
    seen = faults.whole_windows(trainer)
    with faults.poison(trainer, calls, rank=1):
        trainer.train()
    steps = [seen[0], *seen[2::3]]
    found = displaced(trainer, steps)
    for i, (begun, walked) in enumerate(zip(seen[::3], seen[1::3], strict=True)):
        if not torch.equal(begun, walked):
            found.append(f"window {i} did not end at its start")
    other = [step.clone() for step in steps]
    for step in other:
        dist.broadcast(step, 0)
    if not all(map(torch.equal, steps, other)):
        found.append("the ranks disagree")
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(steps)]
    skipped = faults.last_log(trainer)["inner_steps_skipped"]
    return {"found": found, "moved": moved, "skipped": skipped, "finite": bool(torch.stack(steps).isfinite().all())}


def terminated(out: Path, steps: list[torch.Tensor], logs: dict[str, float], call: int, start: int) -> list[str]:
    with fault_processes.keeping_handler():
        trainer = make(out, enable_jit_checkpoint=True)
        with IN_INNER_STEPS["after_forward"](trainer, fault_processes.Terminate(trainer, call)):
            trainer.train()
    return displaced(trainer, steps) + resumed(out, steps, logs, start)


def failed_checkpoint(out: Path, steps: list[torch.Tensor], logs: dict[str, float]) -> list[str]:
    def place(trainer: Any, bomb: Bomb) -> Any:
        save = trainer._save_optimizer_and_scheduler
        return patch.object(trainer, "_save_optimizer_and_scheduler", faults.before(save, bomb))

    return interrupted(out, steps, place, Bomb(2), **SAVING) + resumed(out, steps, logs, 1)


def watched(out: Path) -> dict[str, Any]:
    """The last scenario, because the audit hook cannot be removed."""
    trainer = make(out, **SAVING)
    looks = fault_processes.watch_files(out, ranks=2)
    trainer.train()
    return {"seen": [lack for look in looks for lack in look], "looks": len(looks)}


def be_killed(out: Path) -> None:
    """Rank 1 is killed in the third window."""
    trainer = make(out, **SAVING)
    at = EPOCH + 3 if trainer.args.process_index == 1 else 0

    def kill() -> None:
        (out.parent / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with faults.in_move(trainer, faults.Call(at, kill)):
        trainer.train()


def main(out: Path) -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        be_killed(out / "killed_run")
    runs = {sync: faults.trajectory(out / sync, inner_sync=sync) for sync in ("global", "local")}
    steps, logs = runs["global"]
    found: dict[str, Any] = {"killed": resumed(out / "killed_run", steps, logs, 2)}
    for sync, place, i, kind in INTERRUPTED:
        name = f"{sync}_{place}_{i}_{kind}"
        bomb = Bomb(EPOCH + i, kind)  # in the third window
        found[name] = interrupted(out / name, runs[sync][0], IN_INNER_STEPS[place], bomb, inner_sync=sync, **SAVING)
    for name, place in IN_WINDOWS.items():
        found[name] = interrupted(out / name, steps, place, Bomb(2), **SAVING)
    for event in ("on_substep_end", "on_pre_optimizer_step", "on_step_end"):
        found[event] = interrupted(out / event, steps, in_callback(event), Bomb(1))
    found["failed_checkpoint"] = failed_checkpoint(out / "failed", steps, logs)
    found["terminated_1"] = terminated(out / "terminated_1", steps, logs, K + 1, 1)
    found["terminated_2"] = terminated(out / "terminated_2", steps, logs, EPOCH + 3, 2)
    for sync in ("global", "local"):
        found[f"{sync}_nan"] = with_nan(out / f"{sync}_nan", {2}, inner_sync=sync)
        found[f"{sync}_all_nan"] = with_nan(out / f"{sync}_all_nan", set(range(1, K + 1)), inner_sync=sync)
    found["watched"] = watched(out / "watched")
    report(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
