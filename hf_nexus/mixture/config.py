"""The configuration of a mixture: its sources and how they are packed and weighted."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..schema import documented
from ..strict import Bound, Count, Positive, Text, check_fields, read, read_yaml
from .stages import Stage, parse_stages, shares_of

__all__ = ["BUILTIN_PREFIX", "RESERVED_NAMES", "MixtureConfig", "SourceConfig", "refuse_splits"]

BUILTIN_PREFIX = "builtin/"
# Map-style sources are tokenized before the first step. Two billion tokens are about 8 GB of text and 20 GB of cache.
MAP_STYLE_LIMIT = 2_000_000_000
# Names of sources become part of the names of metrics, such as `eval_<name>_loss`.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Metrics of these names are means over sources.
RESERVED_NAMES = ("ood", "macro")
# Words in the names of splits, which may be joined: of training, held out, and beside either.
_TRAIN = "train|training|trn"
_HELD_OUT = "test|testing|tst|val|valid|validat(?:e|ion)|dev|devel|development|eval|evaluat(?:e|ion)"
_BESIDE = "sets?|data|mini|small|full|cross"
# Columns other than text, and what can be trained on alone in them.
_NOT_TEXT = {"messages_column": "assistant", "prompt_column": "completion", "completion_column": "completion"}
_NOT_TEXT |= {"tokens_column": ""}


@documented
@dataclass
class SourceConfig:
    """
    One source of a mixture, checked on creation.

    Documents are read from a text column, from chat messages (rendered with the tokenizer's chat template), from a
    prompt and its completion, or as tokens.

    Args:
        path (`str`):
            Dataset on the Hub, file (`.jsonl`, `.ndjson`, `.json`, `.parquet`, `.arrow`, `.csv`, `.tsv`, or `.txt`:
            one document; token files: `.ds`, `.bin`), glob, folder of data files, folder written by `save_to_disk`, or
            `builtin/<name>`. Files may be remote, as in `s3://bucket/data/*.parquet`.
        subset (`str`, *optional*):
            Subset (configuration) of the dataset.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset, as in [`~datasets.load_dataset`].
        revision (`str`, *optional*):
            Branch, tag or commit of a dataset on the Hub.
        sample_by (`str`, *optional*, defaults to `"document"`):
            Documents of `.txt` files: each file (`"document"`), `"paragraph"` or `"line"`, as in `datasets`.
        text_column (`str`, *optional*):
            Column with the documents. Defaults to `"text"`.
        messages_column (`str`, *optional*):
            Column with conversations, in place of `text_column`.
        prompt_column (`str`, *optional*):
            Column with prompts (strings or lists of messages), in place of `text_column`.
        completion_column (`str`, *optional*):
            Column with the completions of the prompts.
        tokens_column (`str`, *optional*):
            Column with lists of token ids of the tokenizer, in place of `text_column`.
        packed (`bool`, *optional*, defaults to `False`):
            The rows of `tokens_column` have `sequence_length` tokens each and stay as they are. A document ends at
            each EOS.
        loss_on (`str`, *optional*, defaults to `"all"`):
            Tokens that are trained and evaluated on: `"all"`, `"completion"` for a source with a prompt_column, or
            `"assistant"` for a source with a messages_column, whose chat template marks the turns of the assistant
            with `{% generation %}`.
        weight (`float`, *optional*):
            Share of the tokens that are read, relative to the other weights. Give all training sources a weight, or
            none.
        max_tokens (`int`, *optional*):
            Read whole documents, in order, up to this number of tokens. Limits tokenization, not the download.
        max_epochs (`float`, *optional*):
            Largest number of passes over the source. A streaming source that reaches it (a whole number) leaves its
            weight to the others. A source of known size that would exceed it is an error before training.
        eval_rows (`int`, *optional*):
            Number of documents to hold out, chosen by a hash of their text (of chats: their messages). Of a streaming
            source, they are the first different ones. Copies of them are not trained on.
        eval_split (`str`, *optional*):
            Split with the held-out documents, in place of `eval_rows`. For instance `"validation[:1000]"`.
        license (`str`, *optional*):
            License of the source. Defaults to that of a built-in source, or in the `info` of a folder of
            `save_to_disk`. Cards are not read.
        role (`str`, *optional*, defaults to `"train"`):
            `"train"`, or `"ood"` for a source that is only evaluated.
        tokens (`int`, *optional*):
            Known size in tokens, for plans made before any download.
        streaming (`bool`, *optional*, defaults to `False`):
            Read, tokenize and pack during training instead of before it.
        on_error (`str`, *optional*, defaults to `"raise"`):
            Handling of rows without usable text in a streaming source: `"raise"`, or `"skip"` and count them.

    Raises:
        ValueError: a value that is not allowed, or keys that contradict each other. The message starts with the key.

    Example:
        >>> from hf_nexus.mixture import SourceConfig
        >>> SourceConfig(path="data/code/*.jsonl", text_column="content", eval_rows=100).role
        'train'
    """

    path: Text
    subset: Text | None = None
    split: Text = "train"
    revision: Text | None = None
    sample_by: Literal["document", "paragraph", "line"] = "document"
    text_column: Text | None = None
    messages_column: Text | None = None
    prompt_column: Text | None = None
    completion_column: Text | None = None
    tokens_column: Text | None = None
    packed: bool = False
    loss_on: Literal["all", "completion", "assistant"] = "all"
    weight: Annotated[float, Bound(above=0, most=1e9)] | None = None
    max_tokens: Count | None = None
    max_epochs: Positive | None = None
    eval_rows: Count | None = None
    eval_split: Text | None = None
    license: Text | None = None
    role: Literal["train", "ood"] = "train"
    tokens: Count | None = None
    streaming: bool = False
    on_error: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            self.path = os.path.expanduser(re.sub("^(?:file|local)://", "", self.path))
        if self.weight == 0:
            raise ValueError("weight: 0 is not allowed. To evaluate on a source without training, set `role: ood`.")
        check_fields(self)
        self._check_columns()
        if self.eval_split is not None:
            if self.eval_rows is not None:
                raise ValueError("eval_rows: it cannot be combined with eval_split. Keep one of the two.")
            if self.eval_split == self.split:
                raise ValueError(f"eval_split: {self.eval_split!r} is the training split. Use eval_rows instead.")
        if self.streaming:
            self._check_streaming()
        elif self.on_error == "skip":
            raise ValueError("on_error: only a streaming source skips rows. Add `streaming: true`, or remove it.")
        if self.role == "ood":
            self._refuse(("weight", "max_epochs", "eval_rows", "eval_split"), "an OOD source, which is only evaluated")
        if self.path.startswith(BUILTIN_PREFIX):
            self._check_builtin()

    @property
    def masked(self) -> bool:
        """Whether some tokens are not trained on."""
        return self.loss_on != "all"

    def _check_columns(self) -> None:
        given = [key for key in ("text_column", *_NOT_TEXT) if getattr(self, key)]
        if len(given) > 1 and given != ["prompt_column", "completion_column"]:
            raise ValueError(
                f"{given[0]}: it cannot be combined with {given[1]}. Keep the one that holds the documents."
            )
        if self.packed and self.tokens_column is None:
            raise ValueError("packed: only rows of tokens can be packed. Name their tokens_column, or remove it.")
        if (self.prompt_column is None) != (self.completion_column is None):
            missing = "prompt_column" if self.prompt_column is None else "completion_column"
            raise ValueError(f"{missing}: missing. Give both prompt_column and completion_column.")
        if self.masked and all(_NOT_TEXT.get(key) != self.loss_on for key in self.columns):
            column = next(key for key, part in _NOT_TEXT.items() if part == self.loss_on)
            raise ValueError(f"loss_on: {self.loss_on!r} needs a {column}. Name it, or remove loss_on.")

    def _check_streaming(self) -> None:
        if self.role == "ood":
            raise ValueError("streaming: an OOD source is read before training. Remove it, and set max_tokens.")
        if self.max_tokens is not None:
            raise ValueError(
                "max_tokens: it does not apply to a stream, which is read only as far as training needs it. Limit "
                "training with weight and max_epochs, or remove `streaming`."
            )
        if self.max_epochs is not None and self.max_epochs != int(self.max_epochs):
            raise ValueError(
                f"max_epochs: {self.max_epochs!r} is not allowed for a streaming source, whose size is unknown. It "
                "must be a whole number."
            )
        if "[" in self.split:
            raise ValueError(
                f"split: {self.split!r} is a slice, and a stream cannot be sliced. Name a whole split, or remove "
                "`streaming`."
            )

    def _check_builtin(self) -> None:
        self._refuse(("subset", "revision", "eval_split", *_NOT_TEXT), "a built-in source (one split of plain text)")
        for key, allowed in (("split", ("train",)), ("text_column", (None, "text")), ("sample_by", ("document",))):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: it cannot be chosen for a built-in source. Remove it.")

    def _refuse(self, keys: Iterable[str], kind: str) -> None:
        for key in keys:
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: it has no meaning for {kind}. Remove it.")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by their key in the configuration."""
        if self.messages_column is not None:
            return {"messages_column": self.messages_column}
        if self.prompt_column is not None and self.completion_column is not None:
            return {"prompt_column": self.prompt_column, "completion_column": self.completion_column}
        if self.tokens_column is not None:
            return {"tokens_column": self.tokens_column}
        return {"text_column": self.text_column or "text"}

    @property
    def known_tokens(self) -> int | None:
        """The stated size, limited by `max_tokens`. `None` if neither is given."""
        return min((n for n in (self.tokens, self.max_tokens) if n is not None), default=None)


@documented
@dataclass
class MixtureConfig:
    """
    Sources of a mixture and how they are packed and weighted, checked on creation.

    Args:
        sources (`dict[str, SourceConfig]`):
            Sources by name. The names become part of the names of metrics (`loss/<name>`, `eval_<name>_loss`).
        sequence_length (`int`, *optional*, defaults to 1024):
            Tokens of each packed row, L.
        temperature (`float`, *optional*, defaults to 1.0):
            Without weights, the share of a source is proportional to `size ** (1 / temperature)`. Above 1, small
            sources are sampled more often. From 0.1 to 1e6.
        num_proc (`int`, *optional*):
            Number of processes that tokenize. Defaults to one, in which a fast tokenizer uses one thread per core.
        buffer_size (`int`, *optional*, defaults to 10000):
            Rows of a streaming source in memory, which are shuffled in blocks of half as many.
        stages (`list[Stage]`, *optional*):
            Weights that change during training, in place of the weights of the sources. Each stage ends at a fraction
            of the outer steps (`until`), and its `weights` name every training source.
        isolate_documents (`bool`, *optional*):
            Prevent attention between the documents of a row. Defaults to true if a probe shows that the model can.
        add_bos_token (`bool`, *optional*):
            Start each document with the BOS token, unless a chat template does. Defaults to what the tokenizer does.

    Raises:
        ValueError: a value that is not allowed, or keys that contradict each other. The message starts with the path
            of the key, such as `sources.code.weight`.

    Example:
        >>> from hf_nexus.mixture import MixtureConfig
        >>> config = MixtureConfig.from_dict(
        ...     {"sources": {"web": {"path": "web.jsonl"}, "code": {"path": "code.jsonl"}}, "sequence_length": 512}
        ... )
        >>> config.weights({"web": 300, "code": 100})
        {'web': 0.75, 'code': 0.25}
    """

    sources: dict[str, SourceConfig]
    sequence_length: Annotated[int, Bound(least=2, most=10**7)] = 1024
    temperature: Annotated[float, Bound(least=0.1, most=1e6)] = 1.0
    num_proc: Annotated[int, Bound(least=1, most=1000)] | None = None
    buffer_size: Annotated[int, Bound(least=2, most=10**9)] = 10_000
    stages: list[Stage] | None = None
    isolate_documents: bool | None = None
    add_bos_token: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.sources:
            raise ValueError("sources: it names none. Give one or more, as in `web: {path: web.jsonl}`.")
        for name, source in self.sources.items():
            self._check_source(name, source)
        if not self.train_sources:
            raise ValueError("sources: none of them is trained on. Add one with the role 'train' (the default).")
        advice = "Set `role: ood` for those held out, or name their split as `eval_split` of {!r}, or rename them."
        refuse_splits(self.train_sources, advice)
        self._check_weights(self.train_sources)

    def _check_source(self, name: Any, source: SourceConfig) -> None:
        key = f"sources.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{key}: a name starts with a letter or digit and holds only letters, digits, '_', '-' and '.'."
            )
        if name in RESERVED_NAMES:
            raise ValueError(f"{key}: the name {name!r} is reserved for a mean over sources. Choose another name.")
        if source.max_tokens is not None and source.max_tokens < self.sequence_length:
            raise ValueError(
                f"{key}.max_tokens: {source.max_tokens} tokens do not fill one row of "
                f"sequence_length={self.sequence_length}. Raise it, or shorten sequence_length."
            )
        if not source.streaming and (source.known_tokens or 0) > MAP_STYLE_LIMIT:
            stream = ", or `streaming: true` to tokenize during training" if source.role == "train" else ""
            raise ValueError(
                f"{key}.tokens: {source.known_tokens:,} tokens are too many to tokenize before training (at most "
                f"{MAP_STYLE_LIMIT:,} per source). Set {key}.max_tokens to {MAP_STYLE_LIMIT:,} or less{stream}."
            )

    def _check_weights(self, train: dict[str, SourceConfig]) -> None:
        unweighted = [name for name, source in train.items() if source.weight is None]
        if self.stages is not None:
            for name in train:
                if name not in unweighted:
                    raise ValueError(f"sources.{name}.weight: it has no effect with stages. Remove one of the two.")
            self.stages = parse_stages(self.stages, train)
        elif 0 < len(unweighted) < len(train):
            raise ValueError(
                f"sources.{unweighted[0]}.weight: missing, while other training sources have one. Give a weight to "
                f"all of {', '.join(train)}, or to none (then the sizes decide)."
            )
        elif unsized := [name for name in unweighted if train[name].streaming and train[name].tokens is None]:
            raise ValueError(
                f"sources.{unsized[0]}.weight: missing, and the size of a streaming source is not known. Give weights "
                f"to all training sources, or state sources.{unsized[0]}.tokens."
            )
        if self.temperature != 1 and (self.stages is not None or not unweighted):
            raise ValueError("temperature: it has no effect with explicit weights. Remove it, or the weights.")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "MixtureConfig":
        """
        Build from plain data.

        Raises:
            ValueError: an unknown key, or an error of the class.
        """
        return read(cls, mapping)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "MixtureConfig":
        """Build from a YAML file that holds the fields of the class at its top level."""
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def train_sources(self) -> dict[str, SourceConfig]:
        """The sources that are trained on."""
        return {name: source for name, source in self.sources.items() if source.role == "train"}

    @property
    def ood_sources(self) -> dict[str, SourceConfig]:
        """The sources that are only evaluated."""
        return {name: source for name, source in self.sources.items() if source.role == "ood"}

    def weights(self, sizes: Mapping[str, int | None]) -> dict[str, float]:
        """
        Shares of the training tokens, which sum to 1. With stages, those of the last stage.

        Args:
            sizes (`Mapping[str, int | None]`):
                Tokens of each training source, `None` if unknown. Not needed if weights are given.

        Raises:
            ValueError: a size that is needed is missing or not positive.
        """
        return shares_of(self.resolved_stages(sizes)[-1].weights)

    def resolved_stages(self, sizes: Mapping[str, int | None]) -> list[Stage]:
        """The stages, by default a single one. Arguments and errors are those of [`~MixtureConfig.weights`]."""
        if self.stages is not None:
            return self.stages
        raw = {}
        for name, source in self.train_sources.items():
            if source.weight is not None:
                raw[name] = float(source.weight)
            elif size := sizes.get(name):
                raw[name] = float(size) ** (1 / self.temperature)
            else:
                raise ValueError(
                    f"sources.{name}.weight: missing, and the size of the source is unknown or 0. Give weights to all "
                    f"sources, or state sources.{name}.tokens."
                )
        return [Stage(1.0, shares_of(raw))]


def refuse_splits(names: Iterable[Any], advice: str) -> None:
    """
    Raise `ValueError` if the names of training sources are those of splits, one for training and one that is held out:
    with the same other words, or none in one of the two. `dev_docs` and `train_manuals` are different sources. The
    name of the split for training is put into the `advice`.
    """
    splits = {name: _as_split(str(name)) for name in names}
    held_out = [words for kind, words in splits.values() if kind == _HELD_OUT]
    for name, (kind, words) in splits.items():
        if kind == _TRAIN and any(words == other or not words or not other for other in held_out):
            raise ValueError(
                f"sources: {', '.join(map(str, splits))} look like splits of one dataset: all would be trained on. "
                + advice.format(name)
            )


def _as_split(name: str) -> tuple[str, list[str]]:
    """The kind of split that a name is for, if any, and its other words."""
    name = re.sub("(?i)h[oe]ld[-_. ]?out", "val", re.sub("(?i)^(test|eval)s$", r"\1", name))
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    of_split = [word for word in words if re.fullmatch(f"(?:{_TRAIN}|{_HELD_OUT}|{_BESIDE})+", word)]
    kind = next((kind for kind in (_TRAIN, _HELD_OUT) if re.search(kind, " ".join(of_split))), "")
    return kind, [word for word in words if word not in of_split]
