"""Measuring what the update did."""

from .closeness import gradient_cosines

__all__ = ["gradient_cosines"]
