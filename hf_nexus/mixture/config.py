"""What a mixture is made of: its sources and how they are packed and weighted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .source import SourceConfig
from .stages import Stage, parse_stages
from .strict import (
    NOT_TEXT,
    check_source,
    columns_error,
    known_keys,
    parse_yaml,
    require_count,
    require_flag,
    require_positive,
)

__all__ = ["MixtureConfig", "SourceConfig"]


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
        buffer_size (`int`, *optional*, defaults to 10000):
            Rows of a streaming source among which it is shuffled, and at most read again when training resumes.
        stages (`list[Stage]`, *optional*):
            Weights that change during training, in place of the sources' own: each stage ends at a fraction of the
            outer steps (`until`), and its `weights` name every training source.
        isolate_documents (`bool`, *optional*):
            Keep the documents of a row from attending to each other. By default where the attention allows it.

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
    buffer_size: int = 10_000
    stages: list[Stage] | None = None
    isolate_documents: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise ValueError(f"sources: {self.sources!r} is not a mapping of names to sources.")
        require_count("sequence_length", self.sequence_length, least=2)
        require_positive("temperature", self.temperature)
        if self.num_proc is not None:
            require_count("num_proc", self.num_proc)
        require_count("buffer_size", self.buffer_size, least=2)
        if self.isolate_documents is not None:
            require_flag("isolate_documents", self.isolate_documents)
        for name, source in self.sources.items():
            if not isinstance(source, SourceConfig):
                raise ValueError(f"sources.{name}: {source!r} is no SourceConfig. Use from_dict for plain data.")
            check_source(name, source, self.sequence_length)
        train = self.train_sources
        if not train:
            raise ValueError("sources: there is none to train on. Add one whose role is 'train' (the default).")
        self._check_weights(train)

    def _check_weights(self, train: dict[str, SourceConfig]) -> None:
        unweighted = [name for name, source in train.items() if source.weight is None]
        if self.stages is not None:
            for name in train:
                if name not in unweighted:
                    raise ValueError(f"sources.{name}.weight: it has no effect beside stages. Remove one of the two.")
            self.stages = parse_stages(self.stages, train)
        elif 0 < len(unweighted) < len(train):
            raise ValueError(
                f"sources.{unweighted[0]}.weight: missing, while other training sources have one. Give it to all of "
                f"{', '.join(train)}, or to none (then the sizes decide)."
            )
        elif unsized := [name for name in unweighted if train[name].streaming and train[name].tokens is None]:
            raise ValueError(
                f"sources.{unsized[0]}.weight: missing, and the size of a streaming source is not known. Give weights "
                f"to all training sources, or state sources.{unsized[0]}.tokens."
            )
        if self.temperature != 1 and (self.stages is not None or not unweighted):
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
        values = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
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

    def weights(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """
        Shares of the training tokens, which sum to 1: those of the last stage, where there are stages.

        Args:
            sizes (`Mapping[str, int]`):
                Tokens of each training source; not needed where weights are given.

        Raises:
            ValueError: a size that is needed is missing or not positive.
        """
        return self.stage_weights(sizes)[-1][1]

    def stage_weights(self, sizes: Mapping[str, int]) -> list[tuple[float, dict[str, float]]]:
        """
        `(until, shares)` of each stage: the fraction of training at which it ends, and shares that sum to 1. Without
        stages there is one, until 1.0.

        Args:
            sizes (`Mapping[str, int]`):
                As for [`~MixtureConfig.weights`].

        Raises:
            ValueError: as there.
        """
        if self.stages is not None:
            return [(stage.until, _shares(stage.weights)) for stage in self.stages]
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
        return [(1.0, _shares(raw))]


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {name: value / total for name, value in weights.items()}
