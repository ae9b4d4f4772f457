"""Run on 4 CPU processes, a run over streams that is killed; then on 2, the rest of it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.support.faults import AtEvents
from tests.support.launcher import report
from tests.support.stream_documents import documents_of
from tests.support.streams import LENGTH, Recorder, make, mixture, sharded, table, texts

ROWS = 8  # of a micro-batch over all ranks
STEPS, SAVED, KILLED = 6, 2, 4


def trainer(out: Path, ranks: int, workers: int) -> Recorder:
    sources = {
        "a": table(40),
        "b": sharded([13, 25, 9, 4, 8, 7, 9, 12, 6], 100).with_format("torch"),
        "c": documents_of(texts(60).to_iterable_dataset(3), LENGTH),
    }
    settings = {"max_steps": STEPS, "save_steps": SAVED, "dataloader_num_workers": workers}
    return make(out, mixture(sources), per_device_train_batch_size=ROWS // ranks, **settings)


def noting(out: Path, rank: int) -> Path:
    return out / f"rows{rank}.json"


def train(out: Path, ranks: int, rank: int) -> dict[int, Any]:
    """The micro-batches of each step of this rank."""
    run = trainer(out / str(ranks), ranks, workers=2 if ranks == 4 else 0)

    def note(event: str) -> None:
        noting(out / str(ranks), rank).write_text(json.dumps(run.micro_batches))
        if ranks == 4 and run.state.global_step == KILLED and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.add_callback(AtEvents(note, "on_step_end"))
    run.train(resume_from_checkpoint=None if ranks == 4 else str(out / "4" / f"checkpoint-{SAVED}"))
    return run.micro_batches


def main(out: Path) -> None:
    report(train(out, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])), out)
