"""Worker processes: a call that fails or dies does not stop the others."""

# Each worker imports this module: only light imports here.
import atexit
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from hf_nexus.compare import workers
from hf_nexus.compare.workers import Call, CallResult, call_in_workers


def _die() -> str:
    os._exit(9)


def _fail() -> None:
    print("before the error")
    raise OSError("no\nspace")


def _wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise RuntimeError(f"{path} was not there")


def _meet(own: Path, other: Path) -> None:
    own.touch()
    _wait_for(other)


def _die_once(path: Path, reached: Path) -> str:
    if reached.exists():
        return path.read_text()
    reached.touch()
    return _die()


def _write_after(reached: Path, path: Path) -> None:
    _wait_for(reached)
    path.write_text("enough memory")


def _start_method() -> str:
    return multiprocessing.get_start_method()


USUAL = multiprocessing.get_all_start_methods()[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CallResult]:
    """Of many calls in two workers, because a process imports torch for seconds."""
    folder = tmp_path_factory.mktemp("calls")
    reached, path, a, b = (folder / name for name in ("reached", "path", "a", "b"))
    made = {
        "killed": partial(_die_once, path, reached),
        "other": partial(_write_after, reached, path),
        "a": partial(_meet, a, b),
        "b": partial(_meet, b, a),
        "always killed": _die,
    }
    calls = [Call(name, function, folder / name / "log.txt") for name, function in made.items()]
    return {result.call.name: result for result in call_in_workers(calls, 2)}


def test_a_failed_call_does_not_stop_others(tmp_path):
    functions = _fail, _start_method, partial(sum, [1, 2])
    calls = [Call(str(i), function, tmp_path / str(i) / "log.txt") for i, function in enumerate(functions)]
    multiprocessing.set_start_method("spawn", force=True)  # which the process of a call would take over
    try:
        bad, method, good = call_in_workers(calls, 1)
    finally:
        multiprocessing.set_start_method(USUAL, force=True)
    assert bad.error == "OSError: no space"
    log = bad.call.log.read_text()
    assert log.startswith("before the error") and "Traceback" in log
    assert good.value == 3 and good.error is None
    # Each evaluation starts workers of its data loader. Spawned ones would import torch for seconds.
    assert method.value == USUAL


@pytest.mark.slow
def test_a_call_that_is_always_killed_is_an_error(results):
    assert str(results["always killed"].error).startswith("the process was killed")


@pytest.mark.slow
def test_a_killed_call_leaves_no_worker_idle(results):
    """After it, as many calls are made at a time as before."""
    assert results["a"].error is None and results["b"].error is None


@pytest.mark.slow
def test_a_killed_call_is_made_again_after_the_others(results):
    assert results["killed"].value == "enough memory" and results["other"].error is None
    assert [*results][-2:] == ["killed", "always killed"]


def _fork_and_die(child: Path, late: Path) -> bool:
    if child.exists():
        os.kill(int(child.read_text()), signal.SIGKILL)
        return late.exists()
    forked = os.fork()
    if forked == 0:
        time.sleep(60)
        late.touch()
        os._exit(0)
    child.write_text(str(forked))
    os._exit(9)


@pytest.mark.slow
def test_a_killed_call_is_noticed_before_its_children_end(tmp_path):
    call = Call("killed", partial(_fork_and_die, tmp_path / "child", tmp_path / "late"), tmp_path / "log.txt")
    assert [(result.value, result.error) for result in call_in_workers([call], 1)] == [(False, None)]


def _meet_at_the_end(own: Path, other: Path, met: Path) -> None:
    _meet(own, other)
    met.touch()


def _end_after(*paths: Path) -> None:
    atexit.register(_meet_at_the_end, *paths)


@pytest.mark.slow
def test_results_do_not_wait_for_a_worker_that_ends(tmp_path):
    ending, seen, met = tmp_path / "ending", tmp_path / "seen", tmp_path / "met"
    made = {"pushes": partial(_end_after, ending, seen, met), "other": partial(_meet, tmp_path / "other", ending)}
    for result in call_in_workers([Call(name, function, tmp_path / "log") for name, function in made.items()], 2):
        assert result.error is None
        if result.call.name == "other":
            seen.touch()
    assert met.exists()


def _wait_and_end_with(other: Path, own: Path) -> None:
    def end(*_: object) -> None:
        _meet_at_the_end(own.with_suffix(".ending"), other.with_suffix(".ending"), own.with_suffix(".met"))
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    own.touch()
    time.sleep(600)


@pytest.mark.slow
def test_an_interrupt_ends_all_calls_in_progress_at_once(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it

    def interrupt():
        while not (a.exists() and b.exists()):
            time.sleep(0.05)
        for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:  # as a terminal
            os.kill(process, signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    calls = [Call("wait", partial(_wait_and_end_with, *paths), tmp_path / "log.txt") for paths in ((a, b), (b, a))]
    with pytest.raises(KeyboardInterrupt):
        list(call_in_workers([*calls, *calls], 2))
    signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children() and calls[0].log.read_text() == ""
    assert a.with_suffix(".met").exists() and b.with_suffix(".met").exists()


@pytest.mark.parametrize(
    ("kind", "variable"),
    [("cuda", "CUDA_VISIBLE_DEVICES"), ("xpu", "ZE_AFFINITY_MASK"), ("npu", "ASCEND_RT_VISIBLE_DEVICES")],
)
def test_each_worker_sees_its_own_devices(monkeypatch, kind, variable):
    import torch

    accelerator = SimpleNamespace(type=kind)  # without its extension, torch does not know the type npu
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv(variable, raising=False)
    assert workers._devices(2, 2) == [{variable: "0,1"}, {variable: "2,3"}]
    monkeypatch.setenv(variable, "4,5,6,7")
    assert workers._devices(3, 2) == [{variable: "4,5"}, {variable: "6,7"}, {variable: "4,5"}]
    if kind == "cuda":
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,3")
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        assert workers._devices(2, 1) == [{"HIP_VISIBLE_DEVICES": "2"}, {"HIP_VISIBLE_DEVICES": "3"}]


def _rank_of_two() -> int:
    rank = int(os.environ["RANK"])
    assert os.environ["WORLD_SIZE"] == "2"
    if os.environ.get("FAIL"):
        raise ValueError("no\nluck") if rank else SystemExit(0)
    return 10 + rank


@pytest.mark.slow
def test_a_call_on_two_devices_is_made_by_two_ranks(tmp_path, monkeypatch):
    call = Call("two", _rank_of_two, tmp_path / "log.txt", devices=2)
    assert [result.value for result in call_in_workers([call], 1)] == [10]
    monkeypatch.setenv("FAIL", "1")
    (result,) = call_in_workers([call], 1)
    assert str(result.error).startswith("RuntimeError: rank 1: ValueError: no")
    assert "Traceback" in call.log.read_text()
