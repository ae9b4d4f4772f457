"""Mixtures of sources: their configuration, their packing, and the order of their rows."""

from typing import TYPE_CHECKING

from ..lazy import lazily

# Public names and their modules. A configuration is checked without importing torch.
_EXPORTS = {
    "DynamicSchedule": "schedule",
    "Mixture": "loading",
    "MixtureConfig": "config",
    "MixtureDataset": "indexed",
    "MixtureSampler": "indexed",
    "MixtureStream": "stream.dataset",
    "PackedRowCollator": "isolation",
    "SourceConfig": "config",
    "SourceError": "stream.reader",
    "SourceSchedule": "schedule",
    "Stage": "stages",
    "StreamedDocuments": "stream.documents",
    "load_mixture": "loading",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import MixtureConfig as MixtureConfig
    from .config import SourceConfig as SourceConfig
    from .indexed import MixtureDataset as MixtureDataset
    from .indexed import MixtureSampler as MixtureSampler
    from .isolation import PackedRowCollator as PackedRowCollator
    from .loading import Mixture as Mixture
    from .loading import load_mixture as load_mixture
    from .schedule import DynamicSchedule as DynamicSchedule
    from .schedule import SourceSchedule as SourceSchedule
    from .stages import Stage as Stage
    from .stream.dataset import MixtureStream as MixtureStream
    from .stream.documents import StreamedDocuments as StreamedDocuments
    from .stream.reader import SourceError as SourceError

__getattr__ = lazily(__name__, _EXPORTS)
