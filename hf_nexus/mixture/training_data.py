"""What may be given as `train_dataset`, and what the trainer makes of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from .indexed import MixtureDataset
from .loading import Mixture
from .schedule import normalized
from .stages import stage_borders, weight_stages
from .stream.dataset import MixtureStream
from .stream.documents import StreamedDocuments

__all__ = ["StageWeights", "TrainingData", "check_loader_settings", "prepare_data", "split_sources"]

logger = logging.getLogger(__name__)

Stages = list[tuple[float, dict[str, float]]]


@dataclass
class TrainingData:
    """
    A training set as the trainer reads it.

    Attributes:
        dataset (`MixtureDataset`, `MixtureStream` or `Dataset`):
            The first where all sources can be indexed, the second where one is streaming or the weights are decided
            while training; a plain dataset as it was given.
        names (`list[str]`):
            The sources; one without a name for a plain dataset.
        stages (`list[tuple[float, dict[str, float]]]`):
            `(until, shares)` of each stage, one without stages; none for a plain dataset.
        evaluation (`Dataset` or `dict[str, Dataset]`, *optional*):
            The evaluation sets.
        max_epochs (`dict[str, float | None]`):
            How often each source may be read.
        mixture ([`Mixture`], *optional*):
            What was given, if it was one.
    """

    dataset: Any
    names: list[str] = field(default_factory=lambda: [""])
    stages: Stages = field(default_factory=list)
    evaluation: Any = None
    max_epochs: dict[str, float | None] = field(default_factory=dict)
    mixture: Mixture | None = None

    @property
    def weights(self) -> dict[str, float] | None:
        """Shares of the last stage, by which losses are averaged over sources; `None` for a plain dataset."""
        return self.stages[-1][1] if self.stages else None

    def streams_without(self, evaluation: Any) -> list[str]:
        """Streaming sources that have no evaluation set of their name."""
        sets = evaluation if isinstance(evaluation, Mapping) else {}
        sources = self.dataset.sources if self.stages else {}
        return [name for name, source in sources.items() if _is_stream(source) and name not in sets]


class StageWeights:
    """
    The weights of stages as a function of the outer step.

    Args:
        stages (`list[tuple[float, dict[str, float]]]`), max_steps (`int`):
            As for [`stage_borders`].
    """

    def __init__(self, stages: Stages, max_steps: int):
        self.borders = stage_borders(stages, max_steps, 1)

    def __call__(self, step: int) -> dict[str, float]:
        return next(weights for first, weights in reversed(self.borders) if first <= step)


def prepare_data(train: Any, evaluation: Any, args: Any, dynamic: bool, seed: int) -> TrainingData:
    """
    Make a training set of what was passed as `train_dataset`.

    Args:
        train (`Mixture`, `Mapping[str, Dataset]` or `Dataset`), evaluation:
            As given to the trainer.
        args ([`NexusConfig`]):
            Its `mixture_weights` go before those of a mixture.
        dynamic (`bool`):
            Whether weights are decided while training.
        seed (`int`):
            Of the order of rows.

    Raises:
        ValueError: weights that name other sources, are missing for streams, or make no sense for a plain dataset.
    """
    mixture = train if isinstance(train, Mixture) else None
    given = args.mixture_weights
    if mixture is not None:
        evaluation = mixture.eval if evaluation is None else evaluation
        train = mixture.train
        if given is None:
            sizes = {name: count for name, count in mixture.tokens.items() if count is not None}
            given = mixture.config.stage_weights(sizes)
    sources = split_sources(train)
    if sources is None:
        if given is not None or dynamic:
            raise ValueError(
                "mixture_weights are set, but train_dataset is one dataset without sources. Pass a dict of datasets, "
                "or give it a `source` column."
            )
        return TrainingData(train, evaluation=evaluation)
    dataset: MixtureDataset | MixtureStream
    if dynamic or any(map(_is_stream, sources.values())):
        dataset = MixtureStream(sources, seed=seed, **({} if mixture is None else _reading(mixture)))
    else:
        dataset = MixtureDataset(sources)
    stages = _stages(given, sources, mixture is not None and args.mixture_weights is None)
    limits = {} if mixture is None else {name: s.max_epochs for name, s in mixture.config.train_sources.items()}
    return TrainingData(dataset, dataset.names, stages, evaluation, limits, mixture)


def _reading(mixture: Mixture) -> dict[str, Any]:
    return {"buffer_size": mixture.config.buffer_size}


def _is_stream(source: Any) -> bool:
    return isinstance(source, StreamedDocuments | torch.utils.data.IterableDataset)


def _stages(given: Any, sources: Mapping[str, Any], parsed: bool) -> Stages:
    """`(until, shares)` of each stage: what was asked for, or one that is proportional to rows."""
    if given is None:
        if streams := [name for name, source in sources.items() if _is_stream(source)]:
            raise ValueError(
                f"Source {streams[0]!r} is a stream, whose size is not known: set mixture_weights, a share for each "
                f"of {', '.join(sources)}."
            )
        given = {name: len(source) for name, source in sources.items()}
    stages = given if parsed else weight_stages(given)
    for _, weights in stages:
        if set(weights) != set(sources):
            raise ValueError(
                f"mixture_weights name {sorted(weights)}, but the sources are {sorted(sources)}. Give each source a "
                "weight; 0 leaves it out."
            )
    names = list(sources)
    return [(until, dict(zip(names, normalized(w, names).tolist(), strict=True))) for until, w in stages]


def check_loader_settings(args: TrainingArguments, dataset: Any) -> None:
    """
    Refuse settings under which micro-batches would mix sources, or could not be resumed.

    Raises:
        ValueError: names the setting and the way out.
    """
    config: Any = args.accelerator_config
    for name, value in (("dispatch_batches", config.dispatch_batches), ("split_batches", config.split_batches)):
        if value:
            raise ValueError(
                f"accelerator_config.{name}=True would mix sources inside a micro-batch. Leave it out for a mixture, "
                "or pass one plain dataset."
            )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not possible for a mixture, whose order is "
            "set by source_schedule. Leave it at 'random', or pass one plain dataset."
        )
    if isinstance(dataset, MixtureStream):
        if args.max_steps <= 0:
            raise ValueError(
                "max_steps is needed: a mixture with streaming sources, or with weights decided while training, has "
                "no end of its own."
            )
        if not args.dataloader_in_order:
            raise ValueError("dataloader_in_order=False is not possible for streaming sources: leave it at True.")
        if args.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip=True is not possible for streaming sources, and not needed: they go on from where "
                "they were without reading anything again. Leave it out."
            )


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
