"""Measuring what the update did."""

from .closeness import gradient_cosines
from .losses import mean_losses

__all__ = ["gradient_cosines", "mean_losses"]
