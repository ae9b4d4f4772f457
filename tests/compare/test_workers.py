"""Worker processes: a call that fails or dies does not stop the others."""

# Each worker imports this module: only light imports here.
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from hf_nexus.compare.workers import Call, call_in_workers


def _die() -> str:
    os._exit(9)


def _fail() -> None:
    print("before the error")
    raise OSError("no\nspace")


def test_failed_and_killed_calls_do_not_stop_others(tmp_path):
    calls = [
        Call("bad", _fail, tmp_path / "bad" / "log.txt"),
        Call("killed", _die, tmp_path / "killed.txt"),
        Call("good", partial(sum, [1, 2]), tmp_path / "good.txt"),
    ]
    results = {result.call.name: result for result in call_in_workers(calls, 1)}
    assert results["bad"].error == "OSError: no space"
    assert str(results["killed"].error).startswith("the process was killed")
    assert results["good"].value == 3 and results["good"].error is None
    log = (tmp_path / "bad" / "log.txt").read_text()
    assert log.startswith("before the error") and "Traceback" in log


def _meet(own: Path, other: Path) -> None:
    own.touch()
    for _ in range(600):
        if other.exists():
            return
        time.sleep(0.1)
    raise RuntimeError(f"{other} was not there")


def test_a_killed_call_leaves_no_worker_idle(tmp_path):
    """After it, as many calls are made at a time as before."""
    a, b = tmp_path / "a", tmp_path / "b"
    made = {"killed": _die, "a": partial(_meet, a, b), "b": partial(_meet, b, a)}
    calls = [Call(name, function, tmp_path / "log.txt") for name, function in made.items()]
    errors = {result.call.name: result.error for result in call_in_workers(calls, 2)}
    assert errors.pop("killed") and errors == {"a": None, "b": None}


def _die_unless(path: Path, reached: Path) -> str:
    reached.touch()
    return path.read_text() if path.exists() else _die()


def _write_after(reached: Path, path: Path) -> None:
    _meet(reached, reached)
    path.write_text("enough memory")


def test_a_killed_call_is_made_again_after_the_others(tmp_path):
    path, reached = tmp_path / "path", tmp_path / "reached"
    made = {"killed": partial(_die_unless, path, reached), "other": partial(_write_after, reached, path)}
    calls = [Call(name, function, tmp_path / "log.txt") for name, function in made.items()]
    values = {result.call.name: result.value for result in call_in_workers(calls, 2)}
    assert values == {"killed": "enough memory", "other": None}


def _start_method() -> str:
    return multiprocessing.get_start_method()


def test_processes_of_a_call_are_started_as_in_any_run(tmp_path):
    """Each evaluation starts workers of its data loader. Spawned ones would import torch for seconds."""
    usual = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method("spawn", force=True)  # which the process of a call would take over
    try:
        (result,) = call_in_workers([Call("method", _start_method, tmp_path / "log.txt")], 1)
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert result.value == usual


def _wait(started: str) -> None:
    Path(started).touch()
    time.sleep(600)


def test_an_interrupt_ends_the_calls_in_progress(tmp_path):
    started = tmp_path / "started"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it

    def interrupt():
        while not started.exists():
            time.sleep(0.05)
        for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:  # as a terminal
            os.kill(process, signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    call = Call("wait", partial(_wait, str(started)), tmp_path / "log.txt")
    with pytest.raises(KeyboardInterrupt):
        list(call_in_workers([call, call], 1))
    signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children() and call.log.read_text() == ""


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
