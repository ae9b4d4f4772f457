"""Map-style mixtures: several sources as one dataset, and the order in which their rows are read."""

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from .schedule import SourceSchedule

__all__ = ["ROWS_KEY", "SOURCE_KEY", "STATE_KEY", "MixtureDataset", "MixtureSampler", "split_sources", "tag_source"]

logger = logging.getLogger(__name__)

# Key under which a collated micro-batch names its source, between the data loader and the trainer.
SOURCE_KEY = "nexus_source"
# Key under which it says how many rows it holds, which a collator may pair or flatten.
ROWS_KEY = "nexus_rows"
# Key under which it says where the source then stands, if it is read from a `MixtureStream`.
STATE_KEY = "nexus_state"


class SourceRows(list):
    """Rows fetched together, all of `source`, and the `StreamState` after them where there is one."""

    source: str
    state: Any = None


class MixtureDataset(torch.utils.data.Dataset):
    """
    The rows of several map-style sources under one range of indices: first all of the first source, and so on.

    Args:
        sources (`Mapping[str, Dataset]`):
            Map-style datasets (with `__len__` and `__getitem__`) whose rows are mappings.

    Raises:
        ValueError: no source, an empty one, or one that is not map-style.
    """

    def __init__(self, sources: Mapping[str, Any]):
        if not sources:
            raise ValueError("The mixture has no sources. Pass a dict of at least one dataset.")
        for name, dataset in sources.items():
            if not isinstance(name, str):
                raise ValueError(f"Source names must be strings, got {name!r}.")
            if isinstance(dataset, torch.utils.data.IterableDataset) or not (
                callable(getattr(dataset, "__len__", None)) and callable(getattr(dataset, "__getitem__", None))
            ):
                raise ValueError(
                    f"Source {name!r} is a {type(dataset).__name__}, which cannot be indexed. Use a MixtureStream for "
                    "streaming sources."
                )
            if len(dataset) == 0:
                raise ValueError(f"Source {name!r} is empty. Remove it, or give it rows.")
        self.sources = dict(sources)
        self.names = list(sources)
        self.sizes = [len(dataset) for dataset in sources.values()]
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        self.sampler: MixtureSampler | None = None

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> Any:
        source = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return self.sources[self.names[source]][int(index - self.offsets[source])]

    def __getitems__(self, indices: list[int]) -> list:
        """The rows of one micro-batch; if they are all of one source, as in training, they know which."""
        source = int(np.searchsorted(self.offsets, indices[0], side="right")) - 1
        offset, end = self.offsets[source], self.offsets[source + 1]
        if not all(offset <= i < end for i in indices):
            return [self[i] for i in indices]  # evaluated in order, say
        dataset, local = self.sources[self.names[source]], [int(i - offset) for i in indices]
        fetch = getattr(dataset, "__getitems__", None)
        rows = SourceRows(fetch(local) if fetch is not None else (dataset[i] for i in local))
        rows.source = self.names[source]
        return rows

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on: Accelerate reaches the dataset, but not the sampler, once it skips batches on resume."""
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)


class MixtureSampler(torch.utils.data.Sampler[int]):
    """
    Row indices of a [`MixtureDataset`] such that each stretch of `rows` is one micro-batch of one source.

    The run is one sequence of micro-batches; epoch e is its e-th stretch of `total rows // rows` micro-batches,
    whatever the weights. Each source is read in an order drawn from (seed, source, pass), a new one for each pass over
    it, without losing or repeating a row within a pass.

    Args:
        dataset (`MixtureDataset`):
            The rows.
        schedule (`SourceSchedule`):
            Which source comes when.
        rows (`int`):
            Rows of one micro-batch over all ranks: batch size per device * number of ranks.
        seed (`int`, *optional*, defaults to 0):
            Seed of the orders.

    Raises:
        ValueError: a source of positive weight has fewer rows than one micro-batch.
    """

    def __init__(self, dataset: MixtureDataset, schedule: SourceSchedule, rows: int, seed: int = 0):
        assert schedule.names == dataset.names
        for name, size, share in zip(dataset.names, dataset.sizes, schedule.shares, strict=True):
            if share > 0 and size < rows:
                raise ValueError(
                    f"Source {name!r} has {size} rows, fewer than one micro-batch of {rows} (batch size per device "
                    "times ranks). Lower per_device_train_batch_size, or give the source more rows."
                )
        self.dataset = dataset
        self.schedule = schedule
        self.rows = rows
        self.seed = seed
        self.epoch = 0
        dataset.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Read the `epoch`-th stretch next."""
        self.epoch = epoch

    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of one epoch."""
        return len(self.dataset) // self.rows

    def __len__(self) -> int:
        return self.micro_batches_per_epoch() * self.rows

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.micro_batches_per_epoch()
        before = np.bincount(self.schedule.sources(0, start), minlength=len(self.dataset.names))
        readers = [self._read(source, int(count) * self.rows) for source, count in enumerate(before)]
        for source in self.schedule.sources(start, start + self.micro_batches_per_epoch()):
            for _ in range(self.rows):
                yield next(readers[source])

    def _read(self, source: int, skip: int) -> Iterator[int]:
        """Endless indices of one source, from its `skip`-th read on."""
        size, offset = self.dataset.sizes[source], int(self.dataset.offsets[source])
        name = zlib.crc32(self.dataset.names[source].encode())
        epoch, position = divmod(skip, size)
        while True:
            order = np.random.default_rng((self.seed, name, epoch)).permutation(size)
            yield from (order[position:] + offset).tolist()
            epoch, position = epoch + 1, 0


def tag_source(collate: Callable[[list], Any]) -> Callable[[SourceRows], Any]:
    """Wrap a collator so that the micro-batches carry their source's name, their rows and, of a stream, its state."""
    return _Tagger(collate)


class _Tagger:  # a class, not a closure: data loader workers may have to pickle it
    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, rows: SourceRows) -> Any:
        assert isinstance(rows, SourceRows), "a training micro-batch crosses sources"
        batch = self.collate(list(rows))
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"The collator returned a {type(batch).__name__}; a mixture needs one that returns a dict."
            )
        batch[SOURCE_KEY] = rows.source
        batch[ROWS_KEY] = len(rows)
        if rows.state is not None:
            batch[STATE_KEY] = rows.state
        return batch


def split_sources(train_dataset: Any) -> dict[str, Any] | None:
    """
    The sources of what was passed as `train_dataset`: a dict or `DatasetDict` as it is, a `datasets.Dataset` with a
    `source` column split by it, `None` for anything else (one plain dataset).

    Raises:
        ValueError: a dict of splits instead of sources; a `source` column with empty values, or with a value for
        almost every row.
    """
    if isinstance(train_dataset, Mapping):
        if "train" in train_dataset and {"test", "validation"} & set(train_dataset):
            raise ValueError(
                f"train_dataset has the keys {list(train_dataset)}, which look like splits: all would be trained on. "
                "Pass dataset['train'], or a dict of sources."
            )
        return dict(train_dataset)
    columns = getattr(train_dataset, "column_names", None)
    if not isinstance(columns, list) or "source" not in columns:
        return None
    if isinstance(train_dataset, torch.utils.data.IterableDataset):
        logger.warning("The stream's `source` column is not looked at: its micro-batches mix sources.")
        return None
    column = train_dataset["source"][:]
    # A column of that name need not name sources: it may hold an address for each row.
    otherwise = "or, if it does not name sources, pass train_dataset.remove_columns('source')."
    if missing := sum(value is None for value in column):
        raise ValueError(
            f"The dataset's `source` column is empty in {missing} of {len(column)} rows: name theirs, {otherwise}"
        )
    labels = np.asarray(column)
    rows = train_dataset.remove_columns("source")
    classes = getattr(train_dataset.features["source"], "names", None)  # of a ClassLabel
    names = {label: str(label) if classes is None else classes[label] for label in dict.fromkeys(labels.tolist())}
    if len(names) > len(labels) / 2:
        raise ValueError(
            f"The dataset's `source` column holds {len(names)} different values in {len(labels)} rows: pass larger "
            f"sources, {otherwise}"
        )
    logger.warning("The dataset's `source` column names %d sources: every micro-batch holds one of them.", len(names))
    return {name: rows.select(np.flatnonzero(labels == label)) for label, name in names.items()}
