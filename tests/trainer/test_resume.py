"""Interrupted runs over streams resume with the same micro-batches, epochs and weights, bit for bit."""

import functools
import gc
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from transformers import ProcessorMixin, Trainer

from hf_nexus.files import step_of
from hf_nexus.mixture import MixtureConfig, load_mixture
from hf_nexus.mixture.schedule import DynamicSchedule, SourceSchedule
from hf_nexus.mixture.stages import Stage, stage_borders, stages_of
from hf_nexus.mixture.stream.reader import SourceError
from hf_nexus.tensors import random_state_kept
from hf_nexus.trainer.checkpoints import last_checkpoint

from ..support.fault_processes import KILLS, Terminate, in_a_process, keeping_handler
from ..support.faults import IN_INNER_STEPS, AtEvents, K, weights
from ..support.stream_documents import documents_of
from ..support.streams import (
    COMPLETIONS,
    LENGTH,
    STEPS,
    WEIGHTS,
    Recorder,
    Replayed,
    differences,
    kinds,
    make,
    mixture,
    pairs,
    run,
    sharded,
    table,
    texts,
)
from ..support.tiny_tokenizer import MARKING, tiny_tokenizer
from ..support.token_files import write_ds

STAGES = [{"until": 0.5, "weights": {"a": 1, "b": 3, "c": 0}}, {"until": 1.0, "weights": {"a": 1, "b": 0, "c": 3}}]
Whole = Callable[..., Recorder]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`whole(kind, schedule, workers)`: uninterrupted runs, each trained once."""
    gc.freeze()  # Trainer collects garbage whenever it starts

    @functools.cache
    def get(kind: str, schedule: str = "random", workers: int = 0) -> Recorder:
        out = tmp_path_factory.mktemp("whole")
        return run(out, mixture(kinds()[kind]()), source_schedule=schedule, dataloader_num_workers=workers)

    return get


@pytest.fixture(autouse=True)
def impatient_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error, torch would wait for each loader worker until a timeout."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)


def checkpoint(trainer: Recorder, step: int) -> str:
    return f"{trainer.args.output_dir}/checkpoint-{step}"


def saved_state(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "data_state_0.json").read_text())


# ---- To the bit ----


@pytest.mark.parametrize("steps", [(1, 4), pytest.param((2, 3, 5), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        *(pytest.param(k, "random", marks=pytest.mark.slow) if k == "documents" else (k, "random") for k in kinds()),
        *(pytest.param(k, "stratified", marks=pytest.mark.slow) for k in kinds()),
    ],
)
def test_resumed_at_any_step_a_run_ends_as_if_it_had_not_been(
    whole: Whole, tmp_path: Path, kind: str, schedule: str, steps: tuple[int, ...]
) -> None:
    expected = whole(kind, schedule)
    if kind != "map-style":  # later passes are resumed as well
        positions = saved_state(checkpoint(expected, 4))["stream"]["positions"]
        assert max(lane["pass"] for lanes in positions.values() for lane in lanes.values()) >= 1
    for step in steps:
        data, config = mixture(kinds()[kind]()), {"source_schedule": schedule, "save_strategy": "no"}
        resumed = run(tmp_path, data, checkpoint(expected, step), **config)
        assert differences(resumed, expected, step) == [], step


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("map-style", "mixed"),
        ("rows", "blocked"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("map-style", "blocked"), ("rows", "mixed"))),
    ],
)
def test_controls_resume_to_the_bit_over_files_and_streams(
    whole: Whole, tmp_path: Path, kind: str, schedule: str
) -> None:
    expected = whole(kind, schedule)
    for step in (1, 4):
        data, config = mixture(kinds()[kind]()), {"source_schedule": schedule, "save_strategy": "no"}
        assert differences(run(tmp_path, data, checkpoint(expected, step), **config), expected, step) == []


def test_controls_read_the_same_sources_from_files_and_streams(whole: Whole) -> None:
    """Tokens tell the source of each row."""

    def rows(kind: str, schedule: str) -> list[list[list[int]]]:
        windows = whole(kind, schedule).micro_batches.values()
        return [[[row[0] // 100 for row in rows] for _, rows in window] for window in windows]

    for schedule in ("mixed", "blocked"):
        assert rows("map-style", schedule) == rows("rows", schedule)
    assert all(len({*micro_batch}) > 1 for window in rows("rows", "mixed") for micro_batch in window)
    assert all(len({str(of) for of in window}) == 1 for window in rows("rows", "blocked"))


@pytest.mark.parametrize(
    "order",
    [
        {},
        pytest.param({"train_sampling_strategy": "group_by_length"}, marks=pytest.mark.slow),
        pytest.param({"train_sampling_strategy": "batch_rebalance"}, marks=pytest.mark.slow),
        {"accelerator_config": {"use_seedable_sampler": False}},
    ],
)
def test_a_plain_dataset_resumes_in_the_middle_of_an_epoch(tmp_path: Path, order: dict[str, Any]) -> None:
    """Whatever random numbers its order is drawn from. An epoch has two outer steps."""
    config = {"max_steps": -1, "num_train_epochs": 3, **order}

    def data() -> Dataset:
        return table(4 * K).remove_columns("x")

    expected = run(tmp_path / "whole", data(), **config)
    assert expected.micro_batches[1] != expected.micro_batches[3]
    for step in (1, 3):
        assert differences(run(tmp_path, data(), checkpoint(expected, step), **config), expected, step) == []


@pytest.mark.parametrize("order", [{}, {"train_sampling_strategy": "group_by_length"}])
def test_a_loader_before_training_depends_on_the_seed(tmp_path: Path, order: dict[str, Any]) -> None:
    def first(seed: int) -> list[Any]:
        settings = {"accelerator_config": {"use_seedable_sampler": False}, "data_seed": seed, **order}
        trainer = make(tmp_path, table(64).remove_columns("x"), **settings)
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize(
    ("shuffled", "rows"),
    [
        (False, 4 * K),
        (True, 5 * K + 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 5 * K + 1), (True, 4 * K))),
    ],
)
def test_a_plain_stream_resumes_in_any_pass(tmp_path: Path, rows: int, shuffled: bool) -> None:
    """A pass has two outer steps, and maybe rows that fill no third. The Trainer resumes in the first pass."""

    def data() -> Any:
        if not shuffled:
            return Replayed(rows, 0)
        return table(rows).remove_columns("x").to_iterable_dataset(2).shuffle(seed=3, buffer_size=5)

    expected = run(tmp_path / "whole", data())
    for step in range(1, STEPS):
        assert differences(run(tmp_path, data(), checkpoint(expected, step)), expected, step) == []
    longer = run(tmp_path, data(), checkpoint(expected, 3), max_steps=STEPS + 2).micro_batches
    assert [longer[step] for step in range(3, STEPS)] == [expected.micro_batches[step] for step in range(3, STEPS)]


@pytest.mark.parametrize("own_loader", [True, False])
def test_data_that_the_constructor_lacks_resumes_in_any_pass(
    tmp_path: Path, own_loader: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a subclass with its own data loader, or set later. A pass has two outer steps."""
    data = table(4 * K).remove_columns("x").with_format("torch")
    if own_loader:
        loader = functools.partial(torch.utils.data.DataLoader, data, 2)
        monkeypatch.setattr(Recorder, "get_train_dataloader", lambda self: self.accelerator.prepare(loader()))

    def train(folder: str, resume: str | None = None) -> Recorder:
        trainer = make(tmp_path / folder, None, seed=5 if resume else 0)
        trainer.train_dataset = None if own_loader else data
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    expected = train("whole")
    for step in (1, 3, 4):
        assert differences(train("resumed", checkpoint(expected, step)), expected, step) == []


@pytest.mark.parametrize("event", ["create_scheduler", "on_train_begin", "on_epoch_begin", "on_step_end"])
@pytest.mark.parametrize(("kind", "workers"), [("mix", 0), ("map-style", 0), ("mix", 2)])
def test_another_data_loader_moves_no_training(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int, event: str
) -> None:
    expected = whole(kind, workers=workers)
    get_loader = Trainer._get_dataloader

    def sharded(self: Trainer, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """A loader as of DDP, in which Accelerate does not reach the sampler on a resume."""
        loader = get_loader(self, dataset, description, *args, **kwargs)
        if kind == "map-style" and description == "Training":
            vars(loader)["batch_sampler"] = BatchSamplerShard(loader.batch_sampler, 1, 0)
        return loader

    monkeypatch.setattr(Trainer, "_get_dataloader", sharded)

    def trained(folder: str, resume: str | None = None) -> Recorder:
        data = mixture(kinds()[kind]())
        trainer = make(tmp_path / folder, data, seed=5 if resume else 0, dataloader_num_workers=workers)

        def look(event: str) -> None:
            with random_state_kept(trainer.args.device):  # a data loader draws a seed
                next(iter(trainer.get_train_dataloader()))

        if event == "create_scheduler":
            create = trainer.create_scheduler
            monkeypatch.setattr(trainer, event, lambda *a, **k: look(event) or create(*a, **k))
        else:
            trainer.add_callback(AtEvents(look, event))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    looking, step = trained("looking"), 5 if kind == "map-style" else 2  # in the second epoch
    assert differences(looking, expected, 0) == []
    assert differences(trained("resumed", checkpoint(looking, step)), expected, step) == []


def test_sources_packed_here_and_elsewhere_cannot_be_mixed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Load all of them as one mixture"):
        make(tmp_path, kinds()["mix"](), source_schedule="mixed", mixture_weights=WEIGHTS)


@pytest.mark.parametrize("kind", ["mix", *(pytest.param(k, marks=pytest.mark.slow) for k in kinds() if k != "mix")])
def test_resumed_after_each_step_of_a_resumed_run(whole: Whole, tmp_path: Path, kind: str) -> None:
    expected = whole(kind)
    for step in range(STEPS):
        one = run(tmp_path, mixture(kinds()[kind]()), resume=step > 0, stop_after=step + 1)
        assert one.micro_batches == {step: expected.micro_batches[step]}
    assert torch.equal(weights(one), weights(expected))


@pytest.mark.parametrize(
    ("kind", "step"), [("mix", 3), *(pytest.param("mix", s, marks=pytest.mark.slow) for s in (1, 2, 4, 5))]
)
def test_resumed_with_workers(whole: Whole, tmp_path: Path, kind: str, step: int) -> None:
    expected = whole(kind, workers=2)
    resumed = run(tmp_path, mixture(kinds()[kind]()), checkpoint(expected, step), dataloader_num_workers=2)
    assert differences(resumed, expected, step) == []
    last = checkpoint(expected if step == 5 else resumed, 5)
    assert differences(run(tmp_path, mixture(kinds()[kind]()), last, dataloader_num_workers=2), expected, 5) == []


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("mix", 0, 2), *(pytest.param("documents", *n, marks=pytest.mark.slow) for n in ((2, 0), (0, 3), (3, 2)))],
)
def test_resumed_with_other_workers(whole: Whole, tmp_path: Path, kind: str, before: int, after: int) -> None:
    """Also three workers, which do not divide the turns of a run that began without."""
    expected = whole(kind, workers=before)
    resumed = run(tmp_path, mixture(kinds()[kind]()), checkpoint(expected, 2), dataloader_num_workers=after)
    assert differences(resumed, expected, 2) == []


def train_until_killed(out: Path, kind: str, place: str, workers: int) -> None:
    """Run in another process."""
    trainer = make(out, mixture(kinds()[kind]()), dataloader_num_workers=workers)
    with KILLS[place](trainer):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "place", "workers", "visible", "step"),
    [
        ("mix", "window", 0, 2, 2),
        ("documents", "checkpoint", 0, 1, 1),
        pytest.param("mix", "window", 2, 2, 2, marks=pytest.mark.slow),  # workers outlive their parent by seconds
        pytest.param("replay", "rename", 0, 1, 2, marks=pytest.mark.slow),  # the second one was complete
    ],
)
def test_killed_and_resumed(
    whole: Whole, tmp_path: Path, kind: str, place: str, workers: int, visible: int, step: int
) -> None:
    assert in_a_process(train_until_killed, tmp_path, kind, place, workers) == -9
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{visible}")
    resumed = run(tmp_path, mixture(kinds()[kind]()), resume=True, dataloader_num_workers=workers)
    assert differences(resumed, whole(kind, workers=workers), step) == []


def test_a_window_that_is_terminated_is_repeated(whole: Whole, tmp_path: Path) -> None:
    """Its micro-batches were fetched, but are not in the saved positions."""
    with keeping_handler():
        trainer = make(tmp_path, mixture(kinds()["mix"]()), enable_jit_checkpoint=True, save_strategy="no")
        with IN_INNER_STEPS["after_forward"](trainer, Terminate(trainer, 2 * K + 2)):
            trainer.train()
    assert last_checkpoint(tmp_path) == checkpoint(trainer, 2)
    assert differences(run(tmp_path, mixture(kinds()["mix"]()), resume=True), whole("mix"), 2) == []


def test_isolated_documents_are_resumed(tmp_path: Path) -> None:
    """Packed rows with positions, from documents that are cut at row borders."""

    def data() -> Any:
        made = mixture(kinds()["documents"]())
        made.config.isolate_documents = True
        return made

    expected = run(tmp_path / "whole", data())
    assert torch.equal(weights(expected), weights(run(tmp_path / "other", data())))
    assert differences(run(tmp_path, data(), checkpoint(expected, 3)), expected, 3) == []


# ---- Little is read again, little is saved ----


@pytest.mark.parametrize("kind", ["rows", "documents"])
@pytest.mark.parametrize("step", [pytest.param(10, marks=pytest.mark.slow), 30])
def test_the_first_batch_reads_the_buffer_and_a_batch_at_most(tmp_path: Path, kind: str, step: int) -> None:
    read: list[int] = []

    def note(row: dict[str, Any]) -> dict[str, Any]:
        read.append(row["x"])
        return row

    def data() -> Any:
        if kind == "rows":
            return mixture({"a": table(160).to_iterable_dataset(2).map(note)}, {"a": 1}, buffer_size=60)
        documents = Dataset.from_dict({"x": list(range(160)), "text": [f"number {x}" for x in range(160)]})
        return mixture({"a": documents_of(documents.to_iterable_dataset(2).map(note), 4)}, {"a": 1}, buffer_size=60)

    steps = {"max_steps": step + 1, "save_steps": step, "logging_steps": 100}
    trained = run(tmp_path, data(), stop_after=step, **steps)
    counts: list[int] = []
    trainer = make(tmp_path, data(), **steps)
    collate = trainer.data_collator

    def counting(rows: list) -> Any:
        counts.append(len(read))
        return collate(rows)

    trainer.data_collator = counting
    read.clear()
    trainer.train(resume_from_checkpoint=checkpoint(trained, step))
    assert 0 < counts[0] <= 60 + 2


def test_the_state_in_a_checkpoint_is_small_and_json(whole: Whole) -> None:
    for kind in kinds():
        file = Path(checkpoint(whole(kind), STEPS), "data_state_0.json")
        assert file.stat().st_size < 25_000
        assert set(json.loads(file.read_text())) == {"description", "stream"}


# ---- Another mixture ----


def held_out(*hashes: int) -> Any:
    return documents_of(texts(20).to_iterable_dataset(3), LENGTH, hashes)


def tokenized_by(tokenizer: Any) -> Any:
    documents = kinds()["mix"]()["c"]
    return replace(documents, encoder=replace(documents.encoder, tokenizer=tokenizer))


CHANGES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "weights": (
        lambda: mixture(kinds()["mix"](), {"a": 1, "b": 1, "c": 2}),
        {},
        r"weights was .*0\.5.* and is .*0\.25",
    ),
    "stages": (lambda: mixture(kinds()["mix"](), STAGES), {}, r"weights was .* and is \[\[0, .*\[3, "),
    "buffer": (lambda: mixture(kinds()["mix"](), buffer_size=8), {}, "buffer_size was 6 and is 8"),
    "sources": (lambda: mixture({k: s for k, s in kinds()["mix"]().items() if k != "b"}), {}, r"source 'b' is gone"),
    "rows": (lambda: mixture(kinds()["mix"]() | {"a": table(12)}), {}, r"source 'a': rows was 11 and is 12"),
    "shards": (lambda: mixture(kinds()["mix"]() | {"b": sharded([8], 100)}), {}, "'b': shards was 2 and is 1"),
    "batch": (lambda: mixture(kinds()["mix"]()), {"per_device_train_batch_size": 1}, "over all ranks was 2 and is 1"),
    "k": (lambda: mixture(kinds()["mix"]()), {"gradient_accumulation_steps": 2}, "accumulation_steps was 4 and is 2"),
    "seed": (lambda: mixture(kinds()["mix"]()), {"data_seed": 1}, "seed was 42 and is 1"),
    "schedule": (lambda: mixture(kinds()["mix"]()), {"source_schedule": "stratified"}, "was 'random' and is 'strat"),
    "order": (lambda: mixture({k: kinds()["mix"]()[k] for k in "bac"}), {}, r"sources was \['a', .* is \['b', 'a'"),
    "content": (lambda: mixture(kinds()["mix"]() | {"a": table(11, 1)}), {}, r"'a': sample was '\w+' and is '\w+'"),
    "layers": (lambda: mixture(kinds()["mix"]() | {"b": sharded([3, 5], 100).skip(1)}), {}, "'b': layers was .* n=1"),
    "arguments": (lambda: mixture(kinds()["mix"]() | {"b": sharded([3, 5], 200)}), {}, "'b': layers was .* kwargs="),
    "held out": (
        lambda: mixture(kinds()["mix"]() | {"c": held_out(7)}),
        {},
        r"'c': held_out was \[0, 0\] and is \[1, 7",
    ),
    "function": (
        lambda: mixture(kinds()["mix"]()),
        {"trainer_kwargs": {"mixture_weights_function": lambda step: WEIGHTS}},
        "weights was .* and is 'decided during training'",
    ),
    "tokenizer": (
        lambda: mixture(kinds()["mix"]() | {"c": tokenized_by(tiny_tokenizer("another text"))}),
        {"trainer_kwargs": {"processing_class": None}},
        r"'c': tokenizer was '\w+' and is '\w+'",
    ),
}


def with_length(length: int) -> Any:
    data = mixture(kinds()["mix"]())
    data.config.sequence_length = length
    return data


CHANGES["length"] = (lambda: with_length(16), {}, "sequence_length was 8 and is 16")


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_is_refused_by_name_and_can_be_allowed(
    whole: Whole, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = checkpoint(whole("mix"), 2)
    build, config, message = CHANGES[change]
    with pytest.raises(ValueError, match=rf"cannot be resumed exactly: .*{message}.*allow_mixture_change=True"):
        run(tmp_path, build(), before, **config)
    if change in ("weights", "sources", "stages"):
        trainer = run(tmp_path, build(), before, allow_mixture_change=True, **config)
        assert sorted(trainer.micro_batches) == list(range(2, STEPS))
        assert "streams are read from their beginning" in caplog.text
        again = run(tmp_path / "again", build(), checkpoint(trainer, 4), **config)  # the run resumes exactly
        assert again.micro_batches == {step: trainer.micro_batches[step] for step in (4, 5)}
        assert torch.equal(weights(again), weights(trainer))


@pytest.mark.parametrize("stream", [False, True])
def test_stages_refuse_a_run_of_another_length(tmp_path: Path, stream: bool) -> None:
    """The sources so far would be others, and with them the rows that come next."""
    shares: list = [{"until": 0.5, "weights": {"a": 1, "b": 0}}, {"until": 1.0, "weights": {"a": 0, "b": 1}}]
    rows = {"a": table(90), "b": table(90, 100)}
    data = {name: table.to_iterable_dataset() for name, table in rows.items()} if stream else rows
    run(tmp_path, data, stop_after=4, mixture_weights=shares)
    with pytest.raises(ValueError, match=r"weights was \[\[0, .*\[3, .* and is \[\[0, .*\[5, "):
        run(tmp_path, data, True, mixture_weights=shares, max_steps=10)
    assert run(tmp_path, data, True, mixture_weights=shares).sources() == ["b"] * 2 * K


@pytest.mark.parametrize("kind", ["map-style", "rows"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mixture_weights", {"a": 1.0, "b": 0.0, "c": 1.0}, "weights was"),
        ("per_device_train_batch_size", 1, "over all ranks was 2 and is 1"),
    ],
)
def test_arguments_changed_after_construction_are_compared(
    whole: Whole, tmp_path: Path, kind: str, name: str, value: Any, message: str
) -> None:
    trainer = make(tmp_path, mixture(kinds()[kind]()))
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"cannot be resumed exactly: .*{message}"):
        trainer.train(resume_from_checkpoint=checkpoint(whole(kind), 2))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_goes_on_when_its_files_were_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.chdir(tmp_path)

    def loaded(folder: str, rows: int = 40) -> Any:
        Path(folder).mkdir()
        texts(rows).to_json(f"{folder}/web.jsonl")
        Dataset.from_dict({"text": ["law"] * 9}).to_json(f"{folder}/law.jsonl")
        web = {"path": f"{folder}/web.jsonl", "weight": 1, "streaming": streaming}
        sources = {"web": web, "law": {"path": str(Path(folder, "law.jsonl").absolute()), "role": "ood"}}
        config = MixtureConfig.from_dict({"sources": sources, "sequence_length": LENGTH})
        return load_mixture(config, tiny_tokenizer(), cache_dir="cache")

    expected = run(tmp_path / "whole", loaded("old"))
    resumed = run(tmp_path / "resumed", loaded("new"), checkpoint(expected, 2))
    assert differences(resumed, expected, 2) == []
    with pytest.raises(ValueError, match=r"source 'web': (rows|layers) was"):
        run(tmp_path / "resumed", loaded("other", rows=50), checkpoint(expected, 2))


def test_a_processor_trains_and_resumes_a_mixture(tmp_path: Path) -> None:
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer: Any = None):
            super().__init__(tokenizer)

    settings = {"trainer_kwargs": {"processing_class": Processor(tiny_tokenizer())}}
    expected = run(tmp_path / "whole", mixture(kinds()["mix"]()), **settings)
    resumed = run(tmp_path / "resumed", mixture(kinds()["mix"]()), checkpoint(expected, 2), **settings)
    assert differences(resumed, expected, 2) == []


def test_a_missing_or_damaged_data_state_is_refused(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint(whole("mix"), 2), folder)
    file = folder / "data_state_0.json"
    state = json.loads(file.read_text())
    state["stream"]["layout"] = [2, 2]  # the other rank saved its positions on another disk
    file.write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"it has no data_state_1\.json"):
        run(tmp_path, mixture(kinds()["mix"]()), str(folder))
    file.write_bytes(bytes(64))  # after a power failure
    with pytest.raises(ValueError, match=r"data_state_0\.json is damaged .*another checkpoint"):
        run(tmp_path, mixture(kinds()["mix"]()), str(folder))
    file.unlink()
    with pytest.raises(ValueError, match=r"it has no data_state_0\.json"):
        run(tmp_path, mixture(kinds()["mix"]()), str(folder))


def test_a_checkpoint_without_this_ranks_state_is_refused(whole: Whole, tmp_path: Path) -> None:
    """As on a node with a separate disk, which lacks this rank's positions."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint(whole("mix"), 2), folder)
    state = json.loads((folder / "data_state_0.json").read_text())
    (folder / "data_state_0.json").write_text(json.dumps({**state, "stream": None}))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"it has no data_state_0\.json"):
        run(tmp_path / "out", mixture(kinds()["mix"]()), resume=str(folder))


def test_a_resumed_stream_out_of_memory_keeps_its_batch_size(tmp_path: Path) -> None:
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    run(tmp_path, mixture(kinds()["mix"]()), stop_after=1, **settings)
    again = make(tmp_path, mixture(kinds()["mix"]()), **settings)

    def forward(*args: Any, **kwargs: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    again.model.forward = functools.wraps(again.model.forward)(forward)
    with pytest.raises(ValueError, match="Set per_device_train_batch_size to 4 divided by"):
        again.train(resume_from_checkpoint=True)


def test_documents_without_a_mixture_are_described_too(tmp_path: Path) -> None:
    config: dict[str, Any] = {"mixture_weights": {"a": 1.0}, "max_steps": 2}
    documents = texts(40).to_iterable_dataset()
    trained = run(tmp_path, {"a": documents_of(documents, 8)}, stop_after=1, **config)
    with pytest.raises(ValueError, match="source 'a': sequence_length was 8 and is 16"):
        run(tmp_path, {"a": documents_of(documents, 16)}, checkpoint(trained, 1), **config)


# ---- Weights that change ----


def scheduled(shares: Any, kind: str = "random") -> list[str]:
    """The sources of a run according to the schedule."""
    schedule = SourceSchedule([(first * K, weights) for first, weights in stage_borders(shares, STEPS)], 42, kind)
    return [schedule.names[s] for s in schedule.sources(0, STEPS * K)]


@pytest.mark.parametrize(
    ("kind", "schedule"), [("mix", "random"), pytest.param("map-style", "stratified", marks=pytest.mark.slow)]
)
def test_stages_change_sources_and_decide_the_macro_loss(tmp_path: Path, kind: str, schedule: str) -> None:
    held_out = {"trainer_kwargs": {"eval_dataset": {name: table(4, 9) for name in "abc"}}}
    trainer = run(tmp_path / "whole", mixture(kinds()[kind](), STAGES), source_schedule=schedule, **held_out)
    sources = trainer.sources()
    assert sources == scheduled(stages_of(STAGES), schedule)
    assert set(sources[: STEPS * K // 2]) == {"a", "b"} and set(sources[STEPS * K // 2 :]) == {"a", "c"}
    for step in (2, 3, 4):
        resumed = run(
            tmp_path, mixture(kinds()[kind](), STAGES), checkpoint(trainer, step), source_schedule=schedule, **held_out
        )
        assert differences(resumed, trainer, step) == []
    trainer.eval_dataset = {"a": table(4, 9), "b": table(4, 100), "c": table(4, 200)}
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx((metrics["eval_a_loss"] + 3 * metrics["eval_c_loss"]) / 4)
    assert abs(metrics["eval_a_loss"] - metrics["eval_c_loss"]) > 1e-3


def test_stages_change_on_time_with_short_windows(tmp_path: Path) -> None:
    sources = {"a": table(6), "b": table(4, 100), "c": table(3, 200)}  # windows of 4 and 2 micro-batches
    trainer = run(tmp_path, mixture(sources, STAGES), save_strategy="no")
    drawn = [{source for source, _ in trainer.micro_batches[step]} for step in range(STEPS)]
    assert [len(trainer.micro_batches[step]) for step in range(STEPS)] == [4, 2] * 3
    assert all("c" not in step for step in drawn[:3]) and all("b" not in step for step in drawn[3:])
    assert "b" in set.union(*drawn) and "c" in set.union(*drawn)


def test_map_style_and_streams_have_the_same_schedule(whole: Whole) -> None:
    for schedule in ("random", "stratified"):
        expected = scheduled([Stage(1.0, WEIGHTS)], schedule)
        assert all(whole(kind, schedule).sources() == expected for kind in kinds())


def pure(step: int) -> dict[str, float]:
    return {"a": 1 + step, "b": STEPS - step, "c": 1.0}


class Wandering:
    """Weights that depend on all previous calls and on the number of trained steps."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.level = 1.0
        self.trained = 0

    def __call__(self, step: int) -> dict[str, float]:
        self.asked.append(step)
        self.level = (self.level * 3.7 + step) % 2
        return {"a": self.level, "b": 1.0, "c": self.trained / 2}

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "trained": self.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.trained = state["level"], state["trained"]


def run_with(function: Any, out: Path, resume: Any = None, kind: str = "mix", **config: Any) -> Recorder:
    trainer = make(out, mixture(kinds()[kind]()), 5 if resume else 0, {"mixture_weights_function": function}, **config)
    if isinstance(function, Wandering):
        trainer.add_callback(AtEvents(lambda event: setattr(function, "trained", function.trained + 1), "on_step_end"))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("make_function", "workers"),
    [
        (Wandering, 0),
        pytest.param(Wandering, 2, marks=pytest.mark.slow),
        pytest.param(lambda: pure, 0, marks=pytest.mark.slow),
        pytest.param(lambda: pure, 2, marks=pytest.mark.slow),
    ],
    ids=["stateful-0", "stateful-2", "pure-0", "pure-2"],
)
def test_a_weights_function_is_resumed_exactly(tmp_path: Path, make_function: Any, workers: int) -> None:
    for schedule in ("random", "stratified") if workers == 0 else ("stratified",):
        config = {"dataloader_num_workers": workers, "source_schedule": schedule}
        function = make_function()
        trainer = run_with(function, tmp_path / "whole", **config)
        assert len(set(trainer.sources())) == 3
        if function is not pure:
            assert function.asked == list(range(STEPS))  # once each
        for step in (1, 3, 4) if workers == 0 else (2,):
            resumed = run_with(make_function(), tmp_path, checkpoint(trainer, step), **config)
            assert differences(resumed, trainer, step) == [], (schedule, step)
        again = run_with(make_function(), tmp_path / "again", checkpoint(resumed, 5), **config)
        assert differences(again, trainer, 5) == []


@pytest.mark.parametrize("schedule", ["random", "stratified"])
@pytest.mark.parametrize("kind", ["map-style", "mix"])
def test_constants_are_the_same_as_fixed_weights(whole: Whole, tmp_path: Path, kind: str, schedule: str) -> None:
    trainer = run_with(lambda step: WEIGHTS, tmp_path, kind=kind, source_schedule=schedule)
    assert trainer.sources() == whole(kind, schedule).sources()
    if kind != "map-style":
        assert differences(trainer, whole(kind, schedule), 0) == []


# ---- The end of sources ----


def limited() -> Any:
    sources = {"a": sharded([4, 5], 0), "b": table(40, 100).to_iterable_dataset(2), "c": table(40, 200)}
    return mixture(sources, {"a": 3, "b": 2, "c": 1}, a=1)


@pytest.mark.parametrize("schedule", ["random", pytest.param("stratified", marks=pytest.mark.slow)])
def test_a_source_at_max_epochs_hands_over_its_weight(
    tmp_path: Path, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"source_schedule": schedule}
    trainer = run(tmp_path / "whole", limited(), **config)
    (record,) = [r for r in caplog.records if "max_epochs" in r.message]
    first = trainer._feed._progress.left_out["a"]
    assert 1 < first < STEPS - 1
    assert "'a'" in record.message and f"From step {first} on" in record.message
    expected, current = DynamicSchedule(["a", "b", "c"], 42, schedule), []
    for i in range(STEPS * K):
        current.append("abc"[expected.source(i, [1 / 2, 1 / 3, 1 / 6] if i < first * K else [0, 2 / 3, 1 / 3])])
    assert trainer.sources() == current
    read = Counter(
        tuple(row) for step in trainer.micro_batches.values() for s, rows in step if s == "a" for row in rows
    )
    assert len(read) == 9  # every row
    for step in range(1, STEPS):
        resumed = run(tmp_path, limited(), checkpoint(trainer, step), **config)
        assert differences(resumed, trainer, step) == [], step


@pytest.mark.parametrize("streams", [False, True])
def test_a_map_style_source_over_max_epochs_is_refused(tmp_path: Path, streams: bool) -> None:
    sources = {"a": table(14), "b": table(40, 100).to_iterable_dataset(2) if streams else table(40, 100)}
    with pytest.raises(ValueError, match=r"sources\.a\.max_epochs: .*at most 1 is allowed"):
        run(tmp_path, mixture(sources, {"a": 2, "b": 1}, a=1))


@pytest.mark.slow
def test_a_source_ends_for_a_loader_that_reads_ahead(tmp_path: Path) -> None:
    config = {"max_steps": 10}
    trainer = run(tmp_path / "whole", limited(), dataloader_num_workers=2, **config)
    assert trainer._feed._progress.left_out["a"] < 9
    for step, workers in ((2, 2), (2, 0), (5, 1), (7, 2)):
        resumed = run(tmp_path, limited(), checkpoint(trainer, step), dataloader_num_workers=workers, **config)
        assert differences(resumed, trainer, step) == []
    resumed = run(tmp_path / "again", limited(), checkpoint(resumed, 8), **config)
    assert differences(resumed, trainer, 8) == []


def test_more_workers_may_not_read_past_the_end_of_a_source(tmp_path: Path) -> None:
    trainer = run(tmp_path / "whole", limited())
    with pytest.raises(ValueError, match=r"may read 1 steps ahead, and now reads 4 \(lower dataloader_num_workers"):
        run(tmp_path, limited(), checkpoint(trainer, 2), dataloader_num_workers=2)
    run(tmp_path, limited(), checkpoint(trainer, 2), dataloader_num_workers=2, allow_mixture_change=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_end_of_all_sources_saves_a_checkpoint(tmp_path: Path, workers: int) -> None:
    def data(**limits: float) -> Any:
        return mixture({"a": sharded([9], 0), "b": sharded([8], 100)}, {"a": 1, "b": 1}, **limits)

    config = {"max_steps": 20, "save_strategy": "no", "dataloader_num_workers": workers}
    trainer = make(tmp_path, data(a=1, b=1), **config)
    with pytest.raises(SourceError, match=r"no data left at step (\d+).*\n.*stopped after step \d+, and a checkpoint"):
        trainer.train()
    step = trainer.state.global_step
    assert 1 < step < 10 and last_checkpoint(tmp_path) == checkpoint(trainer, step)
    assert len(trainer.micro_batches) == step
    with pytest.raises(SourceError, match="no data left"):  # nothing has changed
        run(tmp_path, data(a=1, b=1), resume=True, **config)
    step = step_of(Path(last_checkpoint(tmp_path) or ""))  # a loader that reads ahead may have held one more window
    more = run(tmp_path, data(a=1, b=90), resume=True, **config)
    assert sorted(more.micro_batches) == list(range(step, 20))
    planned = 4 if workers else 2  # steps whose sources were decided before
    assert {source for s in range(step + planned, 20) for source, _ in more.micro_batches[s]} == {"b"}


# ---- Sources that fail ----


class Broken:
    """Raises an error before a given row."""

    def __init__(self, at: int, error: Exception):
        self.at, self.error = at, error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["x"] == self.at:
            raise self.error
        return row


def mended(row: dict[str, Any]) -> dict[str, Any]:
    return row


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Skip the waits, and list the failed attempts."""
    waits: list[int] = []

    def wait(failed: int) -> float:
        waits.append(failed)
        return 0.0

    monkeypatch.setattr("hf_nexus.mixture.stream.reader.wait", wait)
    yield waits


def unsteady(function: Any) -> Any:
    return mixture({"a": sharded([9, 11, 10], 0).map(function), "b": table(9, 100)}, {"a": 1, "b": 1})


def last_row(trainer: Recorder, step: int) -> int:
    """Number of the last row of source "a" in a step."""
    first, second, *_ = [rows for source, rows in trainer.micro_batches[step] if source == "a"][-1][-1]
    return first * 16 + second


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (ValueError("bad bytes"), 0),
        (TimeoutError("slow"), 0),
        pytest.param(ValueError("bad bytes"), 2, marks=pytest.mark.slow),
    ],
    ids=["row", "network", "workers"],
)
def test_a_failing_source_leaves_a_checkpoint_to_resume(
    tmp_path: Path, error: Exception, workers: int, impatient: list[int]
) -> None:
    config = {"save_strategy": "no", "dataloader_num_workers": workers}
    expected = run(tmp_path / "whole", unsteady(mended), **config)
    broken = Broken(last_row(expected, 3), error)
    trainer = make(tmp_path, unsteady(broken), **config)
    with pytest.raises(SourceError, match=r"Source 'a' \(rank 0, pass 1, shard \d of 3, after \d+ rows") as caught:
        trainer.train()
    assert type(error).__name__ in str(caught.value) and str(error) in str(caught.value)
    step = trainer.state.global_step
    assert 1 <= step <= 3 and last_checkpoint(tmp_path) == checkpoint(trainer, step)
    assert math.isfinite(
        trainer.evaluate(table(4))["eval_loss"]
    )  # the model can be loaded, the stream cannot be resumed
    if isinstance(error, TimeoutError):
        assert impatient == [0, 1, 2, 3]
    with pytest.raises(SourceError):  # the cause remains, and the checkpoint is unchanged
        run(tmp_path, unsteady(broken), resume=True, **config)
    resumed = run(tmp_path, unsteady(mended), resume=True, **config)
    assert differences(resumed, expected, step) == []


class Unseeded(Replayed):
    """Gives its rows in another order in each process."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = list(super().__iter__())
        random.SystemRandom().shuffle(rows)
        return iter(rows)


def test_a_source_whose_workers_see_other_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Source 'a' gives other rows on each rank or worker.*without a seed"):
        run(tmp_path, {"a": Unseeded(60, 0)}, mixture_weights={"a": 1.0}, dataloader_num_workers=2)


def test_skipped_rows_are_counted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def data(on_error: str, bad: Callable[[int], bool] = lambda x: x % 5 == 2) -> Any:
        lines = [None if bad(x) else f"the quick fox number {x}" for x in range(40)]
        documents = Dataset.from_dict({"text": lines}).to_iterable_dataset(2)
        return mixture({"a": documents_of(documents, LENGTH, on_error=on_error)}, {"a": 1}, buffer_size=20)

    trainer = run(tmp_path / "whole", data("skip"))
    counts = [entry["skipped_rows/a"] for entry in trainer.state.log_history if "skipped_rows/a" in entry]
    assert counts == sorted(counts) and counts[-1] == sum(trainer._feed._progress.skipped_rows(STEPS)["a"])
    assert counts[-1] >= 4
    of_lanes = trainer._feed._progress.skipped_rows(STEPS)["a"]
    with monkeypatch.context() as patched:  # another rank may have read more of a lane, or lanes that this one has not
        patched.setattr("hf_nexus.trainer.feed.max_over_ranks", lambda tensor: tensor.clamp(min=2))
        expected = sum(max(count, 2) for count in of_lanes)
        assert trainer._feed.skipped_rows(STEPS) == {"skipped_rows/a": expected}
    resumed = run(tmp_path, data("skip"), checkpoint(trainer, 3))
    assert differences(resumed, trainer, 3) == []
    assert [e.get("skipped_rows/a") for e in resumed.state.log_history if "loss" in e][-1] == counts[-1]
    with pytest.raises(SourceError, match=r"'a': row \d*[27] of shard [01] is unusable.*on_error to 'skip'"):
        run(tmp_path / "raise", data("raise"))
    one = data("raise", lambda x: x == 35), data("skip", lambda x: x == 35)
    with pytest.raises(SourceError, match=r"on_error to 'skip'.*\n.*a checkpoint was saved"):
        run(tmp_path / "one", one[0])
    whole = run(tmp_path / "skip", one[1])
    mended = run(tmp_path / "one", one[1], True)  # as the error says
    assert mended._feed.first_step and differences(mended, whole, mended._feed.first_step) == []


# ---- From files ----


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A store in memory with prompts, conversations, and tokens that are packed or not, and a token file on disk."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    chat = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    rows = pairs(30).map(lambda row: {"messages": [chat[0] | {"content": row["text"]}, chat[1]]})
    rows.to_json("memory://bucket/rows.ndjson.gz", compression="gzip")
    table(20).to_parquet("memory://bucket/tokens/0.parquet")
    table(20, 100).to_parquet("memory://bucket/tokens/1.parquet")
    write_ds(tmp_path / "documents.ds", table(30, 50)["input_ids"][:])
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("memory://bucket", recursive=True)


def from_files(bucket: str, cache: Path, streaming: bool) -> Any:
    of_each = {
        "pairs": {"path": f"{bucket}/rows.ndjson.gz", **COMPLETIONS},
        "chats": {"path": f"{bucket}/*.gz", "messages_column": "messages", "loss_on": "assistant"},
        "tokens": {"path": f"{bucket}/tokens", "tokens_column": "input_ids"},
        "packed": {"path": f"{bucket}/tokens/*.parquet", "tokens_column": "input_ids", "packed": True},
        "indexed": {"path": f"{cache}/documents.ds", "tokens_column": "input_ids"},
    }
    sources = {name: {"weight": 1, "streaming": streaming, **keys} for name, keys in of_each.items()}
    config = {"sequence_length": LENGTH, "buffer_size": 8, "sources": sources}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKING
    return load_mixture(MixtureConfig.from_dict(config), tokenizer, cache_dir=cache)


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_files_of_all_kinds_resume_exactly(bucket: str, tmp_path: Path, streaming: bool) -> None:
    config = {"source_schedule": "stratified", "trainer_kwargs": {"processing_class": tiny_tokenizer()}}
    config["trainer_kwargs"]["processing_class"].chat_template = MARKING
    expected = run(tmp_path / "whole", from_files(bucket, tmp_path, streaming), **config)
    assert {*expected.sources()} == {"pairs", "chats", "tokens", "packed", "indexed"}
    for step in (2, 5):
        data = from_files(bucket, tmp_path, streaming)
        resumed = run(tmp_path / "resumed", data, checkpoint(expected, step), **config)
        assert differences(resumed, expected, step) == []
        for totals in ("trained_tokens", "rows", "inner_steps_skipped", "unit"):
            assert getattr(resumed.meter, totals) == getattr(expected.meter, totals)


# ---- From the Hub ----


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of tests/support/hub/stream_run.py."""
    out = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-m", "tests.support.hub.stream_run", str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "trying again in" in done.stderr
    return json.loads((out / "found.json").read_text())


@pytest.mark.slow
def test_a_stream_of_the_hub_survives_a_network_failure(from_hub: dict[str, Any]) -> None:
    assert from_hub["files"] >= 3
    assert re.search(
        r"Source 'web' .*shard \d of 3.*5 attempts to read failed, the last with \w*Error", from_hub["error"]
    )
    assert from_hub["failed"] >= 5
    assert f"stopped after step {from_hub['step']}, and a checkpoint was saved" in from_hub["error"]
    assert from_hub["step"] >= 1 and from_hub["differences"] == []
    assert from_hub["by URL"] == [60, 60, 60, 20]
