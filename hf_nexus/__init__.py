"""Train language models on several sources so that their minima come close: the Nexus update for the HF stack."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and where they live. They are imported when first used: `import hf_nexus` alone costs nothing.
_EXPORTS = {
    "Mixture": "mixture.loading",
    "MixtureConfig": "mixture.config",
    "Nexus": "nexus",
    "NexusConfig": "config",
    "NexusConfigMixin": "config",
    "NexusTrainer": "trainer",
    "NexusTrainerMixin": "trainer",
    "SourceConfig": "mixture.config",
    "load_mixture": "mixture.loading",
}

__all__ = [*_EXPORTS, "__version__"]  # noqa: PLE0604  # names, all of them strings

if TYPE_CHECKING:
    from .config import NexusConfig, NexusConfigMixin
    from .mixture.config import MixtureConfig, SourceConfig
    from .mixture.loading import Mixture, load_mixture
    from .nexus import Nexus
    from .trainer import NexusTrainer, NexusTrainerMixin


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
