"""Runs on several devices, made one at a time from the command line."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.utils import DistributedType
from rich.console import Console

from hf_nexus.cli.app import main
from hf_nexus.compare import runs
from hf_nexus.compare.comparison import Comparison
from hf_nexus.compare.minima import search_minima
from hf_nexus.compare.records import RunRecord
from hf_nexus.compare.runs import Run
from hf_nexus.compare.workers import Call, call_in_workers
from tests.support.comparison import comparison_fields, make_comparison
from tests.support.tiny_config import STEPS, write_config
from tests.trainer.distributed.fsdp_worker import launched_as

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


def train_sharded(run: Run) -> RunRecord:
    """Train as on accelerators, on which Accelerate shards."""
    parse = runs.parse_arguments

    def parse_arguments(argv: list[str]) -> Any:
        arguments = parse(argv)
        launched_as(arguments.training, DistributedType.MULTI_GPU)
        return arguments

    runs.parse_arguments = parse_arguments
    return run.train()


@pytest.mark.slow
@pytest.mark.parametrize("state_dict", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_run_is_measured_and_its_minima_found(tmp_path, state_dict):
    base, questions = write_config(tmp_path), tmp_path / "questions.jsonl"
    questions.write_text('{"question": "ab", "answer": "c\\n#### 1"}\n' * 3)
    training = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "state_dict_type": state_dict}}
    training |= {"gradient_cosine_steps": 0, "save_strategy": "no", "per_device_train_batch_size": 1}
    config = make_comparison(
        base,
        tmp_path / "out",
        training=training,
        devices_per_run=2,
        seeds=[1],
        question_sets={"q": {"path": str(questions), "max_new_tokens": 4}},
        minima={"max_steps": 2, "eval_steps": 1, "eval_rows": 2, "grid": 3},
    )
    comparison = Comparison(config, Console(quiet=True))
    comparison.check()
    run = next(run for run in comparison.runs() if run.arm == "nexus")
    run.write()
    (result,) = call_in_workers([Call(str(run), partial(train_sharded, run), tmp_path / "log.txt", 2)], 1)
    assert result.error is None and result.value.downstream and not result.value.cosines
    assert result.value.end.train_loss < result.value.curve[0].train_loss
    assert search_minima(run).minima is not None
