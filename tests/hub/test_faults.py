"""The failure table: whatever fails between a queue and the Hub, in the end the Hub has what was saved, once."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_nexus.hub.contents import checkpoint_files, files_below
from hf_nexus.hub.job import Job, SpoiledJobError, Target
from hf_nexus.hub.queue import QUEUE_NAME, UploadQueue
from hf_nexus.hub.uploader import CardRefusedError, Uploader, is_permanent
from tests.support.hub.runs import REPO, api, digests, impatient_client, model_of, write_checkpoint
from tests.support.hub.server import HubServer

LFS, XET = ("lfs",), ("xet",)  # the transfer paths that a fault can meet
BOTH = LFS + XET


@pytest.fixture(params=BOTH)
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server and a client on either transfer path."""
    with impatient_client(monkeypatch, xet=request.param == "xet"), HubServer(tmp_path / "hub") as hub:
        yield hub


def queue_step(out: Path, step: int, strategy: str = "every_save") -> tuple[UploadQueue, Job]:
    """A queue with one more checkpoint and its card."""
    queue, checkpoint = UploadQueue(out / QUEUE_NAME), write_checkpoint(out, step)
    files, slots = checkpoint_files(checkpoint, strategy)
    files |= files_below(out / "README.md", "README.md")
    return queue, queue.add(files, slots, step, f"step {step}", Target(REPO), write_once=checkpoint)


def passes(uploader: Uploader, at_most: int) -> Exception | None:
    """Try as the process beside a run does."""
    for _ in range(at_most):
        failure = uploader.send_pending()
        if failure is None:
            break
    return failure


# ---- Faults that pass ----

INFO = f"/api/models/{REPO}$"

TRANSIENT: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "create 503": (BOTH, "/repos/create", {"status": 503, "times": 1}),
    "create 429": (BOTH, "/repos/create", {"status": 429, "times": 2}),
    "create: answer lost": (BOTH, "/repos/create", {"action": "lose", "times": 1}),
    "info 500": (BOTH, INFO, {"status": 500, "times": 1}),
    "info: proxy's page": (BOTH, INFO, {"status": 502, "times": 1, "body": "<html>Bad Gateway</html>"}),
    "card 502, HTML": (BOTH, "/validate-yaml", {"status": 502, "times": 1, "body": "<html>Bad Gateway</html>"}),
    "card 503": (BOTH, "/validate-yaml", {"status": 503, "times": 2}),
    "preupload 429": (BOTH, "/preupload/", {"status": 429, "times": 1, "headers": {"Retry-After": "1"}}),
    "preupload 500": (BOTH, "/preupload/", {"status": 500, "times": 8}),
    "batch 503": (LFS, "/objects/batch", {"status": 503, "times": 8}),
    "content 500": (LFS, "/__lfs/", {"status": 500, "times": 8, "method": "PUT"}),
    "content dropped": (LFS, "/__lfs/", {"action": "drop", "times": 8, "method": "PUT"}),
    "verify 404": (LFS, "/verify", {"status": 404, "times": 1}),
    "xet token 503": (XET, "/xet-write-token/", {"status": 503, "times": 1}),
    "commit 500": (BOTH, "/commit/", {"status": 500, "times": 2}),
    "commit 408": (BOTH, "/commit/", {"status": 408, "times": 1}),
    "commit 429": (BOTH, "/commit/", {"status": 429, "times": 1}),
    "commit 409": (BOTH, "/commit/", {"status": 409, "times": 3}),
    "commit 412": (BOTH, "/commit/", {"status": 412, "times": 3}),
    "commit dropped": (BOTH, "/commit/", {"action": "drop", "times": 1}),
    "commit: answer lost": (BOTH, "/commit/", {"action": "lose", "times": 1}),
    "commit hangs": (BOTH, "/commit/", {"action": "hang", "times": 1}),
    "commit late": (BOTH, "/commit/", {"action": "slow", "times": 1, "seconds": 1.3}),
    "info hangs": (BOTH, INFO, {"action": "hang", "times": 1}),
    "content hangs": (LFS, "/__lfs/", {"action": "hang", "times": 1, "method": "PUT"}),
}


@pytest.mark.parametrize(
    ("hub", "name"), [(path, name) for name, (paths, _, _) in TRANSIENT.items() for path in paths], indirect=["hub"]
)
def test_faults_that_pass_leave_one_commit_with_what_was_saved(hub: HubServer, tmp_path: Path, name: str) -> None:
    """The Hub's content equals the checkpoint, and there is one commit however often it was tried."""
    _, where, fault = TRANSIENT[name]
    out = tmp_path / "out"
    queue, _ = queue_step(out, 2)
    hub.fail(where, **fault)
    uploader = Uploader(queue, api(hub))
    for _ in range(5):
        failure = uploader.send_pending()
        assert failure is None or not is_permanent(failure), failure
    assert failure is None, failure
    assert any(entry["fault"] for entry in hub.log), "the fault was not met"
    assert queue.jobs() == []
    assert "error" not in queue.state()
    time.sleep(0.5 * (name == "commit late"))  # it must not be made after all
    assert [commit["title"] for commit in hub.history(REPO)] == ["step 2"]
    assert digests(hub.files(REPO)) == digests(model_of(out / "checkpoint-2"))


# ---- Faults that stay ----


@pytest.mark.parametrize(
    ("where", "status"),
    [("/commit/", 401), ("/commit/", 403), ("/commit/", 500), ("/repos/create", 403), ("/preupload/", 404)],
)
def test_faults_that_stay_leave_all_on_disk(hub: HubServer, tmp_path: Path, where: str, status: int) -> None:
    """Nothing is lost while the Hub refuses, the error is written down, and all is sent once it no longer does."""
    out = tmp_path / "out"
    queue, job = queue_step(out, 2)
    saved = digests({name: path.read_bytes() for name, path in job.files().items()})
    hub.fail(where, status=status)
    uploader = Uploader(queue, api(hub))
    failure = passes(uploader, 3)
    assert failure is not None
    assert is_permanent(failure) == (status in (401, 403))
    [waiting] = queue.jobs()
    assert digests({name: path.read_bytes() for name, path in waiting.files().items()}) == saved
    assert str(status) in queue.state()["error"]["text"]
    assert queue.state()["error"]["permanent"] == (status in (401, 403))
    shutil.rmtree(out / "checkpoint-2")
    hub.heal()
    assert uploader.send_pending() is None
    assert digests(hub.files(REPO)) == saved
    assert len(hub.history(REPO)) == 1


def test_refused_connections(hub: HubServer, tmp_path: Path) -> None:
    """A server that is not there, then comes back under the same address."""
    port = hub.httpd.server_address[1]
    queue, job = queue_step(tmp_path / "out", 2)
    saved = digests({name: path.read_bytes() for name, path in job.files().items()})
    hub.httpd.shutdown()
    hub.httpd.server_close()
    uploader = Uploader(queue, api(hub))
    assert passes(uploader, 2) is not None
    with HubServer(tmp_path / "hub", port=port) as again:
        assert uploader.send_pending() is None
        assert digests(again.files(REPO)) == saved


def test_a_refused_job_lets_the_others_pass(hub: HubServer, tmp_path: Path) -> None:
    """The newest goes first; an older one that the Hub refuses for good blocks nothing."""
    out = tmp_path / "out"
    for step in (2, 4, 6):
        queue, _ = queue_step(out, step, "all_checkpoints")
    hub.fail("/commit/", status=403, times=1, skip=1)
    uploader = Uploader(queue, api(hub))
    failure = uploader.send_pending()
    assert failure is not None and is_permanent(failure)
    assert [commit["title"] for commit in hub.history(REPO)] == ["step 2", "step 6"]
    assert uploader.send_pending() is None
    files = hub.files(REPO)
    for step in (2, 4, 6):
        for name, data in files_below(out / f"checkpoint-{step}", f"checkpoint-{step}").items():
            assert files[name] == data.read_bytes(), name
    assert files["config.json"] == b'{"step": 6}'  # older ones did not renew the root


# ---- Bad cards ----


@pytest.mark.parametrize("found_by", ["us", "validate-yaml", "the commit"])
def test_a_bad_card_costs_nothing_but_the_card(hub: HubServer, tmp_path: Path, found_by: str) -> None:
    """The weights go, the card stays behind with its reason; mended in the queue, it goes too."""
    out = tmp_path / "out"
    queue, _ = queue_step(out, 2, "checkpoint")
    card = queue.jobs()[0].files()["README.md"]
    good = card.read_text()
    if found_by == "us":
        card.write_text("---\nmodel-index: nonsense\n---\n")
    elif found_by == "validate-yaml":
        hub.fail("/validate-yaml", status=400, body='{"errors": [{"message": "no"}], "warnings": []}')
    else:
        hub.fail("/commit/", status=400, times=1)
        hub.fail("/validate-yaml", status=400, skip=1, body='{"errors": [{"message": "no"}], "warnings": []}')
    uploader = Uploader(queue, api(hub))
    for _ in range(2):
        failure = uploader.send_pending()
        assert isinstance(failure, CardRefusedError) and is_permanent(failure)
    files = hub.files(REPO)
    assert "README.md" not in files
    assert files["last-checkpoint/optimizer.pt"] == (out / "checkpoint-2/optimizer.pt").read_bytes()
    [waiting] = queue.jobs()
    assert list(waiting.files()) == ["README.md"] and str(waiting.files()["README.md"]) in str(failure)
    if found_by == "us":
        assert hub.count("POST", "/validate-yaml") == 0
    hub.heal()
    waiting.files()["README.md"].write_text(good)
    assert uploader.send_pending() is None
    assert hub.files(REPO) == {**files, "README.md": good.encode()}


# ---- Disks ----


@pytest.mark.parametrize("how", ["overwritten", "gone"])
def test_what_is_no_longer_what_was_saved_is_never_sent(hub: HubServer, tmp_path: Path, how: str) -> None:
    """A run that resumed earlier writes the same files again: what was saved before is lost, and said so."""
    out = tmp_path / "out"
    queue, job = queue_step(out, 2)
    if how == "overwritten":
        with open(out / "checkpoint-2/model.safetensors", "r+b") as file:
            file.write(b"something else")
    else:
        job.files()["config.json"].unlink()
    with pytest.raises(SpoiledJobError, match=how):
        job.verify(job.files())
    assert Uploader(queue, api(hub)).send_pending() is None
    assert hub.history(REPO) == []
    assert queue.jobs() == [] and how in queue.state()["lost"][0]


def test_a_file_that_is_overwritten_while_it_is_sent(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read may be half of each; it is not committed."""
    queue, _ = queue_step(tmp_path / "out", 2)
    client = api(hub)
    preupload = client.preupload_lfs_files

    def overwrite(*args: Any, **kwargs: Any) -> None:
        with open(tmp_path / "out/checkpoint-2/model.safetensors", "r+b") as file:
            file.write(b"something else")
        preupload(*args, **kwargs)

    monkeypatch.setattr(client, "preupload_lfs_files", overwrite)
    assert Uploader(queue, client).send_pending() is None
    assert hub.history(REPO) == []
    assert "overwritten" in queue.state()["lost"][0]


def test_a_state_that_cannot_be_written_stops_nothing(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk jobs are still sent, and once each."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    queue, _ = queue_step(tmp_path / "out", 2)
    queue_step(tmp_path / "out", 4, "all_checkpoints")
    monkeypatch.setattr("hf_nexus.hub.queue.write_atomic", full)
    hub.fail("/commit/", action="lose", times=1)
    assert passes(Uploader(queue, api(hub)), 3) is None
    assert [commit["title"] for commit in hub.history(REPO)] == ["step 4"]
    assert hub.files(REPO)["config.json"] == b'{"step": 4}'


# ---- Several at once ----


def test_two_runs_push_to_one_repository(hub: HubServer, tmp_path: Path) -> None:
    """Each makes its own commits, once each, whatever the other does; the last of one of them is what remains."""

    def run(name: str) -> None:
        for step in (2, 4, 6):
            queue, checkpoint = UploadQueue(tmp_path / name / QUEUE_NAME), write_checkpoint(tmp_path / name, step)
            files, slots = checkpoint_files(checkpoint, "checkpoint")
            files["name.txt"] = tmp_path / name / "name.txt"
            files["name.txt"].write_text(f"{name} {step}")
            queue.add(files, slots, step, f"{name} {step}", Target(REPO), write_once=checkpoint)
            failures.append(passes(Uploader(queue, api(hub)), 10))

    failures: list[Exception | None] = []
    hub.fail("/commit/", action="lose", times=2, skip=1)
    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [None] * 6
    titles = [commit["title"] for commit in hub.history(REPO)]
    assert set(titles) == {f"{name} {step}" for name in ("one", "two") for step in (2, 4, 6)}
    assert titles[0] in ("one 6", "two 6")
    files, name = hub.files(REPO), titles[0].split()[0]
    assert files["name.txt"] == titles[0].encode()
    assert files["model.safetensors"] == (tmp_path / name / "checkpoint-6/model.safetensors").read_bytes()
