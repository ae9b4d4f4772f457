"""Data loader workers outlive the signals after which a run saves a checkpoint."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from hf_nexus.trainer.loader_workers import keep_signals_from_workers

ROOT = Path(__file__).parents[2]
COUNT, WORKERS = 12, 2


class Numbers:
    """Numbers, read by a loader. Reading the last one takes an hour if `hangs`."""

    def __init__(self, hangs: bool):
        self.hangs = hangs

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> int:
        while self.hangs and i == COUNT - 1:
            signal.pause()
        return i


def read(method: str, hangs: bool) -> None:
    """Read a batch, then the others after a line on standard input."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    loader = DataLoader(Numbers(hangs), num_workers=WORKERS, multiprocessing_context=method)
    arguments = SimpleNamespace(enable_jit_checkpoint=True, dataloader_multiprocessing_context=method)
    keep_signals_from_workers(loader, arguments)
    batches = iter(loader)
    next(batches)
    next(batches)  # both workers have begun
    print(json.dumps([worker.pid for worker in batches._workers]), flush=True)
    sys.stdin.readline()
    for _ in range(COUNT - 3):
        next(batches)
    print("read", flush=True)


@pytest.fixture
def start():
    """Start `read` in a process group, which is killed after the test."""
    groups = []

    def start(method: str, hangs: bool = False) -> subprocess.Popen:
        code = f"from tests.trainer.test_loader_workers import read; read({method!r}, {hangs})"
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, start_new_session=True, **pipes)
        groups.append(process)
        return process

    yield start
    for process in groups:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_outlive_a_signal_to_all_processes(start, method):
    process = start(method)
    workers = json.loads(process.stdout.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
        for worker in workers:
            os.kill(worker, number)
    printed, errors = process.communicate("go\n", timeout=120)
    assert process.returncode == 0 and printed == "read\n", errors
    with pytest.raises(ProcessLookupError):
        os.kill(workers[0], 0)


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_hold_the_exit(start):
    process = start("fork", hangs=True)
    workers = json.loads(process.stdout.readline())
    printed, errors = process.communicate("go\n", timeout=120)
    assert process.returncode == 0 and printed == "read\n", errors
    with pytest.raises(ProcessLookupError):
        os.kill(workers[-1], 0)


def test_loaders_of_training_and_evaluation_are_kept(make_trainer, sources):
    trainer = make_trainer(sources, dataloader_num_workers=2)
    training, evaluation = trainer.get_train_dataloader(), trainer.get_eval_dataloader(sources["text"])
    begin, of_evaluation = (loader.base_dataloader.worker_init_fn for loader in (training, evaluation))
    assert begin.func is of_evaluation.func and begin.func.__module__ == keep_signals_from_workers.__module__
    assert begin.args[0].func is seed_worker
