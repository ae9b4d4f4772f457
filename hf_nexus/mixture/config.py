"""What a mixture is made of: its sources and how they are packed and weighted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .strict import NOT_TEXT, check_source, columns_error, known_keys, parse_yaml, require_count, require_positive

__all__ = ["MixtureConfig", "SourceConfig"]


@dataclass
class SourceConfig:
    """
    One source of a mixture.

    Documents are read from a text column, from chat messages (rendered with the tokenizer's chat template), or from a
    prompt and its completion; all of their tokens are trained on.

    Args:
        path (`str`):
            A dataset on the Hub, a local file (`.jsonl`, `.json`, `.parquet`, `.csv`, or `.txt`: one document), a
            glob, a folder of data files or one written by `save_to_disk`, or `builtin/<name>`.
        subset (`str`, *optional*), split (`str`, *optional*, defaults to `"train"`), revision (`str`, *optional*):
            As in [`~datasets.load_dataset`].
        text_column (`str`, *optional*, defaults to `"text"`):
            Column with the documents.
        messages_column (`str`, *optional*):
            Column with conversations, in place of `text_column`.
        prompt_column (`str`, *optional*), completion_column (`str`, *optional*):
            Columns whose strings, or lists of messages, are put one after the other, in place of `text_column`.
        weight (`float`, *optional*):
            Share of the training tokens, relative to the other weights. All training sources have one, or none.
        max_tokens (`int`, *optional*):
            Read whole documents, in order, up to this number of tokens. It bounds what is tokenized, not what is
            downloaded.
        max_epochs (`float`, *optional*):
            Largest number of times that the source may be repeated.
        eval_rows (`int`, *optional*):
            Number of documents to hold out, chosen by a hash of their text. Copies of them are not trained on either.
        eval_split (`str`, *optional*):
            Split to take the held-out documents from instead, for instance `"validation[:1000]"`.
        license (`str`, *optional*):
            Licence of the source; by default what the data itself states.
        role (`str`, *optional*, defaults to `"train"`):
            `"train"`, or `"ood"` for a source that is only evaluated.
        tokens (`int`, *optional*):
            Known size in tokens, for plans made before anything is downloaded.

    Example:
        >>> from hf_nexus.mixture import SourceConfig
        >>> SourceConfig(path="data/code/*.jsonl", text_column="content", eval_rows=100).role
        'train'
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    messages_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    weight: float | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    eval_rows: int | None = None
    eval_split: str | None = None
    license: str | None = None
    role: str = "train"
    tokens: int | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Key of the configuration to the column it names, for the columns that are read."""
        if self.messages_column is not None:
            return {"messages_column": self.messages_column}
        if self.prompt_column is not None and self.completion_column is not None:
            return {"prompt_column": self.prompt_column, "completion_column": self.completion_column}
        return {"text_column": self.text_column}

    @property
    def known_tokens(self) -> int | None:
        """The stated size after `max_tokens`, `None` where neither is given."""
        return min((n for n in (self.tokens, self.max_tokens) if n is not None), default=None)


@dataclass
class MixtureConfig:
    """
    Sources and how they are packed and weighted, checked on creation.

    Args:
        sources (`dict[str, SourceConfig]`):
            By name. The names are those of the logged metrics (`loss/<name>`, `eval_<name>_loss`).
        sequence_length (`int`):
            Tokens of each packed row, L.
        temperature (`float`, *optional*, defaults to 1.0):
            Without weights, shares are proportional to `size ** (1 / temperature)`: above 1 they are evened out.
        num_proc (`int`, *optional*):
            Processes that tokenize. By default one, in which a fast tokenizer uses a thread per core.

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
    sequence_length: int
    temperature: float = 1.0
    num_proc: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise ValueError(f"sources: {self.sources!r} is not a mapping of names to sources.")
        require_count("sequence_length", self.sequence_length, least=2)
        require_positive("temperature", self.temperature)
        if self.num_proc is not None:
            require_count("num_proc", self.num_proc)
        for name, source in self.sources.items():
            if not isinstance(source, SourceConfig):
                raise ValueError(f"sources.{name}: {source!r} is no SourceConfig. Use from_dict for plain data.")
            check_source(name, source, self.sequence_length)
        train = self.train_sources
        if not train:
            raise ValueError("sources: there is none to train on. Add one whose role is 'train' (the default).")
        unweighted = [name for name, source in train.items() if source.weight is None]
        if 0 < len(unweighted) < len(train):
            raise ValueError(
                f"sources.{unweighted[0]}.weight: missing, while other training sources have one. Give it to all of "
                f"{', '.join(train)}, or to none (then the sizes decide)."
            )
        if not unweighted and self.temperature != 1:
            raise ValueError("temperature: it has no effect beside explicit weights. Remove it, or the weights.")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "MixtureConfig":
        """
        Build from plain data, refusing unknown keys.

        Raises:
            ValueError: as for the class, and for an unknown key or an empty source.
        """
        values = known_keys(mapping, cls, "")
        sources = values.get("sources")
        if not isinstance(sources, Mapping) or not sources:
            raise ValueError(f"sources: {sources!r} names none. Give one or more, as in `web: {{path: web.jsonl}}`.")
        parsed = {}
        for name, source in sources.items():
            fields = known_keys(source, SourceConfig, f"sources.{name}")
            other = [key for key in NOT_TEXT if fields.get(key)]
            if "text_column" in fields and other:
                raise ValueError(columns_error(name, other[0]))
            parsed[name] = SourceConfig(**fields)
        return cls(**{**values, "sources": parsed})

    @classmethod
    def from_yaml(cls, path: str | Path) -> "MixtureConfig":
        """Build from a YAML file with the fields of the class at its top level."""
        return cls.from_dict(parse_yaml(Path(path).read_text(encoding="utf-8"), str(path)))

    @property
    def train_sources(self) -> dict[str, SourceConfig]:
        """The sources that are trained on."""
        return {name: source for name, source in self.sources.items() if source.role == "train"}

    @property
    def ood_sources(self) -> dict[str, SourceConfig]:
        """The sources that are only evaluated."""
        return {name: source for name, source in self.sources.items() if source.role == "ood"}

    def weights(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """
        Shares of the training tokens, which sum to 1.

        Args:
            sizes (`Mapping[str, int]`):
                Tokens of each training source.

        Raises:
            ValueError: a size that is needed is missing or not positive.
        """
        raw = {}
        for name, source in self.train_sources.items():
            if source.weight is not None:
                raw[name] = float(source.weight)
            elif sizes.get(name, 0) > 0:
                raw[name] = float(sizes[name]) ** (1 / self.temperature)
            else:
                raise ValueError(
                    f"sources.{name}.weight: missing, and the size of the source is unknown or 0. Give weights to all "
                    f"sources, or state sources.{name}.tokens."
                )
        total = math.fsum(raw.values())
        return {name: value / total for name, value in raw.items()}
