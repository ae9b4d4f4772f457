"""Runs as jobs of submitit, whose local executor stands in for Slurm."""

import os
from pathlib import Path

import pytest
import yaml

from hf_nexus.cli.app import main
from hf_nexus.compare.cluster import call_in_jobs, make_executor
from hf_nexus.compare.records import RunRecord
from hf_nexus.compare.workers import Call
from tests.support.comparison import ARMS, comparison_fields
from tests.support.tiny_config import write_config

pytestmark = pytest.mark.usefixtures("plots_not_drawn")
LOCAL = {"cluster": "local", "timeout_min": 9}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cluster": "local"}, r"submitit\.timeout_min: missing"),
        ({**LOCAL, "tasks_per_node": 2}, r"submitit\.tasks_per_node: devices_per_run sets it"),
        ({**LOCAL, "nodes": 3}, r"submitit\.nodes: 3 cannot share 4 devices"),
        ({**LOCAL, "slurm_partion": "gpu"}, "submitit: Unknown argument 'partion'"),
        ({**LOCAL, "timeout_min": "long"}, 'submitit: Parameter "timeout_min" expected type'),
        ({**LOCAL, "cluster": "slum"}, "executor named slum"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        make_executor(tmp_path, parameters, devices=4)


def test_a_job_has_a_task_and_an_accelerator_per_device(tmp_path, monkeypatch):
    (tmp_path / "srun").touch(mode=0o755)  # submitit looks for it
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    parameters = {"cluster": "slurm", "timeout_min": 60, "nodes": 2, "slurm_partition": "gpu"}
    found = make_executor(tmp_path, parameters, devices=16).parameters
    expected = {"nodes": 2, "ntasks_per_node": 8, "gpus_per_node": 8, "time": 60, "partition": "gpu"}
    assert expected.items() <= found.items()
    single = make_executor(tmp_path, parameters, devices=1, accelerators=False).parameters
    assert single["nodes"] == single["ntasks_per_node"] == 1 and "gpus_per_node" not in single


def _fail() -> None:
    print("before the error")
    raise ValueError("no luck")


def _rank() -> int:
    return int(os.environ.get("RANK", "-1"))


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_others(tmp_path):
    calls = [Call("bad", _fail, tmp_path / "bad.txt"), Call("good", _rank, tmp_path / "good.txt")]
    results = {r.call.name: r for r in call_in_jobs(calls, make_executor(tmp_path / "jobs", LOCAL))}
    assert results["bad"].error == "ValueError: no luck" and "before the error" in calls[0].log.read_text()
    assert results["good"].value == -1


@pytest.mark.slow
def test_a_comparison_of_two_ranks_per_run_in_jobs(tmp_path, capsys):
    base, path = write_config(tmp_path), tmp_path / "mine.yaml"
    training = {"per_device_train_batch_size": 1, "save_strategy": "no", "eval_on_start": False}
    more = {"seeds": [1], "devices_per_run": 2, "submitit": LOCAL, "training": training}
    path.write_text(yaml.safe_dump(comparison_fields(base, tmp_path / "out", **more)))
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path)])
    assert stop.value.code == 0 and "runs: 0 of 2 done, 2 to do, as jobs" in capsys.readouterr().out
    for arm in ARMS:
        assert RunRecord.load(Path(tmp_path, "out", "arms", arm, "seed-1")).end.tokens == 6 * 4 * 2 * 32
    assert len(list((tmp_path / "out" / "jobs").glob("*_1_result.pkl"))) == 2  # of the second ranks
