"""Tags that carry the sources of a micro-batch from the dataset through the collator to the trainer."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MicroBatchTag", "StreamState", "TaggedRows", "TaggingCollator", "pop_tag", "tag_of", "take_rows"]

# The key of the tag in a collated micro-batch.
_KEY = "nexus_tag"


@dataclass(frozen=True)
class StreamState:
    """
    The positions in a source after its micro-batch number `ordinal`: the state of each lane that gave rows, by its
    number as a string, as JSON types. The `"pass"` of a state counts from 0. `mark` is that of
    [`~hf_nexus.mixture.stream.sources.Source`]. Loaders and `send_to_device` do not change it.
    """

    source: str
    ordinal: int
    lanes: dict[str, Any]
    mark: int | None = None

    def store(self, states: dict[str, Any]) -> None:
        """Replace the positions of the lanes in `states`, which [`~MixtureStream.begin`] takes."""
        states.setdefault(self.source, {}).update(self.lanes)


@dataclass(frozen=True)
class MicroBatchTag:
    """
    Facts about a micro-batch that its tensors do not show: collators may pair rows or concatenate them. `take_rows`
    makes it, and [`pop_tag`] removes it before the model sees the batch.
    """

    rows: Mapping[str, int]  # by source
    states: tuple[StreamState, ...] = ()  # of streams, by source


class TaggedRows(list):
    """The rows of one micro-batch with their tag."""

    def __init__(self, rows: Iterable[Any], tag: MicroBatchTag):
        super().__init__(rows)
        self.tag = tag


def take_rows(
    sources: Sequence[str], take: Callable[[str, list[int]], Iterable[Any]], states: Sequence[StreamState] = ()
) -> TaggedRows:
    """
    A micro-batch with a row of each of `sources`, (B,). `take` gets a source and the positions of its rows, and
    returns these rows. It may append to `states`.
    """
    positions: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        positions.setdefault(source, []).append(i)
    rows: list[Any] = [None] * len(sources)
    for source, where in positions.items():
        for i, row in zip(where, take(source, where), strict=True):
            rows[i] = row
    counts = {source: len(where) for source, where in positions.items()}
    return TaggedRows(rows, MicroBatchTag(counts, tuple(states)))


class TaggingCollator:  # a class, not a closure: data loader workers may have to pickle it
    """A collator whose micro-batches carry the tag of their rows."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, rows: TaggedRows) -> Any:
        assert isinstance(rows, TaggedRows), "a training micro-batch has no tag"
        batch = self.collate(list(rows))
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"The collator returned a {type(batch).__name__}. A mixture needs a collator that returns a dict."
            )
        batch[_KEY] = rows.tag
        return batch


def tag_of(batch: Any) -> MicroBatchTag | None:
    """The tag of a collated micro-batch; `None` if it has none."""
    return batch.get(_KEY) if isinstance(batch, MutableMapping) else None


def pop_tag(batch: Any) -> MicroBatchTag | None:
    """Take the tag out of a collated micro-batch; `None` if it has none."""
    return batch.pop(_KEY, None) if isinstance(batch, MutableMapping) else None
