"""Documents of a stream, tokenized and packed while training reads them."""

import logging
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from ..documents import DocumentReader, split_text
from .reader import LaneReader, SourceError

__all__ = ["DocumentPacker", "StreamedDocuments", "document_hash", "read_texts"]

logger = logging.getLogger(__name__)

# Documents that are tokenized in one call: enough to keep the threads of a tokenizer busy.
DOCUMENTS = 64
# Characters beyond which a document is tokenized a piece at a time.
PIECE = 1_000_000


@dataclass(frozen=True)
class StreamedDocuments:
    """
    A source whose documents are tokenized and packed while training reads them: laid end to end, an EOS after each,
    and cut into rows of L tokens. Documents without a token are left out.

    Args:
        documents (`IterableDataset`):
            The documents, one a row.
        reader ([`DocumentReader`]):
            Makes text of the rows, and has the tokenizer.
        sequence_length (`int`):
            Tokens per row, L.
        held_out (`frozenset[int]`, *optional*):
            Hashes of documents that are left out, as [`SourcePacker.hash_documents`] gives them.

    Example:
        >>> from datasets import load_dataset
        >>> from hf_nexus.mixture import SourceConfig
        >>> from hf_nexus.mixture.documents import DocumentReader
        >>> from hf_nexus.mixture.stream.documents import StreamedDocuments
        >>> web = load_dataset("org/web", split="train", streaming=True)  # doctest: +SKIP
        >>> reader = DocumentReader("web", SourceConfig("org/web"), tokenizer, ["text"])  # doctest: +SKIP
        >>> trainer = NexusTrainer(train_dataset={"web": StreamedDocuments(web, reader, 1024)})  # doctest: +SKIP
    """

    documents: Any
    reader: DocumentReader
    sequence_length: int
    held_out: frozenset[int] = frozenset()


class DocumentPacker:
    """
    Rows of a [`StreamedDocuments`] for one lane. It takes the place of the [`LaneReader`] that it reads from; the
    state adds the piece and the token of the document in progress, the number of rows skipped, and the tokens of this
    pass. An incomplete row needs no place in it: its tokens are those before that one.

    Args:
        source ([`StreamedDocuments`]), rows ([`LaneReader`]):
            What to tokenize, and the reader of its documents.
        state (`dict`, *optional*):
            A former [`~DocumentPacker.state`].
    """

    def __init__(self, source: StreamedDocuments, rows: LaneReader, state: dict[str, Any] | None = None):
        self.source = source
        self.rows = rows
        state = state or {"piece": 0, "token": 0, "skipped": 0, "tokens": 0}
        self._piece, self._token = state["piece"], state["token"]
        self.skipped: int = state["skipped"]
        self._tokens: int = state["tokens"]
        self._pass = rows.pass_
        self.last_pass: int | None = None
        self._warned = False
        # Documents that were read ahead: their pieces, or None for one that is skipped.
        self._documents: deque[list[str | np.ndarray] | None] = deque()

    def take(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The next `count` rows: `input_ids` and equal `labels`, both `(L,)` int64."""
        length, parts = self.source.sequence_length, []
        missing = count * length
        while missing:
            part = self._next_tokens()[:missing]
            parts.append(part)
            self._token += len(part)
            self._tokens += len(part)
            missing -= len(part)
        packed = torch.from_numpy(np.concatenate(parts)).view(count, length)
        return [{"input_ids": row, "labels": row} for row in packed]

    def error(self, problem: str) -> SourceError:
        """An error that says where the reader of the documents is."""
        return self.rows.error(problem)

    def state(self) -> dict[str, Any]:
        """Where to go on, in types that JSON has."""
        own = {"piece": self._piece, "token": self._token, "skipped": self.skipped, "tokens": self._tokens}
        return self.rows.state() | own

    def _next_tokens(self) -> np.ndarray:
        """What is left of the piece in progress, or the next piece that has tokens."""
        while True:
            if not self._documents:
                self._documents.extend(self._read())
            pieces = self._documents[0] or []
            while self._piece < len(pieces):
                tokens = self._tokenized(pieces, self._piece)
                if self._token < len(tokens):
                    return tokens[self._token :]
                self._piece, self._token = self._piece + 1, 0
            self.skipped += self._documents.popleft() is None
            self._piece = 0
            self.rows.advance(1)

    def _read(self) -> list[list[str | np.ndarray] | None]:
        rows = self.rows.ahead(DOCUMENTS)
        if self.rows.pass_ != self._pass:
            if not self._tokens:
                raise self.rows.error("a whole pass over the documents gave no token. Check its text columns.")
            self.last_pass = self._tokens // self.source.sequence_length
            self._pass, self._tokens = self.rows.pass_, 0
        texts = self._texts(rows)
        wanted = [None if text is None or self._held_out(text) else text for text in texts]
        short = {i: text for i, text in enumerate(wanted) if text is not None and len(text) <= PIECE}
        tokens = dict(zip(short, self._tokenize(list(short.values())), strict=True))
        documents: list[list[str | np.ndarray] | None] = []
        for i, text in enumerate(wanted):
            if i in tokens:
                documents.append([np.append(tokens[i], self._eos)] if len(tokens[i]) else [])
            elif text is not None:
                documents.append(list(split_text(text, PIECE)))
            else:
                documents.append(None if texts[i] is None else [])
        return documents

    @property
    def _eos(self) -> int:
        return self.source.reader.tokenizer.eos_token_id

    def _tokenized(self, pieces: list[str | np.ndarray], i: int) -> np.ndarray:
        """The tokens of a piece; those of a long document are made when it is their turn, and dropped after it."""
        piece = pieces[i]
        if isinstance(piece, str):
            tokens = self._tokenize([piece])[0]
            pieces[i] = piece = np.append(tokens, self._eos) if i == len(pieces) - 1 else tokens
            pieces[:i] = [""] * i
        return piece

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        ids = self.source.reader.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return [np.array(document, dtype=np.int64) for document in ids]

    def _held_out(self, text: str) -> bool:
        return bool(self.source.held_out) and document_hash(text) in self.source.held_out

    def _texts(self, rows: list[Any]) -> list[str | None]:
        """The text of each row, `None` for one that is skipped."""
        try:
            return list(read_texts(self.source.reader, rows, first_row=0))
        except Exception:  # one of them cannot be read: which one, and why?
            return [self._text(row, i) for i, row in enumerate(rows)]

    def _text(self, row: Any, ahead: int) -> str | None:
        number, shard = self.rows.row(ahead)
        try:
            return read_texts(self.source.reader, [row], first_row=number)[0]
        except Exception as error:
            name, skip = self.rows.lane.source, self.source.reader.source.on_error == "skip"
            problem = f"Source {name!r}: row {number}{shard} cannot be used: {error}"
            if not skip:
                raise SourceError(
                    f"{problem} To leave such rows out, set sources.{name}.on_error to 'skip'."
                ) from error
            if not self._warned:
                logger.warning("%s It is skipped, as are others like it (they are counted).", problem)
                self._warned = True
            return None


def read_texts(reader: DocumentReader, rows: list[Any], first_row: int) -> list[str]:
    """
    The text of rows, the first of which has the number `first_row`.

    Raises:
        Exception: a row that cannot be used; which kind depends on what is wrong with it.
    """
    batch = {column: [row.get(column) for row in rows] for column in reader.source.columns.values()}
    texts = reader(batch, first_row)
    for text in texts:
        text.encode()  # half a surrogate pair, say, or bytes that were no UTF-8: no tokenizer takes it
    return texts


def document_hash(text: str) -> int:
    """The number that [`SourcePacker.hash_documents`] gives for a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
