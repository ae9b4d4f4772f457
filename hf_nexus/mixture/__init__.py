"""Mixtures of sources: what they are, how they are packed, and in which order their rows are read."""

from .config import MixtureConfig, SourceConfig
from .indexed import MixtureDataset, MixtureSampler
from .loading import Mixture, load_mixture
from .schedule import SourceSchedule

__all__ = [
    "Mixture",
    "MixtureConfig",
    "MixtureDataset",
    "MixtureSampler",
    "SourceConfig",
    "SourceSchedule",
    "load_mixture",
]
