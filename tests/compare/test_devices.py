"""Runs on several devices, made one at a time from the command line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_nexus.cli.app import main
from hf_nexus.compare.records import RunRecord
from hf_nexus.compare.runs import Run
from tests.support.comparison import comparison_fields, make_comparison
from tests.support.tiny_config import STEPS, write_config

pytestmark = pytest.mark.usefixtures("plots_not_drawn")


def command(path: Path, *flags: str) -> int | str | None:
    """The exit status of `hf-nexus compare`."""
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), *flags])
    return stop.value.code


@pytest.mark.slow
def test_a_run_on_two_ranks_equals_one_on_one_rank(tmp_path):
    base = write_config(tmp_path)
    training = {"gradient_cosine_steps": 3, "logging_steps": 1, "save_strategy": "no"}

    def fields(name: str, **changes: Any) -> dict[str, Any]:
        return comparison_fields(base, tmp_path / name, seeds=[1], **changes)

    two = fields("two", training=training | {"per_device_train_batch_size": 1}, devices_per_run=2)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(two))
    assert command(path, "--run", "nexus/seed-1") == 0
    found = RunRecord.load(tmp_path / "two" / "arms" / "nexus" / "seed-1")
    config = make_comparison(base, tmp_path / "one", seeds=[1], training=training)
    folder = tmp_path / "one" / "arms" / "nexus" / "seed-1"
    run = Run(config, "nexus", 1, config.settings("nexus"), folder, str(tmp_path / "tok"))
    run.write()
    expected = run.train()
    assert found.end.tokens == expected.end.tokens == STEPS * 4 * 2 * 32
    for mine, other in zip(found.curve, expected.curve, strict=True):
        assert mine.metrics() == pytest.approx(other.metrics(), abs=1e-4)
