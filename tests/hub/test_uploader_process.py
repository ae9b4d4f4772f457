"""The upload process: it ends with the run, is restarted when it dies, and never hangs."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_nexus.hub.publisher import Publisher
from hf_nexus.hub.queue import QUEUE_NAME, QueueBusyError, QueueStatus
from hf_nexus.hub.uploader import push_queue
from tests.support.hub.runs import (
    LARGE,
    QUICK,
    REPO,
    SECONDS,
    content,
    digests,
    impatient_client,
    model_of,
    until,
    write_checkpoint,
)
from tests.support.hub.server import ALICE, HubServer

_RUN = """
import sys, time
from pathlib import Path
from hf_nexus.hub.publisher import Publisher
from tests.support.hub.runs import QUICK, write_checkpoint
out = Path(sys.argv[1])
publisher = Publisher("alice/model", out, token=sys.argv[2], endpoint=sys.argv[3], retry=QUICK)
publisher.submit_checkpoint(write_checkpoint(out, 2), 2, "checkpoint", ["README.md"])
print("queued", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("method", "where"), [("PUT", "/__lfs/"), ("POST", "/commit/")])
def test_an_upload_survives_kill_9_of_the_run(
    hub: HubServer, tmp_path: Path, method: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload process ends with the run, and the interrupted job is sent later, once."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hub.fail(where, action="hang", times=1)
    out = tmp_path / "out"
    command = [sys.executable, "-c", _RUN, str(out), ALICE, hub.endpoint]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert run.stdout is not None and run.stdout.readline() == "queued\n"
    until(lambda: hub.count(method, where))
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert QueueStatus.read(out / QUEUE_NAME).waiting == (2,)
    shutil.rmtree(out / "checkpoint-2")
    with impatient_client(monkeypatch, xet=False):
        assert push_queue(out, token=ALICE, endpoint=hub.endpoint, retry=QUICK)[1]
    assert [commit["title"] for commit in hub.history(REPO)] == ["Training in progress, step 2"]
    checkpoint = write_checkpoint(tmp_path / "again", 2)
    resumable = {f"last-checkpoint/{name}": data for name, data in content(checkpoint).items()}
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint) | resumable)


def test_a_killed_upload_process_is_restarted(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path
) -> None:
    """`flush` starts another one, which sends the interrupted job."""
    hub.fail("/commit/", action="hang", times=1)
    publisher = publish(retry=replace(QUICK, request=30.0))
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    until(lambda: hub.count("POST", "/commit/"))
    process = publisher._process._process
    assert process is not None
    process.kill()
    process.wait()
    assert publisher.flush(SECONDS).pushed_step == 2


@pytest.mark.parametrize("where", ["/commit/", "/xet-write-token/"])
def test_an_upload_without_timeouts_has_a_deadline(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, where: str
) -> None:
    """Here, requests have a timeout of an hour, and hf_xet has none."""
    hub.fail(where, action="hang", times=1)
    publisher = publish(retry=replace(QUICK, request=3600.0, upload=1.0, slowest_rate=LARGE))
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    assert publisher.flush(SECONDS).pushed_step == 2
    assert [commit["title"] for commit in hub.history(REPO)] == ["Training in progress, step 2"]


def test_without_an_upload_process_checkpoints_wait_on_disk(
    publish: Callable[..., Publisher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The machine has no memory for another process."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    publisher = publish()
    assert publisher.check() is None
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    assert publisher.flush(0.1).waiting == (2,)
    assert "could not be started" in caplog.text


def test_the_upload_process_imports_what_the_run_does(
    publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules with the names of standard ones are in the current folder, and behind those in the path."""
    for name in ("queue", "uuid"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    assert publish().check() == REPO


def test_one_queue_has_one_sender(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run sends its queue, another process is refused."""
    hub.fail("/commit/", action="hang")
    publisher = publish(retry=replace(QUICK, request=30.0))
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    until(lambda: hub.count("POST", "/commit/"))
    with impatient_client(monkeypatch, xet=False), pytest.raises(QueueBusyError, match="Another process"):
        push_queue(tmp_path / "out", token=ALICE, endpoint=hub.endpoint, lock_timeout=0.2)
