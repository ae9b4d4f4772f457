"""Mixtures of sources: their configuration, their packing, and the order of their rows."""

from typing import TYPE_CHECKING

from ..lazy import lazily

# Public names and their modules. A configuration is checked without importing torch.
_EXPORTS = {
    "Mixture": "loading",
    "MixtureConfig": "config",
    "SourceConfig": "config",
    "SourceError": "stream.reader",
    "SourceSchedule": "schedule",
    "load_mixture": "loading",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import MixtureConfig as MixtureConfig
    from .config import SourceConfig as SourceConfig
    from .loading import Mixture as Mixture
    from .loading import load_mixture as load_mixture
    from .schedule import SourceSchedule as SourceSchedule
    from .stream.reader import SourceError as SourceError

__getattr__ = lazily(__name__, _EXPORTS)
