"""Documents of a stream, tokenized and packed during training."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ...files import printable
from ..documents import Document, DocumentEncoder
from ..packing import pack_rows
from .lanes import Lane
from .reader import BEGINNING, Held, PartReader, RowReader, SourceError, Span
from .sources import Block

__all__ = ["PackedRowReader", "StreamedDocuments"]

# Documents that a lane reads at once at most. Those of one row are enough, and lanes are many.
DOCUMENTS = 64
# Documents or rows that a lane reads at least before it reports that none of them is of use.
PATIENCE = 64


@dataclass(frozen=True)
class StreamedDocuments:
    """
    A source whose documents are tokenized and packed during training: laid end to end, an EOS after each (and a BOS
    before each, if the tokenizer adds it), and cut into rows of L tokens. Documents without tokens, and those whose
    hash is in `held_out`, are left out.
    """

    documents: Any
    encoder: DocumentEncoder
    sequence_length: int
    held_out: frozenset[int] = frozenset()


class PackedRowReader(RowReader):
    """
    Reads the documents of a source, and returns packed rows. Each document is dealt to a lane, which packs its own.
    The documents of lanes in other processes are read if they share a part, but not tokenized.
    """

    _deals = True

    def __init__(self, packing: StreamedDocuments, *reading: Any):
        super().__init__(*reading)
        self._of_number = {
            lane.number: PackedLane(packing, self._parts[lane.part], lane, self._states.get(str(lane.number)))
            for lanes in self._of_part.values()
            for lane in lanes
        }

    def _take(self, each: int, spans: list[Span]) -> list[Any]:
        wanted = [(self._of_number[lane.number], start, end) for lane, start, end in spans]
        while lacking := [lane for lane, _, end in wanted if lane.lacks(end)]:
            _read_documents(lacking)
        rows: list[Any] = []
        for lane, start, end in wanted:
            rows += lane.take(end)[start - end :]  # other readers have taken the rows before
        for part in {lane.part for lane, _, _ in spans}:
            self._parts[part].forget(min(self._of_number[lane.number].first for lane in self._of_part[part]))
        return rows

    def _state(self, each: int, lane: Lane, end: int) -> dict[str, Any]:
        return self._of_number[lane.number].state()

    def source_rows(self) -> int | None:
        """Packed rows of the whole source, estimated once a pass has ended."""
        documents = self._rows_of_pass()
        known = [lane.rows_of(documents) for lane in self._of_number.values() if lane.known] if documents else []
        return max(known, default=None)


class PackedLane:
    """
    Packs the documents of one lane. Its state has the block of the next document, the position in it, and the number
    of rows taken. An incomplete row needs no state, because its tokens are not taken yet.
    """

    def __init__(self, packing: StreamedDocuments, part: PartReader, lane: Lane, state: dict[str, Any] | None):
        self.packing = packing
        self.part = part
        self.lane = lane
        start = dict.fromkeys(("pass", "offset", "segment", "token", "skipped", "tokens", "documents", "taken"), 0)
        state = state or {"at": BEGINNING, **start}
        self.first: int = state["at"]["first"]  # of the block, the first row that is still needed
        self._offset: int = state["offset"]  # documents of the lane in that block that were taken
        self._segment: int = state["segment"]
        self._token: int = state["token"]  # next token of that segment
        self._skipped: int = state["skipped"]  # unusable rows since the start of the run
        self._tokens: int = state["tokens"]  # tokens and documents since the start of the run
        self._read: int = state["documents"]
        self.taken: int = state["taken"]  # rows since the start of the run
        self._pass: int = state["pass"]  # of the last token
        # Documents that were read, and the pass, at the last token and at the last row.
        self._token_at = self._row_at = self._read, self._pass
        # The next documents, each with its block, as segments of text or tokens, `None` for an unusable row.
        self.documents: deque[tuple[Held, list[Document | np.ndarray] | None]] = deque()
        self._held: Held | None = None  # the block of the next document to read
        self._places = np.empty(0, dtype=np.int64)  # of its documents that are not read

    def take(self, end: int) -> list[dict[str, torch.Tensor]]:
        """The rows before number `end`: `input_ids`, `labels` and [`document_positions`], all `(L,)` int64."""
        rows: list[dict[str, torch.Tensor]] = []
        dropped = 0
        while self.taken < end:
            more = self._pack(end - self.taken)
            rows += more
            self.taken += len(more)
            dropped = 0 if more else dropped + 1
            if more:
                self._row_at = self._read, self._pass
            elif dropped > PATIENCE and self._a_pass_since(*self._row_at, self._pass):
                loss_on = self.packing.encoder.source.loss_on
                raise self.part.error(
                    f"no row of a whole pass has a token to train on (loss_on={loss_on!r}). Raise sequence_length, or "
                    "check the columns."
                )
        return rows

    def _a_pass_since(self, documents: int, pass_: int, now: int) -> bool:
        """Whether the lane has read many documents since some number, and a whole pass between two passes."""
        return self._read - documents > PATIENCE and now > pass_ + 1

    def _pack(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Read the next `count` rows, and return those with a token to train on."""
        tokens, length = np.empty((count, self.packing.sequence_length), dtype=np.int64), 0
        starts = np.zeros(tokens.size + 1, dtype=bool)
        while length < tokens.size:
            more = self._next_tokens()[: tokens.size - length]
            tokens.reshape(-1)[length : length + len(more)] = more
            length += len(more)
            self._token += len(more)
            self._tokens += len(more)
            self._pass = self.documents[0][0].passes
            self._token_at = self._read, self._pass
            if self._document_ended:
                starts[length] = True
                self._next_document()
        columns = pack_rows(tokens, starts[:-1].reshape(tokens.shape), self.packing.encoder.end).items()
        tensors = {name: torch.from_numpy(values) for name, values in columns}
        return [{name: values[i] for name, values in tensors.items()} for i in range(len(tensors["labels"]))]

    @property
    def _document_ended(self) -> bool:
        """Whether all tokens of the current document are taken."""
        segments = self.documents[0][1] or []
        ends = self._segment == len(segments) - 1
        return ends and isinstance(segments[-1], np.ndarray) and self._token == len(segments[-1])

    def state(self) -> dict[str, Any]:
        """The position as JSON types."""
        return {
            "pass": self._pass,
            "at": self.part.position(self.first),
            "offset": self._offset,
            "segment": self._segment,
            "token": self._token,
            "skipped": self._skipped,
            "tokens": self._tokens,
            "documents": self._read,
            "taken": self.taken,
        }

    @property
    def known(self) -> bool:
        """Whether the lane has read enough to tell the length of documents."""
        return self._read >= PATIENCE

    def rows_of(self, documents: int) -> int:
        """The number of rows that documents give, estimated from those of this lane."""
        return documents * self._tokens // max(1, self._read) // self.packing.sequence_length

    def lacks(self, end: int) -> bool:
        """Whether more documents have to be read for the rows before number `end`."""
        missing = (end - self.taken) * self.packing.sequence_length + self._token
        for _, segments in self.documents:
            for segment in segments or ():
                if isinstance(segment, Document):  # a long text suffices
                    return False
                missing -= len(segment)
        return missing > 0 and len(self.documents) < DOCUMENTS

    def _next_tokens(self) -> np.ndarray:
        """The rest of the current segment, or the next segment that has tokens."""
        while True:
            if not self.documents:
                _read_documents([self])
            held, segments = self.documents[0][0], self.documents[0][1] or []
            if held.first != self.first:
                self.first, self._offset = held.first, 0
            while self._segment < len(segments):
                tokens = self._tokens_of(segments, self._segment)
                if self._token < len(tokens):
                    return tokens[self._token :]
                self._segment, self._token = self._segment + 1, 0
            self._next_document()
            if self._a_pass_since(*self._token_at, held.passes):
                raise self.part.error("a whole pass gave no token. Check the columns, and that not all is held out.")

    def _next_document(self) -> None:
        self._skipped += self.documents.popleft()[1] is None
        self._segment = self._token = 0
        self._offset += 1
        self._read += 1

    def to_read(self) -> tuple[Held, np.ndarray]:
        """The places in a block of the next documents to read, about those of a row."""
        while self._held is None or not len(self._places):
            first, offset = (self.first, self._offset) if self._held is None else (self._held.end, 0)
            self._held = held = self.part.holding(first)
            self._places = held.dealt(self.lane)
            if offset > len(self._places):
                raise self.part.error(
                    f"training resumes at document {offset} of a block, which now has only {len(self._places)} for "
                    "this lane. Restore the data of the checkpoint.",
                    held.at,
                )
            self._places = self._places[offset:]
        of_a_row = min(DOCUMENTS, 1 + self.packing.sequence_length * self._read // max(1, self._tokens))
        places, self._places = self._places[:of_a_row], self._places[of_a_row:]
        return self._held, places

    def segments(self, row: Any, block: Block, place: int) -> list[Document | np.ndarray] | None:
        """The document of a row, which has none if it is held out; `None` if it is skipped."""
        number, held_out = block.first_row + int(block.order[place]), self.packing.held_out
        try:
            document = self.packing.encoder.document(row, number, block.shard)
        except Exception as error:
            name, shard = self.part.partition.source, "" if block.shard is None else f" of shard {block.shard}"
            raise SourceError(f"Source {name!r}: row {number}{shard} is unusable: {printable(error)}") from error
        if document is None:
            return None
        return [] if held_out and document.hash in held_out else [*document.segments()]

    def _tokens_of(self, segments: list[Document | np.ndarray], i: int) -> np.ndarray:
        """The tokens of a segment. Long documents keep the tokens of only one segment in memory."""
        segment = segments[i]
        if isinstance(segment, Document):
            (segment,) = self.packing.encoder.encode([segment], first=i == 0, last=i == len(segments) - 1)
            segments[i] = segment
            segments[:i] = [Document("")] * i
        return segment


def _read_documents(lanes: Sequence[PackedLane]) -> None:
    """Read the next documents of some lanes, with one read of each block and one call of the tokenizer."""
    found: list[tuple[PackedLane, Held, Any]] = []
    to_read = [(lane, *lane.to_read()) for lane in lanes]
    for (part, _), group in groupby(to_read, key=lambda of: (of[0].part, of[1].first)):
        members = list(group)
        held = members[0][1]
        rows = iter(part.fetch(held, np.concatenate([places for *_, places in members])))
        for lane, _, places in members:
            for place in places:
                found.append((lane, held, lane.segments(next(rows), held.block, place)))
    short = [segments for *_, segments in found if segments is not None and len(segments) == 1]
    tokens = lanes[0].packing.encoder.encode([segment for (segment,) in short])
    for segments, of_document in zip(short, tokens, strict=True):
        segments[0] = of_document
    for lane, held, segments in found:
        lane.documents.append((held, segments))
