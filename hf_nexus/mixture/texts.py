"""The text of sources before a tokenizer is chosen: to train one, and to find out what files hold."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from .builtin.tokenizer import CHAT_TEMPLATE, train_tokenizer
from .config import MixtureConfig, SourceConfig
from .documents import DocumentEncoder, is_conversation, load_documents, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["guess_source", "tokenizer_of_sources"]

_LEARNED_FROM = 20_000_000  # characters of a source
# The columns that are read, by what they hold. The first that fit are taken.
_COLUMNS: tuple[tuple[str, dict[str, str]], ...] = (
    ("messages", {"messages_column": "messages"}),
    ("messages", {"messages_column": "conversations"}),
    ("text", {"prompt_column": "prompt", "completion_column": "completion"}),
    ("messages", {"prompt_column": "prompt", "completion_column": "completion"}),
    ("text", {"prompt_column": "question", "completion_column": "answer"}),
    ("text", {"prompt_column": "instruction", "completion_column": "output"}),
    ("text", {"text_column": "text"}),
    ("text", {"text_column": "content"}),
)


def tokenizer_of_sources(config: MixtureConfig, vocab_size: int) -> "PreTrainedTokenizerBase":
    """
    A tokenizer trained on the training sources of a mixture, with a chat template if one of them may need it.

    Raises:
        ValueError: a source holds tokens, which belong to another tokenizer.
    """
    if tokens := [name for name, source in config.sources.items() if source.tokens_column]:
        raise ValueError(
            f"sources.{tokens[0]}.tokens_column: its tokens are not those of a tokenizer that is trained now. Name "
            "the tokenizer that made them, in place of 'train'."
        )
    sources = config.train_sources.items()
    tokenizer = train_tokenizer((text for name, source in sources for text in _texts(name, source)), vocab_size)
    if any("text_column" not in source.columns for source in config.sources.values()):
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(name: str, source: SourceConfig) -> Iterator[str]:
    """The first texts of a source, with messages as the trained tokenizer renders them."""
    blank = train_tokenizer((), 258)
    blank.chat_template = CHAT_TEMPLATE
    rows, columns = load_documents(name, source, source.split, streaming=source.streaming)
    encoder, characters = DocumentEncoder(name, source, blank, columns), 0
    for number, row in enumerate(rows_of(name, source, source.split, rows)):
        if document := encoder.document(row, number):
            yield document.text
            characters += len(document)
        if characters >= _LEARNED_FROM:
            return


def guess_source(name: str, path: str, role: str) -> SourceConfig:
    """
    The source of a path. Its columns are guessed from the first rows. Few text files are split into paragraphs or
    lines, to hold some of them out.

    Raises:
        ValueError: it cannot be read, or no column holds text, messages, or prompts with completions.
    """
    known: dict[str, Any] = {"path": path, "role": role}
    rows, builder = _first_rows(name, known)
    if builder == "text":
        for unit in ("paragraph", "line"):
            if len(rows) < 20:
                known["sample_by"] = unit
                rows, _ = _first_rows(name, known)
        return SourceConfig(**known)
    kinds = {column: _kind([row.get(column) for row in rows]) for row in rows for column in row}
    for kind, columns in _COLUMNS:
        if all(kinds.get(column) == kind for column in columns.values()):
            return SourceConfig(**known | columns)
    seen = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    raise ValueError(
        f"{path}: no column can be trained on. It has {seen}. Rename one to 'text' or 'messages', or two to 'prompt' "
        "and 'completion', or name the column in a YAML file (text_column)."
    )


def _first_rows(name: str, known: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The first rows of a source, and the builder of `datasets` that reads it."""
    source = SourceConfig(**known)
    documents, _ = load_documents(name, source, source.split, streaming=True, every_column=True)
    return list(islice(rows_of(name, source, source.split, documents), 100)), documents.info.builder_name


def _kind(values: list) -> str:
    """What a column holds: "text", "messages", or the types of its values."""
    kinds = {"text" if isinstance(v, str) else "messages" if is_conversation(v) else type(v).__name__ for v in values}
    return " or ".join(sorted(kinds))
