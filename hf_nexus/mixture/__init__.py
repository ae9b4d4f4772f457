"""Mixtures of sources: what they are, how they are packed, and in which order their rows are read."""

from .config import MixtureConfig, SourceConfig
from .indexed import MixtureDataset, MixtureSampler
from .isolation import IsolateDocuments
from .loading import Mixture, load_mixture
from .readers import Retry, SourceError
from .schedule import DynamicSchedule, SourceSchedule
from .stages import Stage
from .streaming import MixtureStream
from .token_stream import StreamedDocuments

__all__ = [
    "DynamicSchedule",
    "IsolateDocuments",
    "Mixture",
    "MixtureConfig",
    "MixtureDataset",
    "MixtureSampler",
    "MixtureStream",
    "Retry",
    "SourceConfig",
    "SourceError",
    "SourceSchedule",
    "Stage",
    "StreamedDocuments",
    "load_mixture",
]
