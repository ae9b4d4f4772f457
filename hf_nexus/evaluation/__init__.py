"""Measurements on trained models: losses, answers, gradient cosines, minima, benchmarks, statistics."""
