"""Everything that `train_dataset` may be, as the trainer reads it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .config import refuse_splits
from .indexed import MixtureDataset, holds_datasets
from .loading import Mixture
from .stages import Stage, shares_of, stages_of
from .stream.dataset import MixtureStream
from .stream.documents import StreamedDocuments

__all__ = ["TrainingData", "prepare_data", "split_sources"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """
    A training set as the trainer reads it.

    Attributes:
        dataset (`MixtureDataset`, `MixtureStream` or `Dataset`):
            A `MixtureDataset` if all sources can be indexed. A `MixtureStream` if one is a stream, or if the weights
            are decided while training. A plain dataset is kept as it is.
        stages (`list[Stage]`):
            The stages, whose weights sum to one: one stage if they are constant, none for a plain dataset.
        mixture ([`Mixture`], *optional*):
            The loaded mixture, if one was given.
    """

    dataset: Any
    stages: list[Stage] = field(default_factory=list)
    mixture: Mixture | None = None

    @property
    def has_sources(self) -> bool:
        """Whether it is a mixture of sources, not a plain dataset."""
        return bool(self.stages)

    @property
    def names(self) -> list[str]:
        """Names of the sources; one empty name for a plain dataset."""
        return self.dataset.names if self.has_sources else [""]

    @property
    def weights(self) -> dict[str, float] | None:
        """Shares of the last stage, by which losses are averaged over sources; `None` for a plain dataset."""
        return self.stages[-1].weights if self.has_sources else None

    @property
    def max_epochs(self) -> dict[str, float | None]:
        """How often each source of a mixture may be read."""
        train = {} if self.mixture is None else self.mixture.config.train_sources
        return {name: source.max_epochs for name, source in train.items()}

    def with_weights(self, weights: Any) -> "TrainingData":
        """The same data with the weights of the field `mixture_weights`; `None` for those of the mixture."""
        if not isinstance(self.dataset, MixtureDataset | MixtureStream):
            if weights is not None:
                raise ValueError(
                    "mixture_weights are set, but train_dataset is one dataset without sources. Pass a dict of "
                    "datasets, or give it a `source` column."
                )
            return self
        if weights is not None:
            given = stages_of(weights)
        elif self.mixture is not None:
            given = self.mixture.config.resolved_stages(self.mixture.tokens)
        else:
            given = [Stage(1.0, shares_of(_rows(self.dataset.sources)))]
        shares = [replace(stage, weights=shares_of(stage.weights, self.dataset.names)) for stage in given]
        return replace(self, stages=shares)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends each document; `None` if no rows were packed here."""
        if self.mixture is not None:
            return self.mixture.eos_token_id
        streamed = list(self._streamed().values())
        return streamed[0].encoder.eos_token_id if streamed else None

    @property
    def all_packed(self) -> bool:
        """Whether the rows of all sources are packed here."""
        return self.mixture is not None or len(self._streamed()) == len(self.names)

    @property
    def has_messages(self) -> bool:
        """Whether a source of a mixture holds the messages of conversations."""
        sources = {} if self.mixture is None else self.mixture.config.train_sources
        return any(source.messages_column for source in sources.values())

    @property
    def isolate_documents(self) -> bool | None:
        """The field of a mixture. Rows of other streams of documents are not isolated."""
        return False if self.mixture is None else self.mixture.config.isolate_documents

    @property
    def masked(self) -> dict[str, int]:
        """Tokens of a row of each source that is trained on a part of its tokens."""
        if self.mixture is not None:
            config = self.mixture.config
            return {n: config.sequence_length for n, s in config.train_sources.items() if s.masked}
        streamed = self._streamed().items()
        return {name: source.sequence_length for name, source in streamed if source.encoder.source.masked}

    def _streamed(self) -> dict[str, StreamedDocuments]:
        sources = self.dataset.sources if self.has_sources else {}
        return {name: source for name, source in sources.items() if isinstance(source, StreamedDocuments)}

    def indexable(self, evaluation: Any) -> dict[str, Any]:
        """By source its evaluation set, or its training rows if it has none; `None` if that is a stream."""
        sets = evaluation if isinstance(evaluation, Mapping) else {}
        found = {name: sets.get(name, rows) for name, rows in self.dataset.sources.items()} if self.has_sources else {}
        return {name: None if _is_stream(rows) else rows for name, rows in found.items()}


def prepare_data(train: Any, weights: Any, dynamic: bool, whole: bool = False) -> TrainingData:
    """
    Prepare `train_dataset` for reading.

    `weights` is the field `mixture_weights`, which takes precedence over the weights of a mixture; `dynamic` says
    whether weights are decided while training; `whole` says that the trainer samples a dict of datasets itself.

    Raises:
        ValueError: weights that name other sources, are missing for streams, or are given for a plain dataset.
    """
    mixture = train if isinstance(train, Mixture) else None
    if whole and (weights is not None or dynamic):
        raise ValueError(
            "mixture_weights are set, but this trainer samples a dict of datasets itself. Leave them out, and use its "
            "own option (multi_dataset_batch_sampler in sentence-transformers)."
        )
    sources = mixture.train if mixture is not None else None if whole else split_sources(train)
    if sources is None:
        return TrainingData(train).with_weights({} if dynamic and weights is None else weights)
    if dynamic and mixture is not None:
        _check_max_epochs(mixture)
    dataset: MixtureDataset | MixtureStream
    if dynamic or any(map(_is_stream, sources.values())):
        buffer: dict[str, Any] = {} if mixture is None else {"buffer_size": mixture.config.buffer_size}
        dataset = MixtureStream(sources, **buffer)
    else:
        dataset = MixtureDataset(sources)
    return TrainingData(dataset, mixture=mixture).with_weights(weights)


def _check_max_epochs(mixture: Mixture) -> None:
    for name, source in mixture.config.train_sources.items():
        if source.max_epochs is not None and source.max_epochs != int(source.max_epochs):
            raise ValueError(
                f"sources.{name}.max_epochs: {source.max_epochs!r} is not allowed with a mixture_weights_function, "
                "which leaves a source out after whole passes. It must be a whole number."
            )


def _is_stream(source: Any) -> bool:
    return isinstance(source, StreamedDocuments | torch.utils.data.IterableDataset)


def _rows(sources: Mapping[str, Any]) -> dict[str, float]:
    if streams := [name for name, source in sources.items() if _is_stream(source)]:
        raise ValueError(
            f"Source {streams[0]!r} is a stream, whose size is not known: set mixture_weights, a share for each of "
            f"{', '.join(sources)}."
        )
    return {name: len(source) for name, source in sources.items()}


def split_sources(train_dataset: Any) -> dict[str, Any] | None:
    """
    The sources of a training set: a dict or `DatasetDict` as it is, a `datasets.Dataset` split by its `source` column,
    `None` for anything else (one plain dataset).

    Raises:
        ValueError: a dict of splits or columns instead of sources, or a list of datasets; a `source` column with empty
        values, or with a value for almost every row.
    """
    if isinstance(train_dataset, MixtureDataset | MixtureStream):
        raise ValueError(f"train_dataset is a {type(train_dataset).__name__}. Pass the dict of its sources.")
    if isinstance(train_dataset, Mapping):
        if "input_ids" in train_dataset:
            raise ValueError(
                f"train_dataset has the keys {', '.join(map(str, train_dataset))}, which look like columns. Pass "
                "Dataset.from_dict(train_dataset), or a dict of datasets by the names of the sources."
            )
        refuse_splits(train_dataset, "Train on one split, dataset[{!r}], or give the sources other names.")
        return dict(train_dataset)
    if holds_datasets(train_dataset):
        raise ValueError("train_dataset is a list of datasets. Pass a dict of them by the names of the sources.")
    columns = getattr(train_dataset, "column_names", None)
    if not isinstance(columns, list) or "source" not in columns:
        return None
    if isinstance(train_dataset, torch.utils.data.IterableDataset):
        logger.warning("The `source` column of the stream is ignored: its micro-batches mix sources.")
        return None
    column = train_dataset.with_format(None)["source"][:]  # a transform may leave it out
    # A column of that name can hold something else, such as an address for each row.
    otherwise = "or, if it does not name sources, pass train_dataset.remove_columns('source')."
    classes = getattr(train_dataset.features["source"], "names", None)  # of a ClassLabel, where -1 is no label
    if missing := sum(value is None or (classes is not None and value == -1) for value in column):
        raise ValueError(
            f"The dataset's `source` column is empty in {missing} of {len(column)} rows: name theirs, {otherwise}"
        )
    if any(isinstance(value, list | dict) for value in column):
        raise ValueError(f"The dataset's `source` column does not hold names: write a name in each row, {otherwise}")
    labels = np.asarray(column)
    # A transform may read the column, and chooses what the rows hold.
    rows = train_dataset if train_dataset.format["type"] == "custom" else train_dataset.remove_columns("source")
    names = {label: str(label) if classes is None else classes[label] for label in dict.fromkeys(labels.tolist())}
    if len(names) > len(labels) / 2:
        raise ValueError(
            f"The dataset's `source` column holds {len(names)} different values in {len(labels)} rows: pass larger "
            f"sources, {otherwise}"
        )
    refuse_splits(names.values(), "Keep the rows of {!r} with train_dataset.filter, or rename the column's values.")
    logger.warning("The dataset's `source` column names %d sources: every micro-batch holds one of them.", len(names))
    return {name: rows.select(np.flatnonzero(labels == label)) for label, name in names.items()}
