"""Run on 2 CPU processes: all scenarios once. Each rank writes its results to `<out>/rank<r>.json`."""

import os
from itertools import islice
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_nexus.mixture.stream.reader import SourceError
from hf_nexus.trainer import feed
from hf_nexus.trainer.checkpoints import last_checkpoint
from tests.support.faults import AtEvents, weights
from tests.support.stream_documents import documents_of
from tests.support.streams import LENGTH, Recorder, Replayed, differences, make, mixture, run, sharded, table, texts

UNSAVED = {"save_strategy": "no"}
# Sources of five shards, of two, and of one for both ranks; an iterable one; and a map-style one.
FIRST = {"five": 0, "two": 60, "one": 120, "replayed": 180, "map": 240}


def rank() -> int:
    """This rank, also in a process of a data loader."""
    return int(os.environ["RANK"])


def uneven() -> Any:
    sources = {
        "five": sharded([12, 13, 9, 11, 14], FIRST["five"]),
        "two": sharded([30, 25], FIRST["two"]),
        "one": table(50, FIRST["one"]).to_iterable_dataset(),
        "replayed": Replayed(55, FIRST["replayed"]),
        "map": table(57, FIRST["map"]),
    }
    return mixture(sources, dict.fromkeys(sources, 1.0))


def small() -> Any:
    """Small sources with later passes, and documents."""
    sources = {
        "a": sharded([7, 4], 0),
        "b": table(9, 100),
        "c": documents_of(texts(20).to_iterable_dataset(3), LENGTH),
    }
    return mixture(sources)


def ending() -> Any:
    """One rank gets four shards of one row, the other rank three, and the shard of 11 rows."""
    sources = {"a": sharded([1] * 7 + [11], 0), "b": table(60, 100), "c": table(60, 200)}
    return mixture(sources, {"a": 2, "b": 1, "c": 1}, a=1)


def rows_only() -> Any:
    """Sources whose rows can share a micro-batch."""
    sources = {"a": sharded([7, 4], 0), "b": table(9, 100), "c": table(12, 200).to_iterable_dataset(2)}
    return mixture(sources)


class BrokenHere:
    """Raises an error at some row on rank 1, as its disk may."""

    def __init__(self, at: int, rank: int = 1):
        self.at, self.rank, self.rows = at, rank, 0

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows += 1
        if self.rows == self.at and self.rank == rank():
            raise ValueError("bad bytes")
        return row


def failing(at: int) -> Any:
    sources = {"a": sharded([20, 25], 0).map(BrokenHere(at)), "b": table(60, 100), "c": table(60, 200)}
    return mixture(sources, {"a": 2, "b": 1, "c": 1})


def function(step: int) -> dict[str, float]:
    """Different weights on each rank."""
    return {"a": 1.0 + step, "b": 1.0 + 5 * rank(), "c": 2.0 - rank()}


class Agreement:
    """Whether the ranks have the same weights after each step."""

    def __init__(self, trainer: Recorder):
        self.trainer, self.found = trainer, []
        trainer.add_callback(AtEvents(self, "on_step_end"))

    def __call__(self, event: str) -> None:
        own = weights(self.trainer)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        self.found.append(torch.equal(*gathered))


def facts(trainer: Recorder, agreement: Agreement | None = None) -> dict[str, Any]:
    rows: dict[str, list] = {}
    for step in trainer.micro_batches.values():
        for source, ids in step:
            rows.setdefault(source, []).extend(ids)
    return {
        "sources": trainer.sources(),
        "rows": rows,
        "weights": weights(trainer).tolist(),
        "agree": agreement.found if agreement else [],
        "left_out": trainer._feed._progress.left_out if trainer._feed._progress else {},
    }


def scenario(out: Path, data: Any, resumed: tuple[int, ...] = (), **config: Any) -> dict[str, Any]:
    """A run, and its differences after a resume from each of some steps."""
    trainer = make(out / "whole", data(), **{"save_steps": gcd(*resumed)} | config)
    agreement = Agreement(trainer)
    trainer.train()
    found = facts(trainer, agreement)
    found["differences"] = []
    for step in resumed:
        dist.barrier()
        folder = str(out / "whole" / f"checkpoint-{step}")
        again = run(out / "again", data(), folder, **config | UNSAVED)
        found["differences"] += differences(again, trainer, step)
    return found


def failure(out: Path, at: int, **config: Any) -> dict[str, Any]:
    """A run in which a source fails on one rank, and the run without the failure."""
    config |= UNSAVED
    whole = run(out / "whole", failing(-1), **config)
    trainer = make(out / "broken", failing(at), **config)
    found: dict[str, Any] = {}
    try:
        trainer.train()
    except SourceError as error:
        found["error"] = str(error)
    step = found["step"] = trainer.state.global_step
    dist.barrier()
    found["checkpoint"] = last_checkpoint(out / "broken") == str(out / "broken" / f"checkpoint-{step}")
    found["differences"] = differences(run(out / "broken", failing(-1), True, **config), whole, step)
    return found


class SplitByRank(Replayed):
    """Gives each rank its own rows, as some torch datasets do."""

    def __iter__(self) -> Any:
        return islice(super().__iter__(), dist.get_rank(), None, dist.get_world_size())


def splitting(out: Path) -> str:
    sources = {"map": table(57, 0), "split": SplitByRank(60, 100)}
    try:
        run(out, mixture(sources, dict.fromkeys(sources, 1.0)))
    except ValueError as error:
        return str(error)
    return ""


def isolation(out: Path) -> list[bool]:
    """Whether documents are isolated if the models of the ranks differ in what they can do."""
    found = []
    for able in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feed, "isolation_problem", lambda model, able=able: None if able == rank() else "it leaks")
            data = mixture({"a": documents_of(texts(20).to_iterable_dataset(3), LENGTH)})
            data.config.isolate_documents = None
            found.append(make(out / str(able), data).data_collator.isolate)
    return found


DYNAMIC = {"trainer_kwargs": {"mixture_weights_function": function}}


def main(out: Path) -> dict[str, Any]:
    return {
        "uneven": scenario(out / "uneven", uneven, (4,), max_steps=8, source_schedule="stratified"),
        "small": scenario(out / "small", small, (3,)),
        "ending": scenario(out / "ending", ending, (4,), max_steps=7),
        "ahead": scenario(out / "ahead", small, (3,), dataloader_num_workers=2, **DYNAMIC),
        "mixed": scenario(out / "mixed", rows_only, (3,), source_schedule="mixed"),
        "isolation": isolation(out / "isolation"),
        "splitting": splitting(out / "splitting"),
        "failing": failure(out / "failing", 14),
    }


def further(out: Path) -> dict[str, Any]:
    """The scenarios of slow tests."""
    return {
        "small at any step": scenario(out / "small", small, (1, 2, 4, 5)),
        "dynamic": scenario(out / "dynamic", small, (3,), **DYNAMIC),
        "blocked": scenario(out / "blocked", rows_only, (3,), source_schedule="blocked"),
        "plain": scenario(out / "plain", lambda: Replayed(36, 0), (2, 4), save_steps=1),
        "failing_dynamic": failure(out / "failing_dynamic", 14, **DYNAMIC),
    }
