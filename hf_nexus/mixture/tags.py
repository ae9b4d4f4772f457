"""Tags that carry the source of a micro-batch from the dataset through the collator to the trainer."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MicroBatchTag", "StreamState", "TaggedRows", "TaggingCollator", "pop_tag"]

# The key of the tag in a collated micro-batch.
_KEY = "nexus_tag"


@dataclass(frozen=True)
class StreamState:
    """
    The position in one partition of a source after a micro-batch, as JSON types. Its `"pass"` counts from 0. `mark` is
    that of [`~hf_nexus.mixture.stream.sources.Source`]. Loaders and `send_to_device` do not change it.
    """

    partition: int
    source: str
    state: dict[str, Any]
    mark: int | None = None

    def store(self, states: dict[str, Any]) -> None:
        """Replace the position of the partition in `states`, which [`~MixtureStream.begin`] takes."""
        states.setdefault(str(self.partition), {})[self.source] = self.state


@dataclass(frozen=True)
class MicroBatchTag:
    """Facts about a micro-batch that its tensors do not show: collators may pair rows or concatenate them."""

    source: str
    rows: int
    state: StreamState | None = None


class TaggedRows(list):
    """The rows of one micro-batch, all of one source, with their tag."""

    def __init__(self, rows: Any, source: str, state: StreamState | None = None):
        super().__init__(rows)
        self.tag = MicroBatchTag(source, len(self), state)


class TaggingCollator:  # a class, not a closure: data loader workers may have to pickle it
    """A collator whose micro-batches carry the tag of their rows."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, rows: TaggedRows) -> Any:
        assert isinstance(rows, TaggedRows), "a training micro-batch crosses sources"
        batch = self.collate(list(rows))
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"The collator returned a {type(batch).__name__}. A mixture needs a collator that returns a dict."
            )
        batch[_KEY] = rows.tag
        return batch


def pop_tag(batch: Any) -> MicroBatchTag | None:
    """Take the tag out of a collated micro-batch; `None` if it has none."""
    return batch.pop(_KEY, None) if isinstance(batch, MutableMapping) else None
