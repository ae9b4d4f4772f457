"""The plot of gradient cosines."""

import math

from hf_nexus.plots.cosines import plot_cosines


def test_cosines_are_drawn_only_if_the_log_has_finite_ones(tmp_path):
    log = [{"step": 1, "cosine/a-b-c": 0.5}, {"step": 2, "cosine/a-b-c": math.nan}, {"step": 2, "cosine/x-y": 0.1}]
    path = tmp_path / "new" / "cosines.png"
    assert plot_cosines([{"step": 1, "loss": 1.0}], ["a", "b"], path) is None and not path.parent.exists()
    assert plot_cosines(log[1:2], ["a", "b-c"], path) is None
    assert plot_cosines(log[:2], ["a-b", "c", "d"], path) == path and path.read_bytes().startswith(b"\x89PNG")
