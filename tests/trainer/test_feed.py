"""`Feed` alone: the order of rows, agreement on a window, and the state in checkpoints."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_nexus import NexusConfig
from hf_nexus.mixture.stream.reader import SourceError
from hf_nexus.trainer.feed import Feed
from hf_nexus.trainer.window import Window
from tests.support.tiny import Rows

WEIGHTS = {"a": 0.5, "b": 0.5}


def make_args(tmp_path: Path, **config: Any) -> NexusConfig:
    defaults = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return NexusConfig(str(tmp_path), use_cpu=True, report_to="none", **{**defaults, **config})


def streams(rows: int = 40) -> dict[str, Any]:
    numbers = {name: range(start, start + rows) for name, start in (("a", 0), ("b", 1000))}
    return {name: Dataset.from_dict({"n": list(of)}).to_iterable_dataset(num_shards=2) for name, of in numbers.items()}


def read(feed: Feed, steps: int, first: int = 0) -> list[list[int]]:
    """The rows of each micro-batch of some outer steps, noted as by the trainer."""
    sampler = feed.sampler(feed.data.dataset, 2)
    assert sampler is not None
    feed.take_loader(0, 0)
    feed.begin(first)
    found, pairs = [], itertools.islice(iter(sampler), 4 * first, None)
    for step in range(first, first + steps):
        window = Window()
        for _ in range(2):
            rows = feed.data.dataset.__getitems__(list(itertools.islice(pairs, 2)))
            window.states += rows.tag.states
            found.append([row["n"] for row in rows])
        feed.agree(window, step)
    return found


def test_a_micro_batch_holds_rows_of_one_source(tmp_path: Path) -> None:
    feed = Feed(streams(), make_args(tmp_path, mixture_weights=WEIGHTS))
    found = read(feed, 4)
    assert len(found) == 8 and all(len({n < 1000 for n in rows}) == 1 for rows in found)
    assert len({n for rows in found for n in rows}) == 16


def test_a_saved_feed_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    args = make_args(tmp_path, mixture_weights=WEIGHTS)
    whole = read(Feed(streams(), args), 4)
    first = Feed(streams(), args)
    assert read(first, 2) == whole[:4]
    first.save(str(tmp_path), 2, 2)
    second = Feed(streams(), args)
    second.resume(str(tmp_path))
    assert read(second, 2, first=2) == whole[4:]


def test_the_order_of_map_style_sources_begins_at_the_place(tmp_path: Path) -> None:
    sources = {"a": Rows(8, 0), "b": Rows(8, 1)}
    whole, resumed = (Feed(sources, make_args(tmp_path, mixture_weights=WEIGHTS)) for _ in range(2))
    expected, sampler = (list(whole.sampler(whole.data.dataset, 2)), resumed.sampler(resumed.data.dataset, 2))
    resumed.take_loader(0, 5)  # there is no sampler before
    assert list(sampler) == expected
    resumed.follow_epochs(sampler)
    resumed.take_loader(0, 5)
    assert list(sampler) == [0] * 10 + expected[10:]


def test_other_data_than_that_of_the_checkpoint_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = make_args(tmp_path)
    Feed({"a": Rows(8, 0), "b": Rows(8, 1)}, args).save(str(tmp_path), 2, 2)
    other = {"a": Rows(8, 0), "c": Rows(8, 1)}
    with pytest.raises(ValueError, match="cannot be resumed exactly"):
        Feed(other, args).resume(str(tmp_path))
    Feed(other, make_args(tmp_path, allow_mixture_change=True)).resume(str(tmp_path))
    assert "at the same place in the schedule" in caplog.text


def test_a_source_that_cannot_be_read_ends_the_window(tmp_path: Path) -> None:
    feed = Feed(streams(), make_args(tmp_path, mixture_weights=WEIGHTS))
    feed.sampler(feed.data.dataset, 2)
    feed.take_loader(0, 0)
    with pytest.raises(SourceError, match="the disk is gone"):
        feed.agree(Window(error=SourceError("the disk is gone")), 0)


def test_changed_weights_are_followed(tmp_path: Path) -> None:
    args = make_args(tmp_path, mixture_weights=WEIGHTS)
    feed = Feed(streams(), args)
    args.mixture_weights, args.seed = {"a": 1.0, "b": 0.0}, 5
    assert all(n < 1000 for rows in read(feed, 4) for n in rows)
    assert feed.data.weights == {"a": 1.0, "b": 0.0} and feed.data.dataset.seed == 5


@pytest.mark.parametrize(
    ("k", "workers", "given", "factor"),
    [
        (8, 2, None, 4),
        (9, 2, None, 5),
        (3, 2, None, 2),
        (8, 1, None, 8),
        (8, 16, None, 2),
        (8, 2, 1, 1),
        (8, 0, None, None),
    ],
)
def test_workers_read_a_window_ahead_unless_set_otherwise(tmp_path: Path, k, workers, given, factor) -> None:
    config = {"dataloader_num_workers": workers, "dataloader_prefetch_factor": given}
    args = make_args(tmp_path, gradient_accumulation_steps=1, mixture_weights=WEIGHTS, **config)
    feed = Feed(streams(), args)
    args.gradient_accumulation_steps = k  # as in a hyperparameter search
    assert feed.prefetch_factor == factor
    assert factor is None or given or feed.prefetch_factor * workers >= k


def test_first_rows_are_of_the_evaluation_set_if_there_is_one(tmp_path: Path) -> None:
    train, held_out = {"a": Rows(8, 0), "b": Rows(8, 1)}, Rows(3, 7)
    found = Feed(train, make_args(tmp_path)).first_rows(4, {"b": held_out, "law": held_out})
    assert {name: len(rows) for name, rows in found.items()} == {"a": 4, "b": 3}
    assert found["b"][0]["input_ids"].equal(held_out[0]["input_ids"])
    assert Feed(streams(), make_args(tmp_path, mixture_weights=WEIGHTS)).first_rows(4, None) == {}
    assert Feed(Rows(8, 0), make_args(tmp_path)).first_rows(4, None) == {}


def test_a_plain_dataset_keeps_the_order_of_the_trainer(tmp_path: Path) -> None:
    feed = Feed(Rows(8, 0), make_args(tmp_path))
    assert feed.sampler(feed.data.dataset, 2) is None and not feed.data.has_sources
