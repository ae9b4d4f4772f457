"""The version of the package, which is that of the tag that it was built from."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("hf-nexus")
except PackageNotFoundError:  # imported from a folder, without an installation
    __version__ = "0+unknown"
