"""`hf-nexus compare`: its folder."""

import errno

import pytest

from hf_nexus.cli.compare import compare


def test_a_folder_has_one_comparison(tmp_path, monkeypatch):
    def held(*args):
        raise BlockingIOError(errno.EAGAIN, "held")

    monkeypatch.setattr("fcntl.flock", held)
    monkeypatch.setattr("hf_nexus.compare.comparison.Comparison.run", lambda comparison: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="is used by another process"):
        compare("compare", str(tmp_path))
