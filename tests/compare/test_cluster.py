"""Runs as jobs of submitit, whose local executor stands in for Slurm."""

import json
import os
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import submitit
import yaml
from submitit.core.utils import JobPaths, cloudpickle_dump

from hf_nexus.cli.app import main
from hf_nexus.compare.cluster import _Job, _keep_signal_to_this_process, _queue, call_in_jobs, make_executor
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
    single = make_executor(tmp_path, {**parameters, "slurm_max_num_timeout": 9}, devices=1, accelerators=False)
    assert single._executor.max_num_timeout == 9
    single = single.parameters
    assert single["nodes"] == single["ntasks_per_node"] == 1 and "gpus_per_node" not in single


def _fail() -> None:
    print("before the error")
    raise ValueError("no luck")


def _rank() -> int:
    return int(os.environ.get("RANK", "-1"))


class Slurm:
    """An executor whose jobs have the numbers 9, 10, ...; `finish` writes the result of one."""

    def __init__(self, folder: Path):
        self.folder, self.submitted = folder, list[str]()

    def batch(self):
        return nullcontext()

    def submit(self, job):
        self.submitted.append(job.call.name)
        return submitit.SlurmJob(self.folder, str(8 + len(self.submitted)))

    def finish(self, number: str, *outcome: object) -> None:
        path = JobPaths(self.folder, number, 0).result_pickle
        path.parent.mkdir(exist_ok=True)
        cloudpickle_dump(outcome, path)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    monkeypatch.setattr("hf_nexus.compare.cluster.time.sleep", lambda seconds: None)
    monkeypatch.setattr("hf_nexus.compare.cluster._QUEUE_SECONDS", 0.0)
    return Slurm(tmp_path)


def test_a_damaged_list_of_jobs_is_named(slurm):
    (slurm.folder / "submitted.json").write_text('{"a": [')
    with pytest.raises(ValueError, match=r"submitted\.json is damaged .*\. Delete it when the jobs"):
        list(call_in_jobs([Call("a", _rank, slurm.folder / "a")], slurm))


def test_jobs_that_go_on_are_waited_for_and_not_repeated(slurm, monkeypatch):
    calls = [Call(name, _rank, slurm.folder / name) for name in "abc"]
    monkeypatch.setattr("hf_nexus.compare.cluster._queue", lambda ids: {*ids} & {"3", "9", "10"})
    (slurm.folder / "submitted.json").write_text('{"a": ["3", 1], "b": ["4", 1], "old": ["3", 1]}')
    for number in ("3", "9", "10"):
        slurm.finish(number, "success", f"of {number}")
    found = {result.call.name: result.value for result in call_in_jobs(calls, slurm)}
    assert found == {"a": "of 3", "b": "of 9", "c": "of 10"} and slurm.submitted == ["b", "c"]
    assert json.loads((slurm.folder / "submitted.json").read_text()) == {
        name: [number, 1] for name, number in zip("abc", ("3", "9", "10"), strict=True)
    }


def test_a_failed_job_that_still_runs_is_submitted_again(slurm, monkeypatch):
    """Other tasks of it wait for the one that failed."""
    monkeypatch.setattr("hf_nexus.compare.cluster._queue", lambda ids: {*ids})
    (slurm.folder / "submitted.json").write_text('{"a": ["3", 2]}')
    slurm.finish("3", "error", "Traceback\nValueError: mended by now")
    slurm.finish("9", "success", "new")
    (result,) = call_in_jobs([Call("a", _rank, slurm.folder / "a")], slurm)
    assert (result.value, result.error) == ("new", None) and slurm.submitted == ["a"]


def test_a_cancelled_job_ends_without_accounting(slurm, monkeypatch):
    queued = [{"9", "10"}, {"10"}, {"10"}]
    monkeypatch.setattr("hf_nexus.compare.cluster._queue", lambda ids: queued.pop(0) if queued else {*ids})
    results = call_in_jobs([Call(name, _rank, slurm.folder / name) for name in "ab"], slurm)
    cancelled = next(results)
    assert not queued  # missing twice: its result may arrive late
    assert cancelled.call.name == "a" and cancelled.error.startswith("job 9 left no result (cancelled, or out of")
    slurm.finish("10", "error", "Traceback\n")
    assert next(results).error


def test_without_an_answer_all_jobs_are_taken_as_queued(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _queue(["1", "2"]) == {"1", "2"}
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 2\necho 7\n")
    (tmp_path / "squeue").chmod(0o755)
    assert _queue(["1", "2"]) == {"2"}


@pytest.fixture
def handlers():
    """The handlers of signals that a job sets, restored afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGCHLD)
    saved = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, saved, strict=True):
        signal.signal(number, handler)


def _preempted() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")


def test_a_preempted_job_has_no_error_as_its_result(slurm, handlers):
    with pytest.raises(SystemExit):
        _Job(Call("a", _preempted, slurm.folder / "log"))()
    with pytest.raises(ValueError, match="no luck"):
        _Job(Call("a", _fail, slurm.folder / "log"))()


def test_readers_that_end_with_a_queued_job_are_no_error(slurm, handlers):
    signal.signal(signal.SIGCHLD, lambda *args: pytest.fail("a reader has ended"))  # as the data loader of torch does
    job = _Job(Call("a", _rank, slurm.folder / "log"))
    assert job.checkpoint().function is job
    subprocess.run(["true"], check=True)


def test_readers_ignore_the_signal_before_a_time_limit(handlers):
    """Otherwise each of them would queue the job again."""
    seen = []
    signal.signal(signal.SIGUSR2, lambda *args: seen.append(args))
    _keep_signal_to_this_process(signal.SIGUSR2)
    if not (child := os.fork()):
        os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(len(seen))
    assert os.waitpid(child, 0)[1] == 0
    os.kill(os.getpid(), signal.SIGUSR2)
    assert len(seen) == 1


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
