"""Publishing beside a run: what is saved arrives, and nothing that the Hub or the disk does reaches the training."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.hub.contents import checkpoint_files
from hf_nexus.hub.job import Target
from hf_nexus.hub.publisher import Publisher
from hf_nexus.hub.queue import QUEUE_NAME, UploadQueue
from hf_nexus.hub.status import Status
from hf_nexus.hub.uploader_process import Patience, QueueBusyError, drain
from tests.support.hub.runs import CARD, QUICK, REPO, content, digests, impatient_client, model_of, write_checkpoint
from tests.support.hub.server import ALICE, READER, HubServer
from tests.support.tiny import tiny_llama

SECONDS = 180.0  # bound of what must happen, on a busy machine


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server; the processes beside the runs are online."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with HubServer(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def publish(hub: HubServer, tmp_path: Path) -> Iterator[Callable[..., Publisher]]:
    """`publish(**options)` makes a publisher of `tmp_path / "out"`; all are closed in the end."""
    made = []

    def make(repo_id: str = REPO, output_dir: Path = tmp_path / "out", **options: Any) -> Publisher:
        publisher = Publisher(
            repo_id, output_dir, **{"token": ALICE, "endpoint": hub.endpoint, "patience": QUICK, **options}
        )
        made.append(publisher)
        return publisher

    yield make
    for publisher in made:
        publisher.close()


def until(condition: Callable[[], Any]) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# ---- The queue ----


@settings(max_examples=30)
@given(
    st.lists(st.sets(st.sampled_from(["", "last-checkpoint", "checkpoint-2", "checkpoint-4"]), min_size=1), max_size=6)
)
def test_merging_never_drops_the_newest_of_anything(
    tmp_path_factory: pytest.TempPathFactory, jobs: list[set[str]]
) -> None:
    """After any sequence of jobs each folder of the repository is left to exactly its newest job."""
    folder = tmp_path_factory.mktemp("queue")
    (folder / "file").write_text("content")
    queue = UploadQueue(folder / "queue")
    newest: dict[str, int] = {}
    for step, slots in enumerate(jobs):
        files = {f"{slot}/file".lstrip("/"): folder / "file" for slot in slots}
        newest |= dict.fromkeys(slots, step)
        queue.add(files, tuple(sorted(slots)), step, "title", Target(REPO))
        queue.prune()
    assert sorted((slot, job.step) for job, slots in queue.todo() for slot in slots) == sorted(newest.items())
    assert {job.step for job in queue.jobs()} == set(newest.values())


def test_a_job_is_what_was_saved_when_it_was_queued(tmp_path: Path) -> None:
    """Rotation and later saves of the same files do not reach it (hazards B and C)."""
    checkpoint = write_checkpoint(tmp_path, 2)
    files, slots = checkpoint_files(checkpoint, "checkpoint")
    files["README.md"] = tmp_path / "README.md"
    saved = digests({name: path.read_bytes() for name, path in files.items()})
    job = UploadQueue(tmp_path / QUEUE_NAME).add(files, slots, 2, "title", Target(REPO), write_once=checkpoint)
    assert job.files()["model.safetensors"].stat().st_ino == (checkpoint / "model.safetensors").stat().st_ino
    (checkpoint / "config.json").write_text("overwritten")
    (tmp_path / "README.md").write_text("overwritten")
    shutil.rmtree(checkpoint)
    write_checkpoint(tmp_path, 2).joinpath("model.safetensors").write_bytes(b"another")
    assert digests({name: path.read_bytes() for name, path in job.files().items()}) == saved
    job.verify(job.files())


def test_an_unreadable_job_blocks_nothing(tmp_path: Path) -> None:
    """A crash of the machine can leave one; its number is not used again."""
    (tmp_path / "file").write_text("content")
    queue = UploadQueue(tmp_path / QUEUE_NAME)
    broken, kept = (queue.add({"file": tmp_path / "file"}, (name,), 2, "title", Target(REPO)) for name in ("a", "b"))
    (broken.path / "job.json").write_text("")
    assert [job.number for job in UploadQueue(tmp_path / QUEUE_NAME).jobs()] == [kept.number]
    (kept.path / "job.json").write_text("")
    again = UploadQueue(tmp_path / QUEUE_NAME).add({"file": tmp_path / "file"}, ("a",), 2, "title", Target(REPO))
    assert again.number > kept.number


def test_strategies(tmp_path: Path) -> None:
    """The root is for loading the model; what resuming needs goes to the folder that the strategy names."""
    checkpoint = write_checkpoint(tmp_path, 2)
    everything = set(content(checkpoint))
    model = everything - {"optimizer.pt", "rng_state.pth"}
    for strategy, folder in {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.items():
        files, slots = checkpoint_files(checkpoint, strategy)
        assert set(files) == model | {f"{folder}/{name}" for name in everything}
        assert slots == ("", folder)
    assert set(checkpoint_files(checkpoint, "every_save")[0]) == model


# ---- Beside a run ----


@pytest.mark.parametrize("transfer", ["lfs", "xet"])
def test_round_trip(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, transfer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints and the end of a run, to a private repository and a branch that are both yet to be made."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(transfer == "lfs")))
    out = tmp_path / "out"
    publisher = publish("model", private=True, revision="dev")
    assert publisher.check() == REPO
    repo = hub.store.load("models", REPO)
    assert repo is not None and repo["private"] and "dev" in repo["branches"]
    for step in (2, 4):
        checkpoint = write_checkpoint(out, step)
        assert publisher.submit_checkpoint(checkpoint, step, "checkpoint", ["README.md", "absent.png"])
        shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
        assert publisher.flush(SECONDS).complete
    assert digests(hub.files(REPO, "dev")) == digests(
        model_of(checkpoint) | {f"last-checkpoint/{name}": data for name, data in content(checkpoint).items()}
    )
    (out / "model.safetensors").write_bytes(b"final")
    (out / "_scratch").write_text("not for the Hub")
    assert publisher.submit(6, "End of training")
    status = publisher.flush(SECONDS)
    assert status.logs() == {"hub/pending": 0, "hub/pushed_step": 6}
    assert status.line(out) == "On the Hub (alice/model@dev): step 6."
    assert hub.files(REPO, "dev")["model.safetensors"] == b"final"
    assert not any(name.startswith(("_", QUEUE_NAME)) for name in hub.files(REPO, "dev"))
    titles = [commit["title"] for commit in hub.history(REPO, "dev")]
    assert titles == ["End of training", "Training in progress, step 4", "Training in progress, step 2"]
    assert hub.history(REPO) == []


_LOAD = """
import sys
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM
local = AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict()
for repo_id in sys.argv[2:]:
    hub = AutoModelForCausalLM.from_pretrained(repo_id).state_dict()
    assert local.keys() == hub.keys() and all((local[name] == hub[name]).all() for name in local)
    print(ModelCard.load(repo_id).data.license, HfApi().model_info(repo_id, expand=["evalResults"]).eval_results)
"""
_RESULT = "- dataset: {id: cais/mmlu, task_id: default}\n  value: 0.5\n"


def test_what_was_pushed_loads(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`from_pretrained(repo_id)` gives the same bits on both paths; the card's metadata and the results load too."""
    out = tmp_path / "out"
    model: Any = tiny_llama(hidden_size=128, intermediate_size=512)
    model.save_pretrained(out / "checkpoint-2")
    (out / "README.md").write_text(CARD)
    (out / ".eval_results").mkdir()
    (out / ".eval_results/mmlu.yaml").write_text(_RESULT)
    repositories = {"alice/lfs": "1", "alice/xet": "0"}
    for repo_id, without_xet in repositories.items():
        monkeypatch.setenv("HF_HUB_DISABLE_XET", without_xet)
        publisher = publish(repo_id)
        publisher.submit_checkpoint(out / "checkpoint-2", 2, "every_save", ["README.md", ".eval_results"])
        assert publisher.flush(SECONDS).complete
        publisher.close()
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ALICE, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", _LOAD, str(out / "checkpoint-2"), *repositories]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line.startswith("mit") and "cais/mmlu" in line and "0.5" in line
    assert hub.count("PUT", "/__lfs/") and hub.count("GET", "/xet-write-token/")


def test_the_end_strategy_leaves_checkpoints_alone(publish: Callable[..., Publisher], tmp_path: Path) -> None:
    """Nothing is queued before the end; unknown strategies are errors that name the known ones."""
    publisher = publish()
    checkpoint = write_checkpoint(tmp_path / "out", 2)
    assert not publisher.submit_checkpoint(checkpoint, 2, "end")
    assert publisher.status().complete
    with pytest.raises(ValueError, match=r"hub_strategy='last'.*every_save"):
        publisher.submit_checkpoint(checkpoint, 2, "last")


def test_files_of_an_earlier_checkpoint_leave_the_folder(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path
) -> None:
    """`last-checkpoint` can be resumed from: it holds one checkpoint, not the union of all."""
    publisher = publish()
    for step in (2, 4):
        checkpoint = write_checkpoint(tmp_path / "out", step)
        if step == 2:
            (checkpoint / "rng_state_1.pth").write_bytes(b"of a run with two processes")
        publisher.submit_checkpoint(checkpoint, step, "checkpoint")
        assert publisher.flush(SECONDS).complete
    names = {name.removeprefix("last-checkpoint/") for name in hub.files(REPO) if name.startswith("last-checkpoint/")}
    assert names == set(content(checkpoint))


def test_a_slow_hub_gets_the_newest(hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path) -> None:
    """Saves during an upload are merged away but for the newest, without a wait (hazard A)."""
    publisher = publish(patience=replace(QUICK, request=SECONDS))
    hub.fail("/commit/", action="hold", times=1)
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save", ["README.md"])
    until(lambda: hub.count("POST", "/commit/"))
    for step in (4, 6, 8):
        checkpoint = write_checkpoint(tmp_path / "out", step)
        assert publisher.submit_checkpoint(checkpoint, step, "every_save", ["README.md"])
    assert hub.count("POST", "/commit/") == 1 and hub.history(REPO) == [], "it waited for the Hub"
    assert len(publisher.queue.jobs()) <= 2
    hub.heal()
    assert publisher.flush(SECONDS).pushed_step == 8
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))
    assert [commit["title"][-1] for commit in hub.history(REPO)] == ["8", "2"]


def test_no_token_anywhere(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that holds the token stays out, and the queue holds none, its log and the errors included (hazard D)."""
    hub.fail("/commit/", status=503, times=1)
    publisher = publish()
    publisher.check()
    checkpoint = write_checkpoint(tmp_path / "out", 2)
    (checkpoint / "training_args.bin").write_bytes(b"\0pickle" + ALICE.encode() + b"\0")
    publisher.submit_checkpoint(checkpoint, 2, "checkpoint", ["README.md"])
    queued = content(publisher.queue.folder)
    assert publisher.flush(SECONDS).complete
    assert "training_args.bin" in caplog.text and ALICE not in caplog.text
    assert "model.safetensors" in hub.files(REPO)
    for files in (hub.files(REPO), content(publisher.queue.folder), queued):
        assert not [name for name, data in files.items() if ALICE.encode() in data or "training_args" in name]


def test_a_full_disk(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training does not notice, nothing half-made is left, and the flush tries again (hazard E)."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    publisher = publish()
    checkpoint = write_checkpoint(tmp_path / "out", 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", full)
        patch.setattr(os, "link", full)
        assert not publisher.submit_checkpoint(checkpoint, 2, "every_save", ["README.md"])
        status = publisher.flush(SECONDS)
        assert not status.complete and status.logs() == {"hub/pending": 1}
        assert "step 2: [Errno 28] No space left" in status.line("out")
        assert list(publisher.queue.folder.glob("*step*")) == list(publisher.queue.folder.glob("new-*")) == []
    assert publisher.flush(SECONDS).logs() == {"hub/pending": 0, "hub/pushed_step": 2}
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))


# ---- The start ----


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_unknown", REPO, "token"),
        (READER, REPO, "403"),
        (ALICE, "bob/model", "403"),
        (READER, "alice/theirs", "403"),
    ],
)
def test_who_may_not_push_learns_it_at_the_start(
    hub: HubServer, publish: Callable[..., Publisher], token: str, repo_id: str, message: str
) -> None:
    """A wrong token, another's namespace, a public repository that one may only read: errors that name the fix."""
    hub.store.create("models", "alice/theirs", private=False, author="alice")
    with pytest.raises(ValueError, match=r"hf auth login") as error:
        publish(repo_id, token=token).check()
    assert message in str(error.value) and token not in str(error.value)


def test_an_impossible_name_needs_no_network(tmp_path: Path) -> None:
    """The name is checked before anything else."""
    with pytest.raises(ValueError, match="hub_model_id='a/b/c'"):
        Publisher("a/b/c", tmp_path)


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"action": "hang"}, {"action": "drop"}])
def test_a_hub_that_is_away_at_the_start_is_no_reason_to_stop(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, fault: dict[str, Any]
) -> None:
    """What may pass is tried again for a bounded time, then put off; later all is sent."""
    hub.fail("/repos/create", **fault)
    publisher = publish("model")
    assert publisher.check(seconds=1.0) is None  # it ends, though the Hub stays away
    checkpoint = write_checkpoint(tmp_path / "out", 2)
    publisher.submit_checkpoint(checkpoint, 2, "every_save", ["README.md"])
    hub.heal()
    assert publisher.flush(SECONDS).pushed_step == 2
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))


# ---- The end ----


@pytest.mark.parametrize("fault", [{"action": "hang"}, {"status": 500}, {"status": 401}])
def test_the_wait_at_the_end_is_bounded_and_push_sends_the_rest(
    hub: HubServer,
    publish: Callable[..., Publisher],
    tmp_path: Path,
    fault: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything is still on disk, the line says how to send it, and another process does so once the Hub is back."""
    hub.fail("/commit/", **fault)
    out = tmp_path / "out"
    publisher = publish(patience=replace(QUICK, request=3600.0))
    checkpoint = write_checkpoint(out, 2)
    publisher.submit_checkpoint(checkpoint, 2, "every_save", ["README.md"])
    until(lambda: publisher.status().error if "status" in fault else hub.count("POST", "/commit/"))
    status = publisher.flush(math.inf if fault.get("status") == 401 else 1.0)  # a refusal ends the wait
    assert status.waiting == (2,) and not status.complete
    assert "step 2" in status.line(out) and f"hf-nexus push {out}" in status.line(out)
    assert ("status" in fault) == (str(fault.get("status")) in status.line(out))
    publisher.close()  # while the Hub hangs
    hub.heal()
    with impatient_client(monkeypatch, xet=False):
        assert drain(out / QUEUE_NAME, token=ALICE, endpoint=hub.endpoint, patience=QUICK) is None
    assert Status.read(out / QUEUE_NAME).line(out) == "On the Hub (alice/model@main): step 2."
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))


def test_drain_to_another_branch_tells_what_stayed_behind(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up after some attempts, says why, and goes on where it stopped."""
    checkpoint = write_checkpoint(tmp_path, 2)
    files, slots = checkpoint_files(checkpoint, "every_save")
    UploadQueue(tmp_path / QUEUE_NAME).add(files, slots, 2, "title", Target(REPO))
    (tmp_path / QUEUE_NAME / "old-000001-step-1" / "files").mkdir(parents=True)  # of a sender that was killed
    hub.fail("/commit/", status=503, times=2)
    options: dict[str, Any] = {"token": ALICE, "endpoint": hub.endpoint, "patience": QUICK, "revision": "later"}
    with impatient_client(monkeypatch, xet=False):
        assert "503" in str(drain(tmp_path / QUEUE_NAME, attempts=2, **options))
        assert drain(tmp_path / QUEUE_NAME, **options) is None
        assert drain(tmp_path / "absent", **options) is None
    assert [commit["title"] for commit in hub.history(REPO, "later")] == ["title"]
    assert {path.name for path in (tmp_path / QUEUE_NAME).iterdir()} <= {"lock", "state.json"}
    assert hub.history(REPO) == []


def test_one_queue_has_one_sender(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run sends, nobody else does."""
    hub.fail("/commit/", action="hang")
    publisher = publish(patience=replace(QUICK, request=30.0))
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    until(lambda: hub.count("POST", "/commit/"))
    with impatient_client(monkeypatch, xet=False), pytest.raises(QueueBusyError, match="Another process"):
        drain(publisher.queue.folder, token=ALICE, endpoint=hub.endpoint, lock_timeout=0.2)


# ---- Processes that die ----

_RUN = """
import sys, time
from pathlib import Path
from hf_nexus.hub.publisher import Publisher
from tests.hub_runs import QUICK, write_checkpoint
out = Path(sys.argv[1])
publisher = Publisher("alice/model", out, token=sys.argv[2], endpoint=sys.argv[3], patience=QUICK)
publisher.submit_checkpoint(write_checkpoint(out, 2), 2, "checkpoint", ["README.md"])
print("queued", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("method", "where"), [("PUT", "/__lfs/"), ("POST", "/commit/")])
def test_kill_9_in_the_middle_of_an_upload(
    hub: HubServer, tmp_path: Path, method: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run: the process that sends ends with it, and what it was sending is sent later, once."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hub.fail(where, action="hang", times=1)
    out = tmp_path / "out"
    command = [sys.executable, "-c", _RUN, str(out), ALICE, hub.endpoint]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert run.stdout is not None and run.stdout.readline() == "queued\n"
    until(lambda: hub.count(method, where))
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert Status.read(out / QUEUE_NAME).waiting == (2,)
    shutil.rmtree(out / "checkpoint-2")
    with impatient_client(monkeypatch, xet=False):
        assert drain(out / QUEUE_NAME, token=ALICE, endpoint=hub.endpoint, patience=QUICK) is None
    assert [commit["title"] for commit in hub.history(REPO)] == ["Training in progress, step 2"]
    checkpoint = write_checkpoint(tmp_path / "again", 2)
    resumable = {f"last-checkpoint/{name}": data for name, data in content(checkpoint).items()}
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint) | resumable)


def test_the_process_that_sends_is_started_again(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path
) -> None:
    """Whatever killed it."""
    hub.fail("/commit/", action="hang", times=1)
    publisher = publish(patience=replace(QUICK, request=30.0))
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    until(lambda: hub.count("POST", "/commit/"))
    process = publisher._child._process
    assert process is not None
    process.kill()
    process.wait()
    assert publisher.flush(SECONDS).pushed_step == 2


@pytest.mark.parametrize("where", ["/commit/", "/xet-write-token/"])
def test_an_upload_that_never_ends_is_ended(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, where: str
) -> None:
    """What has no timeout of its own (here: one of an hour; hf_xet) has the deadline of the job."""
    hub.fail(where, action="hang", times=1)
    patience = Patience(request=3600.0, first_retry=0.05, last_retry=0.2, upload=1.0)
    publisher = publish(patience=patience)
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    assert publisher.flush(SECONDS).pushed_step == 2
    assert [commit["title"] for commit in hub.history(REPO)] == ["Training in progress, step 2"]


def test_what_cannot_be_started_costs_nothing_but_a_warning(
    publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for another process: the checkpoint waits on disk."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    publisher = publish()
    assert publisher.check() is None
    assert publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    assert publisher.flush(0.3).waiting == (2,)


def test_the_state_is_plain_data(hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path) -> None:
    """What a trainer's state keeps of it survives JSON."""
    publisher = publish()
    assert json.loads(json.dumps(vars(publisher.status())))["pushed_step"] is None
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text(CARD)
    publisher.submit(0, "only a card")
    assert publisher.flush(SECONDS).logs() == {"hub/pending": 0, "hub/pushed_step": 0}
