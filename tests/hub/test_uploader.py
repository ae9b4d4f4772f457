"""Failures between a queue and the Hub: in the end, the Hub has what was saved, in one commit."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, constants, get_hf_file_metadata, hf_hub_url

from hf_nexus.files import write_atomic
from hf_nexus.hub import retries
from hf_nexus.hub.card import BEGIN, END
from hf_nexus.hub.job import Job, SpoiledJobError, Target
from hf_nexus.hub.publisher import checkpoint_files, files_below
from hf_nexus.hub.queue import QUEUE_NAME, UploadQueue
from hf_nexus.hub.retries import CardRefusedError, is_permanent
from hf_nexus.hub.uploader import Uploader, push_queue
from tests.support.hub.runs import QUICK, REPO, SECONDS, api, digests, impatient_client, model_of, write_checkpoint
from tests.support.hub.server import ALICE, HubServer

LFS, XET = ("lfs",), ("xet",)  # transfer paths that have the request
BOTH = LFS + XET


@pytest.fixture(params=BOTH)
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server, and a client on one of the transfer paths."""
    with impatient_client(monkeypatch, xet=request.param == "xet"), HubServer(tmp_path / "hub") as hub:
        yield hub


def queue_step(out: Path, step: int, strategy: str = "every_save") -> tuple[UploadQueue, Job]:
    """Queue a checkpoint and its card."""
    queue, checkpoint = UploadQueue(out / QUEUE_NAME), write_checkpoint(out, step)
    files, slots = checkpoint_files(checkpoint, strategy)
    files |= files_below(out / "README.md", "README.md")
    return queue, queue.add(files, slots, step, f"step {step}", Target(REPO), write_once=checkpoint)


def send(uploader: Uploader, attempts: int) -> Exception | None:
    """Send with retries, as the upload process does."""
    for _ in range(attempts):
        failure = uploader.send_all()
        if failure is None:
            break
    return failure


# ---- Temporary failures ----

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
def test_a_temporary_failure_leaves_one_complete_commit(hub: HubServer, tmp_path: Path, name: str) -> None:
    """The Hub has the files of the checkpoint, in one commit regardless of the number of attempts."""
    _, where, fault = TRANSIENT[name]
    out = tmp_path / "out"
    queue, _ = queue_step(out, 2)
    hub.fail(where, **fault)
    uploader = Uploader(queue, api(hub))
    for _ in range(5):
        failure = uploader.send_all()
        assert failure is None or not is_permanent(failure), failure
    assert failure is None, failure
    assert any(entry["fault"] for entry in hub.log), "the request did not fail"
    assert queue.jobs() == []
    assert "error" not in queue.state()
    time.sleep(0.5 * (name == "commit late"))  # the late commit must not be made
    assert [commit["title"] for commit in hub.history(REPO)] == ["step 2"]
    assert digests(hub.files(REPO)) == digests(model_of(out / "checkpoint-2"))


# ---- Lasting failures ----


@pytest.mark.parametrize(
    ("where", "status"),
    [("/commit/", 401), ("/commit/", 403), ("/commit/", 500), ("/repos/create", 403), ("/preupload/", 404)],
)
def test_a_lasting_failure_leaves_the_job_on_disk(hub: HubServer, tmp_path: Path, where: str, status: int) -> None:
    """The state has the error, and the job is sent once the Hub accepts it."""
    out = tmp_path / "out"
    queue, job = queue_step(out, 2)
    saved = digests({name: path.read_bytes() for name, path in job.files().items()})
    hub.fail(where, status=status)
    uploader = Uploader(queue, api(hub))
    failure = send(uploader, 3)
    assert failure is not None
    assert is_permanent(failure) == (status in (401, 403))
    [waiting] = queue.jobs()
    assert digests({name: path.read_bytes() for name, path in waiting.files().items()}) == saved
    assert str(status) in queue.state()["error"]["text"]
    assert queue.state()["error"]["permanent"] == (status in (401, 403))
    shutil.rmtree(out / "checkpoint-2")
    hub.heal()
    assert uploader.send_all() is None
    assert digests(hub.files(REPO)) == saved
    assert len(hub.history(REPO)) == 1


def test_a_server_that_is_down_gets_the_job_later(hub: HubServer, tmp_path: Path) -> None:
    """The server comes back under the same address."""
    port = hub.httpd.server_address[1]
    queue, job = queue_step(tmp_path / "out", 2)
    saved = digests({name: path.read_bytes() for name, path in job.files().items()})
    hub.httpd.shutdown()
    hub.httpd.server_close()
    uploader = Uploader(queue, api(hub))
    assert send(uploader, 2) is not None
    with HubServer(tmp_path / "hub", port=port) as again:
        assert uploader.send_all() is None
        assert digests(again.files(REPO)) == saved


def test_a_refused_job_does_not_block_the_others(hub: HubServer, tmp_path: Path) -> None:
    """The newest job is sent first, the older ones although one of them is refused."""
    out = tmp_path / "out"
    for step in (2, 4, 6):
        queue, _ = queue_step(out, step, "all_checkpoints")
    hub.fail("/commit/", status=403, times=1, skip=1)
    uploader = Uploader(queue, api(hub))
    failure = uploader.send_all()
    assert failure is not None and is_permanent(failure)
    assert [commit["title"] for commit in hub.history(REPO)] == ["step 2", "step 6"]
    assert uploader.send_all() is None
    files = hub.files(REPO)
    for step in (2, 4, 6):
        for name, data in files_below(out / f"checkpoint-{step}", f"checkpoint-{step}").items():
            assert files[name] == data.read_bytes(), name
    assert files["config.json"] == b'{"step": 6}'  # the older jobs did not replace the root


# ---- Bad cards ----


@pytest.mark.parametrize("found_by", ["us", "validate-yaml", "the commit"])
def test_a_job_with_an_invalid_card_is_sent_without_it(hub: HubServer, tmp_path: Path, found_by: str) -> None:
    """The card stays in the queue with the reason, and is sent after it was corrected there."""
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
        failure = uploader.send_all()
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
    assert uploader.send_all() is None
    assert hub.files(REPO) == {**files, "README.md": good.encode()}


# ---- Cards that users edit on the Hub ----


def queue_card(out: Path, step: int, above: str = "") -> UploadQueue:
    """Queue a card of ours with a text above it."""
    write_atomic(out / "README.md", f"---\ntags: [run]\n---\n{above}\n{BEGIN}\n\nStep {step}.\n\n{END}\n")
    queue = UploadQueue(out / QUEUE_NAME)
    queue.add(files_below(out / "README.md", "README.md"), ("",), step, f"step {step}", Target(REPO))
    return queue


def edit(hub: HubServer, old: str, new: str) -> None:
    """Edit the card on the Hub, as a user does on its page."""
    text = hub.files(REPO)["README.md"].decode()
    assert old in text
    change = CommitOperationAdd("README.md", text.replace(old, new).encode())
    api(hub).create_commit(REPO, [change], commit_message="an edit")


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_edits_of_a_card_on_the_hub_are_kept(hub: HubServer, tmp_path: Path) -> None:
    """By all later pushes, also of another machine, until the text in the output folder changes."""

    def pushed(out: str, step: int, above: str = "") -> str:
        assert Uploader(queue_card(tmp_path / out, step, above), api(hub)).send_all() is None
        text = hub.files(REPO)["README.md"].decode()
        assert f"Step {step}." in text and text.count(BEGIN) == 1
        return text

    assert "From the start." in pushed("one", 1, "From the start.")
    edit(hub, "From the start.", "From the Hub.")
    edit(hub, "[run]", "[run, by-hand]")
    for out, step, above in (("one", 2, "From the start."), ("one", 3, "From the start."), ("other", 4, "")):
        text = pushed(out, step, above)
        assert "From the Hub." in text and "- by-hand" in text and "From the start." not in text
    text = pushed("one", 5, "From here.")
    assert "From here." in text and "From the Hub." not in text and "- by-hand" in text
    edit(hub, "From here.", "")
    assert "From here." not in pushed("one", 6, "From here.")


@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        ({"status": 503, "times": 2}, True),
        ({"action": "drop", "times": 1}, True),
        ({"status": 403}, False),
        ({"status": 200, "body": f"---\na: [\n---\n{BEGIN}"}, False),
        ({"status": 200, "body": f"---\nlicense: 7\n---\nFrom the Hub.\n{BEGIN}\n{END}"}, False),
    ],
)
@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_a_card_that_cannot_be_read_stops_no_push(
    hub: HubServer, tmp_path: Path, fault: dict[str, Any], kept: bool
) -> None:
    """A temporary failure is retried. Otherwise the card is sent as it is."""
    assert Uploader(queue_card(tmp_path, 1), api(hub)).send_all() is None
    edit(hub, BEGIN, f"From the Hub.\n{BEGIN}")
    hub.fail("/resolve/", **fault)
    assert send(Uploader(queue_card(tmp_path, 2), api(hub)), 5) is None
    assert any(entry["fault"] for entry in hub.log), "the request did not fail"
    assert [commit["title"] for commit in hub.history(REPO)] == ["step 2", "an edit", "step 1"]
    text = hub.files(REPO)["README.md"].decode()
    assert "Step 2." in text and ("From the Hub." in text) == kept


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_a_damaged_card_is_sent_as_it_is(hub: HubServer, tmp_path: Path) -> None:
    queue = queue_card(tmp_path, 1, f"{BEGIN} {END}")
    assert Uploader(queue, api(hub)).send_all() is None
    assert hub.files(REPO)["README.md"] == (tmp_path / "README.md").read_bytes()


# ---- Disks ----


@pytest.mark.parametrize("how", ["overwritten", "gone"])
def test_changed_files_are_never_sent(hub: HubServer, tmp_path: Path, how: str) -> None:
    """A resumed run may write the same files again. The job is then reported as lost."""
    out = tmp_path / "out"
    queue, job = queue_step(out, 2)
    if how == "overwritten":
        with open(out / "checkpoint-2/model.safetensors", "r+b") as file:
            file.write(b"something else")
    else:
        job.files()["config.json"].unlink()
    with pytest.raises(SpoiledJobError, match=how):
        job.verify(job.files())
    assert Uploader(queue, api(hub)).send_all() is None
    assert hub.history(REPO) == []
    assert queue.jobs() == [] and how in queue.state()["lost"][0]


def test_a_file_that_changes_during_the_upload_is_lost(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload may have read parts of both versions, and must not be committed."""
    queue, _ = queue_step(tmp_path / "out", 2)
    client = api(hub)
    preupload = client.preupload_lfs_files

    def overwrite(*args: Any, **kwargs: Any) -> None:
        with open(tmp_path / "out/checkpoint-2/model.safetensors", "r+b") as file:
            file.write(b"something else")
        preupload(*args, **kwargs)

    monkeypatch.setattr(client, "preupload_lfs_files", overwrite)
    assert Uploader(queue, client).send_all() is None
    assert hub.history(REPO) == []
    assert "overwritten" in queue.state()["lost"][0]


def test_a_full_disk_does_not_stop_uploads(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state cannot be written, but each job is sent once."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    queue, _ = queue_step(tmp_path / "out", 2)
    queue_step(tmp_path / "out", 4, "all_checkpoints")
    monkeypatch.setattr("hf_nexus.hub.queue.write_atomic", full)
    hub.fail("/commit/", action="lose", times=1)
    assert send(Uploader(queue, api(hub)), 3) is None
    assert [commit["title"] for commit in hub.history(REPO)] == ["step 4"]
    assert hub.files(REPO)["config.json"] == b'{"step": 4}'


# ---- Several runs ----


def test_two_runs_push_to_one_repository(hub: HubServer, tmp_path: Path) -> None:
    """Each job is committed once, and the branch ends with the last job of one run."""

    def run(name: str) -> None:
        for step in (2, 4, 6):
            queue, checkpoint = UploadQueue(tmp_path / name / QUEUE_NAME), write_checkpoint(tmp_path / name, step)
            files, slots = checkpoint_files(checkpoint, "checkpoint")
            files["name.txt"] = tmp_path / name / "name.txt"
            files["name.txt"].write_text(f"{name} {step}")
            queue.add(files, slots, step, f"{name} {step}", Target(REPO), write_once=checkpoint)
            failures.append(send(Uploader(queue, api(hub)), 10))

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


# ---- hf-nexus push ----


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_push_sends_the_queue_to_another_branch(hub: HubServer, tmp_path: Path) -> None:
    """It ends with the error after some attempts, and the next call continues."""
    checkpoint = write_checkpoint(tmp_path, 2)
    files, slots = checkpoint_files(checkpoint, "every_save")
    UploadQueue(tmp_path / QUEUE_NAME).add(files, slots, 2, "title", Target(REPO))
    (tmp_path / QUEUE_NAME / "old-000001-step-1" / "files").mkdir(parents=True)  # left by a killed sender
    hub.fail("/commit/", status=503, times=2)
    options: dict[str, Any] = {"token": ALICE, "endpoint": hub.endpoint, "retry": QUICK, "revision": "later"}
    status, complete = push_queue(tmp_path, attempts=2, **options)
    assert "503" in str(status.error) and not complete
    assert push_queue(tmp_path, **options)[1]
    with pytest.raises(ValueError, match="absent holds nothing to push"):
        push_queue(tmp_path / "absent", **options)
    assert [commit["title"] for commit in hub.history(REPO, "later")] == ["title"]
    assert {path.name for path in (tmp_path / QUEUE_NAME).iterdir()} <= {"lock", "state.json"}
    assert hub.history(REPO) == []


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_push_sends_all_jobs_but_the_odd_ones(hub: HubServer, tmp_path: Path) -> None:
    """The status names the folders of the others, and the push is not complete."""
    queue, job = queue_step(tmp_path, 2)
    odd, linked, foreign = (queue.folder / f"00000{number}-step-9" for number in (7, 8, 9))
    for path in (odd, linked, foreign):
        shutil.copytree(job.path, path)
    (odd / "job.json").write_text('{"step": 2, "mess')
    (linked / "files/config.json").unlink()
    (linked / "files/config.json").symlink_to("/etc/hosts")
    (foreign / "job.json").write_text((job.path / "job.json").read_text().replace(REPO, "alice/public"))
    options: dict[str, Any] = {"token": ALICE, "endpoint": hub.endpoint, "retry": QUICK}
    status, complete = push_queue(tmp_path, **options)
    assert not complete and status.pushed_step == 2
    assert digests(hub.files(REPO)) == digests(model_of(tmp_path / "checkpoint-2"))
    assert hub.store.load("models", "alice/public") is None
    assert [str(path) in reason for path, reason in zip((odd, linked, foreign), status.refused, strict=True)] == [
        True
    ] * 3
    assert all(str(path) in status.line("out") for path in (odd, linked, foreign))
    for path in (odd, linked, foreign):
        shutil.rmtree(path)
    assert push_queue(tmp_path, **options)[1]


@pytest.mark.parametrize("hub", LFS, indirect=True)
@pytest.mark.parametrize("approved", [True, False])
def test_push_asks_before_it_sends_what_may_be_foreign(hub: HubServer, tmp_path: Path, approved: bool) -> None:
    """The question has the target, the files, and the reason."""
    _, job = queue_step(tmp_path / "run", 2)
    os.link(job.files()["config.json"], tmp_path / "outside")
    asked: list[str] = []
    options: dict[str, Any] = {"token": ALICE, "endpoint": hub.endpoint, "retry": QUICK, "private": True}
    _, complete = push_queue(tmp_path / "run", approve=lambda text: bool(asked.append(text)) or approved, **options)
    assert complete == approved == bool(hub.store.load("models", REPO))
    [question] = asked
    for part in (f"{REPO}@main (if new: private)", "model.safetensors", "config.json is also a file outside"):
        assert part in question


# ---- Hostile and unreachable servers ----


def test_offline_push_ends_at_once_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wait for retries. The message names the variable to unset."""
    queue_step(tmp_path, 2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    status, complete = push_queue(tmp_path, token=ALICE, endpoint="http://127.0.0.1:9")
    assert not complete and "HF_HUB_OFFLINE" in status.line(tmp_path) and status.waiting == (2,)


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_an_answer_without_end_is_an_error(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_LARGEST_ANSWER", 1 << 20)
    hub.fail(INFO, status=200, body="[" + "1," * (1 << 20))
    with pytest.raises(RuntimeError, match="over the limits of 1 MiB"):
        api(hub).model_info(REPO)


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_downloads_work_after_a_push(hub: HubServer, tmp_path: Path) -> None:
    """They read the size in the answer to HEAD, and a stream may be of any size."""
    queue, _ = queue_step(tmp_path / "out", 2)
    assert Uploader(queue, api(hub)).send_all() is None
    for name in ("config.json", "model.safetensors"):
        size = get_hf_file_metadata(hf_hub_url(REPO, name, endpoint=hub.endpoint), token=ALICE).size
        assert size == (tmp_path / "out/checkpoint-2" / name).stat().st_size
        path = api(hub).hf_hub_download(REPO, name, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == (tmp_path / "out/checkpoint-2" / name).read_bytes()


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_a_trickling_answer_is_an_error(hub: HubServer) -> None:
    """Each byte is in time, and the whole answer is not."""
    hub.fail(INFO, action="trickle", seconds=0.3)
    with pytest.raises(RuntimeError, match=r"over the limits of .* and 1 s"):
        api(hub).model_info(REPO)


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_errors_of_a_server_have_no_terminal_codes(
    hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Neither in headers, JSON and text, nor in what the client itself prints."""
    queue, _ = queue_step(tmp_path, 2)
    for number, body in enumerate(("\x1b[31mtext\x07", '{"error": "\\u001b]0;title\\u0007json \\u009b31m"}')):
        headers = {"X-HF-Warning": f"topic{number}; \x1b[31mwarning", "X-Error-Message": "\x1b[2Jheader"}
        hub.fail("/repos/create", status=403, body=body, headers=headers, times=1)
        assert Uploader(queue, api(hub)).send_all() is not None
        assert queue.state()["error"]["text"].isprintable() and "header" in queue.state()["error"]["text"]
    hub.fail("/validate-yaml", status=200, body='{"errors": [], "warnings": [{"message": "\\u001b[31mred"}]}')
    assert Uploader(queue, api(hub)).send_all() is None
    printed = "".join(map(str, (*capfd.readouterr(), *(warning.message for warning in recwarn))))
    assert "red" in printed and "\x1b" not in printed and "\x9b" not in printed


@pytest.mark.parametrize("hub", LFS, indirect=True)
def test_a_push_has_a_deadline(hub: HubServer, tmp_path: Path) -> None:
    """The process ends with one line, also if no request times out."""
    queue_step(tmp_path, 2)
    hub.fail("/commit/", action="hang")
    script = (
        "import sys; from pathlib import Path; from hf_nexus.hub.retries import RetryPolicy\n"
        "from hf_nexus.hub.uploader import push_queue\n"
        "push_queue(Path(sys.argv[1]), token=sys.argv[2], retry=RetryPolicy(upload=1.0, slowest_rate=1e9))"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", script, str(tmp_path), ALICE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1].rpartition("\x1b[A")[2]  # after the bars of the upload, if it has some
    assert last.startswith("error: The upload of step 2 was not complete after 1")
