"""Documents of a source: loading them, and the text and tokens of each row."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cached_property, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.fingerprint import Hasher
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.parquet.parquet import Parquet

from ..files import printable, without_credentials
from .config import BUILTIN_PREFIX, SourceConfig
from .data_files import card_lists_files, data_files, is_saved, listed_options, means_files
from .token_files import index_of, read_token_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Document",
    "DocumentEncoder",
    "advice_on_rows",
    "check_tokenizer",
    "is_conversation",
    "load_documents",
    "rows_of",
    "split_text",
    "unmarked",
    "vocabulary_size",
]

logger = logging.getLogger(__name__)

# Characters per call of a tokenizer, which takes about 150 bytes for each. Longer texts are tokenized in segments.
SEGMENT = 1_000_000
# Values of messages that are no JSON. Arrow makes dates of texts, and it is not known how they were written.
_DATES = (date, time, timedelta)
_NOT_JSON = (*_DATES, Decimal, bytes)
# What the templates of transformers enclose the turns of the assistant in.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_UTF8 = "Convert the files to UTF-8, for instance with `iconv -f latin1 -t utf-8` (`-f utf-16` for UTF-16 of Windows)."


# ---- Loading ----


def load_documents(
    name: str,
    source: SourceConfig,
    split: str,
    cache_dir: str | None = None,
    streaming: bool = False,
    every_column: bool = False,
) -> tuple[Dataset | IterableDataset, list[str]]:
    """
    Load one split of a source, one row per document. Slices of splits work, except for folders of `save_to_disk`.

    With `streaming`, the documents are an `IterableDataset`, except for sources that are ready to read. With
    `every_column`, it does not matter which columns the source names.

    Returns:
        `tuple[Dataset | IterableDataset, list[str]]`: the documents, and the names of all columns. Of Parquet files,
        only the columns that the source names are read.

    Raises:
        ValueError: Nothing is there, it has no such split, subset or column, or it has no documents.
    """
    path, named = source.path, {} if every_column else source.columns
    available: list[str] = []
    with _naming_source(name, source, split):
        if source.revision is not None and means_files(path):
            raise ValueError(
                f"files have no revision {source.revision!r}. Remove it, or write that of a dataset on the Hub into "
                "the path: hf://datasets/org/name@revision/*.parquet."
            )
        if path.startswith(BUILTIN_PREFIX):
            documents = _load_builtin(path.removeprefix(BUILTIN_PREFIX))
        elif is_saved(path):
            documents = _load_saved(source, split)
        else:
            files: dict[str, Any] = {"path": path, "name": source.subset, "revision": source.revision}
            if means_files(path) and not card_lists_files(path):
                files = data_files(name, path, source, split, streaming)
            if "token_files" in files:
                documents = _load_tokens(files["token_files"], split)
            else:
                columns = list(named.values())
                documents, available = _load_columns(columns, source, split, streaming, cache_dir=cache_dir, **files)
        # Some streams do not know their columns before their first row.
        available = available or documents.column_names or list(next(iter(documents), {}))
        if not available or (isinstance(documents, Dataset) and not len(documents)):
            raise ValueError("it has no rows")
    if "tools" in available and (source.messages_column or source.prompt_column):
        logger.warning("sources.%s: the column 'tools' is not read: chats are rendered without their tools.", name)
    for key, column in named.items():
        if column not in available:
            raise ValueError(
                f"sources.{name}.{key}: the source has no column {column!r}. Name one of {', '.join(available)}."
            )
    return documents, available


def _load_columns(
    columns: list[str], source: SourceConfig, split: str, streaming: bool, **files: Any
) -> tuple[Dataset | IterableDataset, list[str]]:
    """Documents with these columns of Parquet files (all if none are given), and all columns, if they are known."""
    whole = partial(datasets.load_dataset, trust_remote_code=False, split=split, streaming=streaming, **files)
    if "data_files" in files and not (columns and files["path"] == "parquet"):
        return whole(), []
    try:
        builder = datasets.load_dataset_builder(**files)
    except ValueError as error:  # without a network, the rows of an earlier call may be in the cache
        for kind in ("parquet", "text", "csv", "tsv", "json"):
            with suppress(Exception):
                if kind == "parquet":
                    return whole(columns=columns), columns
                return whole(**listed_options(kind, source, columns)), []
        raise error from None  # such as one that lists the subsets
    if not isinstance(builder, Parquet):
        kind = "tsv" if isinstance(builder, Csv) and builder.config.sep == "\t" else builder.name
        return whole(**listed_options(kind, source, columns)), []
    if not columns:
        return whole(), []
    every = next(iter(builder.as_streaming_dataset().values()))
    if not set(columns) <= set(every.column_names):
        return every, every.column_names
    if not streaming:
        return whole(columns=columns), every.column_names
    builder.config.columns = columns  # a second builder would list the files of the repository again
    # By default the rows of the first row group, with an error if it has none, as in a file without rows.
    builder.config.batch_size = builder.config.batch_size or 2**31 - 1
    return builder.as_streaming_dataset(split), every.column_names


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id and 1. The length is less if ids are not used."""
    return max(tokenizer.get_vocab().values()) + 1


def rows_of(name: str, source: SourceConfig, split: str, documents: Dataset | IterableDataset) -> Iterator[dict]:
    """The rows of loaded documents. Errors of reading them name the source."""
    with _naming_source(name, source, split):
        yield from documents


@contextmanager
def _naming_source(name: str, source: SourceConfig, split: str) -> Iterator[None]:
    """Raise every error of reading a source as a `ValueError` that names the source."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        what = "it has no rows" if isinstance(error, StopIteration) else str(cause) or repr(cause)
        advice = advice_on_rows(cause) or _advice_on_path(what)
        message = f"sources.{name}: {source.path!r} (split {split!r}) could not be loaded: {what}\n{advice}"
        shown = without_credentials(message)
        # Errors before this one show the whole URL.
        raise ValueError(shown) from (error if shown == message else None)


def advice_on_rows(cause: BaseException) -> str:
    """What to do about an error of reading rows, empty if it is not known."""
    what = str(cause)
    if isinstance(cause, UnicodeError):
        return _UTF8
    if "JSON parse error" in what:
        return f"Check that the files hold JSON in UTF-8. {_UTF8}"
    if isinstance(cause, ModuleNotFoundError):
        return f"Install the package that reads this path: pip install {cause.name}"
    if what == "Compression type zstd not supported" or "zstandard" in what:
        return "Install the package that reads .zst files: pip install zstandard"
    if what.startswith("Couldn't cast") or "column names don't match" in what or "Schema at index" in what:
        return (
            "A key first occurs after the first 10 MB of JSON or first Parquet file, or files have different columns. "
            "Put a row with all keys first, or name each kind of file as a separate source, by a glob or folder."
        )
    return ""


def _advice_on_path(what: str) -> str:
    hub = "A path that does not exist here is looked up on the Hub."
    if datasets.config.HF_HUB_OFFLINE and "offline" in what.lower():
        return f"HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it, or name a copy on this machine. {hub}"
    return f"Check the path, the subset and the split. {hub}"


def _load_builtin(name: str) -> Dataset:
    from .builtin.corpus import BUILTIN_SOURCES, builtin_documents

    documents = builtin_documents(name)
    return Dataset.from_dict({"text": documents}, info=datasets.DatasetInfo(license=BUILTIN_SOURCES[name].license))


def _load_tokens(splits: Mapping[str, Any], split: str) -> Dataset:
    if split not in splits:
        raise ValueError(f"the token files have no split {split!r}, only {', '.join(splits)}.")
    files = splits[split]
    indices = [os.stat(index_of(file)).st_mtime_ns for file in files]
    return read_token_files(files, Hasher.hash([*files, *files.origin_metadata, *indices]))


def _load_saved(source: SourceConfig, split: str) -> Dataset:
    if source.subset is not None:
        raise ValueError(f"the saved folder has no subset {source.subset!r}. Remove it.")
    try:
        saved = datasets.load_from_disk(source.path).with_format(None)  # its format may turn messages into arrays
    except IndexError:  # `datasets` has written no file for it
        raise ValueError("a saved dataset or split has no rows. Save the others without it.") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"the saved folder has no split {split!r}, only {', '.join(saved)}.")
        return saved[split]
    if split != "train":
        raise ValueError("the saved folder holds one dataset without splits; remove `split` and `eval_split`.")
    return saved


# ---- Text and tokens ----


@dataclass(frozen=True)
class Document:
    """
    The text of a row, how many characters at its start are a prompt, and the messages whose turns are marked; or the
    tokens of a row.
    """

    text: str = ""
    prompt_length: int = 0
    messages: list | None = None
    tokens: np.ndarray | None = None
    chat: str = ""  # the messages as JSON, of a text that a chat template has rendered

    def __len__(self) -> int:
        return len(self.text if self.tokens is None else self.tokens)

    @property
    def hash(self) -> int:
        """A 64-bit hash of the text, tokens or messages, by which documents are held out."""
        # A chat template may write the date of today into the text.
        content = (self.chat or self.text).encode() if self.tokens is None else self.tokens.tobytes()
        return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)

    def segments(self) -> "Iterator[Document]":
        """Parts of at most `SEGMENT` characters. Messages and tokens stay whole."""
        if self.messages is not None or self.tokens is not None or len(self.text) <= SEGMENT:
            yield self
            return
        start = 0
        for text in split_text(self.text):
            yield Document(text, max(0, self.prompt_length - start))
            start += len(text)


@dataclass
class DocumentEncoder:
    """
    Turns rows of a source into documents, and documents into tokens. A token that is not trained on is stored as
    `~token`, which is negative. `available` are the columns of the source, for errors. `packed_length` is the number
    of tokens of each row of a packed source. By default, a BOS starts each document if the tokenizer adds one.
    """

    name: str
    source: SourceConfig
    tokenizer: "PreTrainedTokenizerBase"
    available: Sequence[str]
    add_bos_token: bool | None = None
    packed_length: int | None = None
    _warned: bool = field(default=False, init=False, repr=False)

    @cached_property
    def bos_token_id(self) -> int | None:
        """The token that starts each document, `None` if none does."""
        bos = self.tokenizer.bos_token_id
        add = self.tokenizer.encode("a")[:1] == [bos] if self.add_bos_token is None else self.add_bos_token
        return bos if add else None

    @cached_property
    def _vocabulary_size(self) -> int:
        return vocabulary_size(self.tokenizer)

    @cached_property
    def eos_token_id(self) -> int:
        """The token that ends each document. Asking the tokenizer takes several microseconds."""
        return self.tokenizer.eos_token_id

    @property
    def end(self) -> int | None:
        """The token that ends each document inside of packed rows, `None` if rows are not packed yet."""
        return self.eos_token_id if self.source.packed else None

    def documents(self, batch: Mapping[str, list], first_row: int) -> list[Document]:
        """
        The documents of a batch of columns. Errors count rows from `first_row`.

        Raises:
            ValueError: A value is not a string, or not a list of messages where messages are read, or not UTF-8.
        """
        columns = {key: self._values(batch, column, first_row) for key, column in self.source.columns.items()}
        pairs = self.source.prompt_column is not None
        if self.source.messages_column or (pairs and any(isinstance(v, list) for c in columns.values() for v in c)):
            documents = self._messages(columns, first_row)
        elif self.source.tokens_column:
            (rows,) = columns.values()
            documents = [Document(tokens=self._given(row, number)) for number, row in enumerate(rows, first_row)]
        else:
            self._require(columns, first_row, lambda value: isinstance(value, str), "a string")
            documents = [_join(*values) for values in zip(*columns.values(), strict=True)]
        for number, document in enumerate(documents, first_row):
            try:
                document.text.encode()
            except UnicodeEncodeError as error:  # half a surrogate pair, or bytes that are not UTF-8
                raise self._not_utf8(number) from error
        return documents

    def document(self, row: Mapping[str, Any], number: int, shard: int | None = None) -> Document | None:
        """
        The document of one row, `None` if it is unusable and skipped. The first such row is named in a warning.

        Raises:
            Exception: The row is unusable and not skipped. The type depends on the cause.
        """
        try:
            (document,) = self.documents({name: [row.get(name)] for name in self.source.columns.values()}, number)
        except Exception as error:
            if not self.source.streaming:
                raise
            if self.source.on_error != "skip":
                raise ValueError(f"{error} To skip such rows, set sources.{self.name}.on_error to 'skip'.") from error
            if not self._warned:
                of_shard = "" if shard is None else f" of shard {shard}"
                message = "Source %r: row %d%s is skipped, like further unusable rows: %s"
                logger.warning(message, self.name, number, of_shard, printable(error))
                self._warned = True
            return None
        return document

    def encode(self, documents: Sequence[Document], first: bool = True, last: bool = True) -> list[np.ndarray]:
        """
        The tokens of documents, or of their first or last segments, with the BOS and the EOS, `(n,)` int32 each. A
        document without tokens stays empty.
        """
        if self.source.tokens_column:
            encoded = [document.tokens for document in documents if document.tokens is not None]
        elif self.source.loss_on == "assistant":
            encoded = self._assistant_turns(documents)
        else:
            encoded = self._tokenize(documents)
        return [self._bounded(tokens, first, last) for tokens in encoded]

    def _assistant_turns(self, documents: Sequence[Document]) -> list[np.ndarray]:
        if not documents:  # all that were read are held out or skipped
            return []
        conversations: Any = [document.messages for document in documents]
        found: Any = self.tokenizer.apply_chat_template(conversations, return_assistant_tokens_mask=True)
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        return [np.where(mask, ids, np.invert(ids)).astype(np.int32) for ids, mask in pairs]

    def _tokenize(self, documents: Sequence[Document]) -> list[np.ndarray]:
        tokens: list[list[np.ndarray]] = [[] for _ in documents]
        for call in _calls(documents):
            for (number, _), ids in zip(call, self._tokenize_call([segment for _, segment in call]), strict=True):
                tokens[number].append(ids)
        return [np.concatenate(parts) for parts in tokens]

    def _tokenize_call(self, segments: list[Document]) -> list[np.ndarray]:
        # The lists of a call must be free before the next call, or the heap grows by 40 bytes per token.
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        if self.source.loss_on == "completion":
            options["return_offsets_mapping"] = True
        found = self.tokenizer([segment.text for segment in segments], add_special_tokens=False, **options)
        tokens = [np.array(ids, dtype=np.int32) for ids in found["input_ids"]]
        for ids, segment, offsets in zip(tokens, segments, found.get("offset_mapping", ()), strict=False):
            prompt = sum(end <= segment.prompt_length for _, end in offsets) if segment.prompt_length else 0
            ids[:prompt] = ~ids[:prompt]
        return tokens

    def _bounded(self, tokens: np.ndarray, first: bool, last: bool) -> np.ndarray:
        """Add a BOS and an EOS. A chat template may have written the BOS, and given tokens may have both."""
        if (first and last and not len(tokens)) or self.source.packed:
            return tokens
        bos, eos = self.bos_token_id, self.eos_token_id
        if first and bos is not None and unmarked(tokens[:1]).tolist() != [bos]:
            tokens = np.insert(tokens, 0, ~bos if self.source.masked else bos)
        given = self.source.loss_on == "assistant" or self.source.tokens_column
        if last and not (given and unmarked(tokens[-1:]).tolist() == [eos]):
            # The end of a turn is trained on with the turn.
            tokens = np.append(tokens, np.int32(~eos if len(tokens) and tokens[-1] < 0 else eos))
        return tokens

    def _values(self, batch: Any, column: str, first_row: int) -> list:
        try:
            return batch[column]
        except UnicodeDecodeError as error:  # `map` decodes a column of its batch on demand
            raise self._not_utf8(first_row + _first_undecodable(batch.pa_table[column])) from error

    def _not_utf8(self, row: int) -> ValueError:
        return ValueError(f"sources.{self.name}: row {row} holds text that is not UTF-8. {_UTF8}")

    def _given(self, row: Any, number: int) -> np.ndarray:
        """The tokens of a row, `(n,)` int32, checked."""
        tokens, size = np.asarray(row), self._vocabulary_size
        if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
            problem = f"holds {repr(tokens.tolist())[:80]}, not a list of token ids. Repair or remove such rows"
        elif len(tokens) and not 0 <= tokens.min() <= tokens.max() < size:
            wrong = tokens[(tokens < 0) | (tokens >= size)][0]
            problem = f"holds the token {wrong}, but the tokenizer has 0 to {size - 1}. Use the tokenizer of the rows"
        elif self.packed_length not in (None, len(tokens)):
            problem = f"has {len(tokens)} tokens, not sequence_length={self.packed_length}. Remove `packed`"
        else:
            return tokens.astype(np.int32, copy=False)
        raise ValueError(
            f"sources.{self.name}.tokens_column: row {number} {problem}, or name another column of "
            f"{', '.join(self.available)}."
        )

    def _messages(self, columns: dict[str, list], first_row: int) -> list[Document]:
        require_chat_template(self.name, self.source, self.tokenizer)
        self._require(columns, first_row, is_conversation, "a list of messages with a role and content")
        documents = []
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        for number, conversation in enumerate(zip(*columns.values(), strict=True), first_row):
            try:
                prompt, *completion = _as_json([[*map(self._readable, part)] for part in conversation])
                messages = [message for part in (prompt, *completion) for message in part]
                text, length = str(render(messages)), 0
                if self.source.loss_on == "completion":
                    start = str(render(prompt, add_generation_prompt=True))
                    length = _length_of_common_start(start, text)
                    # A template may add to a prompt before an answer, but not write the prompt in another way.
                    if length < _length_of_common_start(start, str(render(prompt))):
                        raise ValueError("it writes the prompt in another way if a completion follows")
            except Exception as error:
                raise ValueError(
                    f"sources.{self.name}: the chat template cannot render row {number}: {error}. Repair or remove "
                    "such rows, or set another tokenizer.chat_template."
                ) from error
            text = text.removesuffix(self.tokenizer.eos_token)  # packing adds it
            turns = messages if self.source.loss_on == "assistant" else None
            documents.append(Document(text, length, turns, chat=json.dumps(messages, sort_keys=True)))
        return documents

    def _readable(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message without values that are no JSON under keys that the template does not name, such as its time."""
        template = str(self.tokenizer.chat_template)
        return {key: value for key, value in message.items() if not isinstance(value, _NOT_JSON) or key in template}

    def _require(self, columns: dict[str, list], first_row: int, allowed: Callable[[Any], bool], what: str) -> None:
        for key, values in columns.items():
            for number, value in enumerate(values, first_row):
                if not allowed(value):
                    raise ValueError(
                        f"sources.{self.name}.{key}: row {number} holds {repr(value)[:80]} in the column "
                        f"{self.source.columns[key]!r}, which must hold {what}. Repair or remove such rows, or name "
                        f"another column of {', '.join(self.available)}."
                    )


def check_tokenizer(name: str, source: SourceConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise `ValueError` if the tokenizer cannot make tokens of a source."""
    if source.messages_column is not None:
        require_chat_template(name, source, tokenizer)
    if source.loss_on == "assistant" and not _MARKS.search(str(tokenizer.chat_template)):
        raise ValueError(
            f"sources.{name}.loss_on: the tokenizer's chat template does not mark what the assistant writes. Enclose "
            "it in {% generation %} and {% endgeneration %} in tokenizer.chat_template, or set loss_on to 'all'."
        )
    if source.masked and not tokenizer.is_fast:
        raise ValueError(
            f"sources.{name}.loss_on: {source.loss_on!r} needs a fast tokenizer, which knows the characters of each "
            f"token, and {type(tokenizer).__name__} is none. Use a fast tokenizer, or set loss_on to 'all'."
        )


def require_chat_template(name: str, source: SourceConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise `ValueError` if the tokenizer cannot render the messages of a source."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"sources.{name}.{next(iter(source.columns))}: messages need a chat template, and the tokenizer has none. "
            "Name a tokenizer that has one, set tokenizer.chat_template, or name a text_column."
        )


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


def _as_json(value: Any) -> Any:
    """
    The value without `None` in dicts. Arrow gives each dict the keys of all, but templates expect absent keys. It also
    makes floats of all numbers of a key if one is a float, so whole floats become integers again.

    Raises:
        ValueError: it holds a date, a decimal or bytes, for which templates have no text.
    """
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, _DATES):
        raise ValueError(
            f"it holds the date {value}, not its text. Arrow reads text of JSON lines as dates if all values of a key "
            "are dates. Save the file as Parquet with text, or the arguments of tool calls as a JSON string"
        )
    if isinstance(value, _NOT_JSON):
        raise ValueError(f"it holds {value!r}, which is not JSON. Save it as text or as a number of 64 bits")
    return [_as_json(item) for item in value] if isinstance(value, list) else value


def _first_undecodable(column: pa.ChunkedArray) -> int:
    for number, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return number
    raise AssertionError("all values can be decoded")


def _join(prompt: str, completion: str | None = None) -> Document:
    prompt = prompt.removeprefix("\ufeff")  # the byte order mark of a .txt file is no text
    if completion is None:
        return Document(prompt)
    apart = not completion or prompt[-1:].isspace() or completion[:1].isspace()
    start = prompt + ("" if apart else "\n")
    return Document(start + completion, len(start))


def _length_of_common_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def unmarked(tokens: np.ndarray) -> np.ndarray:
    """The tokens, whether they are trained on or not."""
    return np.maximum(tokens, ~tokens)


def _calls(documents: Sequence[Document]) -> Iterator[list[tuple[int, Document]]]:
    """Numbers and segments of documents, at most `SEGMENT` characters at once."""
    call: list[tuple[int, Document]] = []
    size = 0
    for number, document in enumerate(documents):
        for segment in document.segments():
            if call and size + len(segment.text) > SEGMENT:
                yield call
                call, size = [], 0
            call.append((number, segment))
            size += len(segment.text)
    if call:
        yield call


def split_text(text: str, size: int | None = None) -> Iterator[str]:
    """
    Segments of a text of at most `size` characters (`SEGMENT` by default), cut before a line end if one is near, else
    before a space.
    """
    start, size = 0, size or SEGMENT
    while len(text) - start > size:
        half, stop = start + max(size // 2, 1), start + size
        cuts = (text.rfind(sign, half, stop + 1) for sign in "\n ")
        cut = next((cut for cut in cuts if cut >= 0), stop)
        yield text[start:cut]
        start = cut
    yield text[start:]
