"""A configuration of a Llama that trains in seconds on three local files, and the folder of one finished run."""

from pathlib import Path

import pytest

from tests.support.tiny_config import run, write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "tiny-llama"
    run(config, output)
    return output
