"""Mixtures of sources: their configuration, their packing, and the order of their rows."""

from .config import MixtureConfig, SourceConfig
from .indexed import MixtureDataset, MixtureSampler
from .isolation import PackedRowCollator
from .loading import Mixture, load_mixture
from .schedule import DynamicSchedule, SourceSchedule
from .stages import Stage
from .stream.dataset import MixtureStream
from .stream.documents import StreamedDocuments
from .stream.reader import SourceError

__all__ = [
    "DynamicSchedule",
    "Mixture",
    "MixtureConfig",
    "MixtureDataset",
    "MixtureSampler",
    "MixtureStream",
    "PackedRowCollator",
    "SourceConfig",
    "SourceError",
    "SourceSchedule",
    "Stage",
    "StreamedDocuments",
    "load_mixture",
]
