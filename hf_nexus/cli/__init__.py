"""The `hf-nexus` command."""

from .app import main

__all__ = ["main"]
