"""Comparisons of arms over seeds: runs, minima searches and a report."""
