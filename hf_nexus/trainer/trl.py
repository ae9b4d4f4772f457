"""
Sources for trainers of TRL.

These trainers tokenize and pack one dataset in their constructor. Here each source is prepared separately, and packing
never crosses sources.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..mixture.training_data import TrainingData
from .arguments import changed
from .feed import Feed

__all__ = ["SourcePreparation", "for_parent", "is_of_trl", "metrics_aside", "naming_a_missing_template", "trl_parent"]

logger = logging.get_logger(__name__)

# Columns that identify the format of examples in TRL.
_FORMATS = ("messages", "prompt", "completion", "chosen", "rejected", "images", "image")
# Where trainers of TRL collect, in `compute_loss`, what they add to the next log line.
_COLLECTED = ("_metrics", "_stored_metrics")


def trl_parent(cls: type) -> type | None:
    """The class of TRL that a trainer extends, which says what its arguments are; `None` if it extends none."""
    of_trl = (c for c in cls.__mro__ if issubclass(c, Trainer) and c.__module__.startswith("trl."))
    return next((c for c in of_trl if "args" in c.__init__.__annotations__), None)


def is_of_trl(args: Any) -> bool:
    """Whether training arguments are of one of TRL's classes."""
    return any(c.__module__.startswith("trl.") for c in type(args).__mro__)


def for_parent(args: Any) -> Any:
    """Arguments as a trainer of TRL takes them: others than TRL's without the Nexus fields, which it does not know."""
    if is_of_trl(args):
        return args
    plain = copy.copy(args)
    plain.__class__, plain.bf16 = TrainingArguments, bool(plain.bf16)
    return plain


def metrics_aside(trainer: Any) -> AbstractContextManager[None]:
    """Keep what a trainer of TRL has collected for its next log line aside inside the context, and begin with none."""
    return changed(trainer, **{n: defaultdict(lambda: defaultdict(list)) for n in _COLLECTED if n in vars(trainer)})


class SourcePreparation:
    """
    Passes the first source to a trainer of TRL (`parent`), and prepares all sources when TRL prepares the first.

    Raises:
        ValueError: a `Mixture`, sources of several formats, a trainer that prepares one dataset only, or nothing is
            left of a source.
    """

    def __init__(self, feed: Feed, parent: type | None):
        self._feed = feed
        self.shown: Any = None  # the `train_dataset` for TRL; None for a plain dataset and without TRL
        if parent is not None and feed.data.has_sources:
            if "_prepare_dataset" not in dir(parent):  # its constructor prepares the dataset
                raise ValueError(
                    f"{parent.__name__} prepares one dataset, but got {', '.join(feed.data.names)}. Pass one plain "
                    "dataset, such as datasets.concatenate_datasets(list(sources.values()))."
                )
            _check_formats(feed.data)
            # A copy, which TRL does not mistake for an evaluation set.
            self.shown = copy.copy(feed.data.dataset.sources[feed.data.names[0]])

    def prepare(self, prepare: Callable[..., Any], dataset: Any, *others: Any) -> Any:
        """TRL's `_prepare_dataset`. A warning counts what it leaves out, unless packing made fewer rows of them."""
        args, packed, name = others[1], others[2] is True, others[-1]

        def complete(what: str, given: Any) -> Any:
            prepared = prepare(given, *others)
            if isinstance(given, Sized) and not packed and len(prepared) < len(given):
                message = (
                    f"{what}: {len(given) - len(prepared)} of {len(given)} examples are left out, for example because "
                    f"their prompts fill max_length={args.max_length}. Raise max_length, or shorten them."
                )
                if not len(prepared):
                    raise ValueError(message)
                logger.warning(message)
            return prepared

        return self.apply(dataset, complete, name)

    def apply(self, dataset: Any, step: Callable[[str, Any], Any], name: str) -> Any:
        """A step on a dataset of TRL with a name, or on each source if the dataset stands for all of them."""
        data = self._feed.data
        if self.shown is None or not (dataset is self.shown or dataset is data.dataset):
            return step(f"Dataset {name!r}", dataset)
        sources = {name: step(f"Source {name!r}", source) for name, source in data.dataset.sources.items()}
        self._feed.set_data(sources)
        return self._feed.data.dataset


@contextmanager
def naming_a_missing_template() -> Iterator[None]:
    """Say in place of the error of transformers what to do if a tokenizer has no chat template."""
    try:
        yield
    except ValueError as error:
        if "tokenizer.chat_template is not set" not in str(error):
            raise
        raise ValueError(
            "The examples are conversations, and the tokenizer has no chat template. Set "
            "processing_class.chat_template (SFTConfig also takes chat_template_path), or pass examples of text."
        ) from error


def _check_formats(data: TrainingData) -> None:
    if data.mixture is not None:
        raise ValueError(
            "A Mixture is tokenized and packed already. Pass a dict of datasets of text, prompts or messages, or "
            "train on the mixture with NexusTrainer."
        )
    formats = {name: {c for c in _FORMATS if c in _columns(source)} for name, source in data.dataset.sources.items()}
    first = data.names[0]
    for name, columns in formats.items():
        if columns != formats[first]:  # TRL chooses the loss by the first source
            raise ValueError(
                f"Source {name!r} has the columns {sorted(columns)}, but {first!r} has {sorted(formats[first])}. All "
                "sources need examples of one format: convert them, to messages for example."
            )


def _columns(source: Any) -> list[str] | Mapping:
    names = getattr(source, "column_names", None)
    return names if names is not None else next(iter(source))
