"""The text of sources before a tokenizer is chosen: to train one, and to find out what files hold."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from .builtin.tokenizer import CHAT_TEMPLATE, train_tokenizer
from .config import MixtureConfig, SourceConfig
from .documents import DocumentEncoder, is_conversation, load_documents, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["guess_columns", "guess_source", "tokenizer_of_sources"]

logger = logging.getLogger(__name__)

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


def guess_source(name: str, path: str, role: Literal["train", "ood"] = "train") -> SourceConfig:
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
    return SourceConfig(**known, **guess_columns(path, rows))


def guess_columns(path: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """
    The columns of a source that are read, from its first rows: those with known names, or the only one with text of
    several words. A warning names text next to prompts and completions.

    Raises:
        ValueError: no column holds text, messages, or prompts with completions, or one of them is null in a row.
    """
    if not rows:
        raise ValueError(f"{path}: it has no rows.")
    kinds = {column: {_kind(row.get(column)) for row in rows} for row in rows for column in row}
    # Not the numbers of a CSV file.
    texts = [name for name, found in kinds.items() if found == {"text"} and any(" " in row[name] for row in rows)]
    for allowed in (set(), {"NoneType"}):
        for kind, columns in _COLUMNS:
            if any(kinds.get(column, set()) - allowed != {kind} for column in columns.values()):
                continue
            _check_rows(path, rows, columns)
            others = [name for name in texts if name not in columns.values()]
            if "prompt_column" in columns and others:
                message = "%s: %s are read, and the text in %s is not. Join what belongs to a prompt into one column."
                logger.warning(message, path, " and ".join(columns.values()), ", ".join(others))
            return columns
    if len(texts) == 1 and set().union(*kinds.values()) <= {"text", "int", "float", "bool", "NoneType"}:
        return {"text_column": texts[0]}
    seen = ", ".join(f"{column} ({' or '.join(sorted(found))})" for column, found in kinds.items())
    raise ValueError(f"{path}: no column can be trained on. It has {seen}. {_advice(rows[0])}")


def _check_rows(path: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Refuse rows that lack a column."""
    for column in columns.values():
        for number, row in enumerate(rows):
            if row.get(column) is None:
                raise ValueError(
                    f"{path}: row {number} has no {column!r}, or null. Repair or remove such rows, or write a YAML "
                    "file with `streaming: true` and `on_error: skip`."
                )


def _advice(row: dict[str, Any]) -> str:
    """How to make a source readable."""
    for column, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            keys = f"The items of {column!r} have the keys {', '.join(value[0])}"
            return f"{keys}. Rename those of messages to role and content, or save items that are rows as JSON lines."
        if isinstance(value, list) and value and isinstance(value[0], int):
            return (
                f"If {column!r} holds tokens, name it in a YAML file (`tokens_column: {column}`), and the tokenizer "
                "that made them (`tokenizer` of the model)."
            )
    return (
        "Rename one to 'text' or 'messages', or two to 'prompt' and 'completion', or name the column in a YAML file "
        "(text_column)."
    )


def _first_rows(name: str, known: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The first rows of a source, and the builder of `datasets` that reads it."""
    source = SourceConfig(**known)
    documents, _ = load_documents(name, source, source.split, streaming=True, every_column=True)
    for column, feature in (documents.features or {}).items():
        if getattr(feature, "decode", False):  # audio and video need packages that text does not
            documents = documents.cast_column(column, replace(feature, decode=False))
    return list(islice(rows_of(name, source, source.split, documents), 100)), documents.info.builder_name


def _kind(value: Any) -> str:
    """What a value of a column is: "text", "messages", or its type."""
    return "text" if isinstance(value, str) else "messages" if is_conversation(value) else type(value).__name__
