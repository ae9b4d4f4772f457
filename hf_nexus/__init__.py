"""A drop-in Hugging Face Trainer for multi-source training with the Nexus update."""

from typing import TYPE_CHECKING

from .lazy import lazily

# Public names and their modules, which are imported on first use. `import hf_nexus` alone stays cheap.
_EXPORTS = {
    "Mixture": "mixture.loading",
    "MixtureConfig": "mixture.config",
    "Nexus": "nexus",
    "NexusConfig": "trainer.config",
    "NexusConfigMixin": "trainer.config",
    "NexusTrainer": "trainer.mixin",
    "NexusTrainerMixin": "trainer.mixin",
    "SourceConfig": "mixture.config",
    "__version__": "version",
    "load_mixture": "mixture.loading",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .mixture.config import MixtureConfig as MixtureConfig
    from .mixture.config import SourceConfig as SourceConfig
    from .mixture.loading import Mixture as Mixture
    from .mixture.loading import load_mixture as load_mixture
    from .nexus import Nexus as Nexus
    from .trainer.config import NexusConfig as NexusConfig
    from .trainer.config import NexusConfigMixin as NexusConfigMixin
    from .trainer.mixin import NexusTrainer as NexusTrainer
    from .trainer.mixin import NexusTrainerMixin as NexusTrainerMixin
    from .version import __version__ as __version__


__getattr__ = lazily(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)
