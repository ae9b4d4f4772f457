"""Shared by the tests of comparisons."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="module")
def plots_not_drawn():
    """Plots are written as empty files: drawing takes longer than training these tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())
        yield
