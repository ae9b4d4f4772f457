"""Arms compared over seeds: run, searched for their minima, and reported."""
