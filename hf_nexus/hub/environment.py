"""What a run ran on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__

__all__ = ["describe_hardware", "installed_versions"]

_PACKAGES = ("transformers", "torch", "accelerate", "datasets", "tokenizers", "huggingface-hub")
_OPTIONAL = ("trl", "peft", "evaluate", "lm-eval", "bitsandbytes")


def installed_versions(optional: bool = False) -> dict[str, str]:
    """
    Versions of Python and of the packages that a run depends on, by distribution name.

    Args:
        optional (`bool`, *optional*, defaults to `False`):
            Also those that only some runs use, such as peft, where they are installed.

    Example:
        >>> from hf_nexus.hub.environment import installed_versions
        >>> "transformers" in installed_versions()
        True
    """
    found = {"python": platform.python_version(), "hf-nexus": __version__}
    for name in (*_PACKAGES, *(_OPTIONAL if optional else ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_hardware(processes: int = 1) -> str:
    """
    The device that each of the processes trains on, in words.

    Example:
        >>> from hf_nexus.hub.environment import describe_hardware
        >>> isinstance(describe_hardware(), str)
        True
    """
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    if torch.accelerator.is_available():
        return f"{processes} x {torch.accelerator.current_accelerator()}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}" + (f", {processes} processes" if processes > 1 else "")
