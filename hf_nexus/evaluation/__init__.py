"""Measuring what the update did."""

from .answers import answer_scores, final_answer
from .closeness import gradient_cosines
from .losses import mean_losses, perplexities, perplexity

__all__ = ["answer_scores", "final_answer", "gradient_cosines", "mean_losses", "perplexities", "perplexity"]
