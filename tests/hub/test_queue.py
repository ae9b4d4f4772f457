"""The upload queue: jobs are what was saved, the newest is never dropped, and damaged jobs block nothing."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.hub.job import Target
from hf_nexus.hub.publisher import checkpoint_files
from hf_nexus.hub.queue import QUEUE_NAME, QueueStatus, UploadQueue, _inodes, sending
from tests.support.hub.runs import REPO, content, digests, write_checkpoint


@settings(max_examples=30)
@given(
    st.lists(st.sets(st.sampled_from(["", "last-checkpoint", "checkpoint-2", "checkpoint-4"]), min_size=1), max_size=6)
)
def test_pruning_keeps_the_newest_job_of_each_folder(
    tmp_path_factory: pytest.TempPathFactory, jobs: list[set[str]]
) -> None:
    """After any sequence of jobs, exactly the newest job of each folder of the repository is pending."""
    folder = tmp_path_factory.mktemp("queue")
    (folder / "file").write_text("content")
    queue = UploadQueue(folder / "queue")
    newest: dict[str, int] = {}
    for step, slots in enumerate(jobs):
        files = {f"{slot}/file".lstrip("/"): folder / "file" for slot in slots}
        newest |= dict.fromkeys(slots, step)
        queue.add(files, tuple(sorted(slots)), step, "title", Target(REPO))
        queue.prune()
    assert sorted((slot, job.step) for job, slots in queue.pending() for slot in slots) == sorted(newest.items())
    assert {job.step for job in queue.jobs()} == set(newest.values())


def test_a_save_reads_the_run_folder_at_most_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training prunes after each save. The folder may hold thousands of files, and the queue many jobs."""
    walks: list[Path] = []
    monkeypatch.setattr("hf_nexus.hub.queue._inodes", lambda run: [walks.append(run), *_inodes(run)][1:])
    queue = UploadQueue(tmp_path / QUEUE_NAME)
    for step in range(4):
        checkpoint = write_checkpoint(tmp_path, step)
        queue.add(*checkpoint_files(checkpoint, "all_checkpoints"), step, "title", Target(REPO), write_once=checkpoint)
        walks.clear()
        queue.prune()
        assert len(walks) == min(step, 1)
    assert len(queue.jobs()) == len(queue.pending()) == 4 and len(walks) == 2 and queue.refused() == []


def test_a_job_holds_what_was_saved_when_it_was_queued(tmp_path: Path) -> None:
    """Rotation and later saves of the same files do not change it (hazards B and C)."""
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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_sent_without(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with sending(tmp_path / QUEUE_NAME):
        pass
    assert "cannot be locked" in caplog.text and os.listdir(tmp_path / QUEUE_NAME) == ["lock"]


def test_an_unreadable_job_blocks_no_other(tmp_path: Path) -> None:
    """A crash of the machine can leave such a job. Its number is not used again."""
    (tmp_path / "file").write_text("content")
    queue = UploadQueue(tmp_path / QUEUE_NAME)
    broken, kept = (queue.add({"file": tmp_path / "file"}, (name,), 2, "title", Target(REPO)) for name in ("a", "b"))
    (broken.path / "job.json").write_text("")
    assert [job.number for job in UploadQueue(tmp_path / QUEUE_NAME).jobs()] == [kept.number]
    (kept.path / "job.json").write_text("")
    again = UploadQueue(tmp_path / QUEUE_NAME).add({"file": tmp_path / "file"}, ("a",), 2, "title", Target(REPO))
    assert again.number > kept.number


# ---- Queues that another user has written ----


def _job(folder: Path, number: int = 1, name: str = "file", **fields: Any) -> Path:
    """Write a job by hand. Without other `fields` it is a valid one, except for its target and its missing file."""
    job = folder / f"{number:06d}-step-{number}"
    (job / "files").mkdir(parents=True)
    whole = {"step": number, "message": "title", "slots": [""], "stamps": {name: None}, "target": {"repo_id": REPO}}
    (job / "job.json").write_text(json.dumps(whole | fields))
    return job


def _good(tmp_path: Path) -> UploadQueue:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "file").write_text("content")
    queue = UploadQueue(tmp_path / QUEUE_NAME)
    queue.add({"file": tmp_path / "file"}, ("",), 1, "title", Target(REPO))
    return queue


ODD = {
    "truncated": '{"step": 2, "mess',
    "empty": "",
    "not a mapping": "[1, 2]",
    "a number": "7",
    "deep": "[" * 100_000,
    "many digits": '{"step": ' + "9" * 5000 + "}",
    "not text": "\udcff",
    "a missing field": '{"step": 2}',
    "an unknown field": {"endpoint": "http://elsewhere"},
    "a wrong step": {"step": "2"},
    "wrong slots": {"slots": 7},
    "wrong stamps": {"stamps": ["file"]},
    "a wrong stamp": {"stamps": {"file": "now"}},
    "a target without a name": {"target": {}},
    "a target that is text": {"target": REPO},
    "a wrong visibility": {"target": {"repo_id": REPO, "private": "no"}},
    "an absolute name": {"stamps": {"/etc/passwd": None}},
    "a Windows path": {"stamps": {"C:\\secret": None}},
    "a parent folder": {"stamps": {"a/../../../../secret": None}},
    "an empty name": {"stamps": {"": None}},
    "the folder itself": {"stamps": {".": None}},
    "a folder that the client refuses": {"stamps": {"a/.git/config": None}},
    "the cache of a download": {"stamps": {".cache/file": None}},
    "no character": {"stamps": {"a\0b": None}},
    "a control character": {"stamps": {"a\x1b[31mb": None}},
    "half a character": {"stamps": {"\ud800": None}},
    "a slot outside": {"slots": [".."]},
}


@pytest.mark.parametrize("content", ODD.values(), ids=list(ODD))
def test_an_odd_job_is_refused_and_blocks_no_other(tmp_path: Path, content: Any) -> None:
    queue = _good(tmp_path)
    odd = _job(queue.folder, 2, **(content if isinstance(content, dict) else {}))
    if isinstance(content, str):
        (odd / "job.json").write_text(content, errors="surrogateescape")
    [reason] = queue.refused()
    assert str(odd) in reason and "is not an upload job" in reason and len(reason) < 1000
    assert [job.number for job in queue.jobs()] == [job.number for job, slots in queue.pending() if slots] == [1]


def _link(job: Path, secret: Path) -> None:
    (job / "files/file").symlink_to(secret)


def _link_folder(job: Path, secret: Path) -> None:
    (job / "files").rmdir()
    (job / "files").symlink_to(secret.parent)


def _link_parent(job: Path, secret: Path) -> None:
    (job / "files/a").symlink_to(secret.parent)


def _pipe(job: Path, secret: Path) -> None:
    os.mkfifo(job / "files/file")


def _folder(job: Path, secret: Path) -> None:
    (job / "files/file").mkdir()


def _hard_link(job: Path, secret: Path) -> None:
    os.link(secret, job / "files/file")


ATTACKS = [_link, _link_folder, _link_parent, _pipe, _folder, _hard_link]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_file_from_outside_of_the_run_is_not_sent(tmp_path: Path, attack: Any) -> None:
    """A newer job that is refused does not replace an older one, whose file is sent."""
    secret = tmp_path / "home/file"
    secret.parent.mkdir()
    secret.write_text("secret")
    queue = _good(tmp_path / "run")
    name = "a/file" if attack is _link_parent else "file"
    attack(_job(queue.folder, 2, name), secret)
    [reason] = queue.refused()
    assert "000002-step-2" in reason
    queue.prune()
    assert [job.number for job, slots in queue.pending() if slots] == [1]
    assert secret.read_text() == "secret"


def test_a_linked_checkpoint_of_the_run_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other names are in the output folder, until rotation deletes them."""
    checkpoint = write_checkpoint(tmp_path, 2)
    queue = UploadQueue(tmp_path / QUEUE_NAME)
    job = queue.add(*checkpoint_files(checkpoint, "checkpoint"), 2, "title", Target(REPO), write_once=checkpoint)
    assert job.files()["model.safetensors"].stat().st_nlink > 1 and queue.refused() == []
    walk = _inodes
    monkeypatch.setattr("hf_nexus.hub.queue._inodes", lambda run: [shutil.rmtree(checkpoint, True), *walk(run)])
    assert queue.refused() == [], "during the check"
    assert queue.refused() == []


@pytest.mark.parametrize("missed", [1, 2])
def test_a_checkpoint_that_moves_refuses_no_job_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missed: int
) -> None:
    """Rotation moves it from a folder that is counted later to one that was counted before."""
    checkpoint = write_checkpoint(tmp_path, 2)
    queue = UploadQueue(tmp_path / QUEUE_NAME)
    queue.add(*checkpoint_files(checkpoint, "checkpoint"), 2, "title", Target(REPO), write_once=checkpoint)
    walk, counts = _inodes, itertools.count()
    monkeypatch.setattr("hf_nexus.hub.queue._inodes", lambda run: walk(queue.folder if next(counts) < missed else run))
    assert len(queue.refused()) == (missed > 1), "during the check"
    assert queue.refused() == []


@pytest.mark.skipif(not hasattr(os, "chown") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["", "job.json", "files/file", "../../_hub_targets.json"])
def test_jobs_of_another_user_need_an_approval(tmp_path: Path, what: str) -> None:
    queue = _good(tmp_path)
    os.chown(queue.jobs()[0].path / what, 1234, -1)
    [reason] = queue.refused()
    assert "belongs to the user 1234" in reason and "--yes" in reason and queue.pending() == []
    asked: list[str] = []
    approved = UploadQueue(queue.folder, approve=lambda job, why: not asked.append(why))
    assert len(approved.pending()) == len(approved.pending()) == 1
    assert asked == ["it belongs to the user 1234"]


def test_a_target_is_of_the_run_or_of_the_command_line(tmp_path: Path) -> None:
    """`job.json` alone decides neither the repository nor its visibility."""
    queue = _good(tmp_path)
    for number, target in enumerate(({"repo_id": "alice/other"}, {"repo_id": REPO, "private": False}), 2):
        (_job(queue.folder, number, target=target) / "files/file").write_text("content")
    assert [job.number for job, _ in queue.pending()] == [1] and len(queue.refused()) == 2
    given = UploadQueue(queue.folder, {"repo_id": "alice/given", "private": True})
    assert {given.destination(job) for job in given.jobs()} == {Target("alice/given", True)}
    assert given.refused() == []
    (tmp_path / "_hub_targets.json").unlink()
    assert len(queue.refused()) == 3


def test_a_log_that_blocks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / QUEUE_NAME).mkdir()
    os.mkfifo(tmp_path / QUEUE_NAME / "uploader.log")
    with pytest.raises(ValueError, match=r"uploader\.log is a link or something else"):
        UploadQueue(tmp_path / QUEUE_NAME)


@pytest.mark.parametrize("name", [".", "lock", "uploader.log"])
def test_a_queue_behind_a_link_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / QUEUE_NAME / name
    link.parent.mkdir(exist_ok=True) if name != "." else None
    Path(os.path.normpath(link)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        UploadQueue(tmp_path / QUEUE_NAME)


def test_a_link_to_a_whole_job_is_refused(tmp_path: Path) -> None:
    queue = _good(tmp_path / "run")
    link = queue.folder / "000002-step-2"
    link.symlink_to(_job(tmp_path / "elsewhere", 2))
    [reason] = queue.refused()
    assert str(link) in reason and "it is a link" in reason


def test_links_in_a_queue_are_not_followed(tmp_path: Path) -> None:
    """Neither by a new job nor by a deletion."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("kept")
    queue = _good(tmp_path / "run")
    for name in (f"new-{os.getpid()}", "old-1", "000009-step-9"):
        (queue.folder / name).symlink_to(victim)
    (queue.folder / "state.json.tmp").symlink_to(victim / "file")
    queue.add({"file": tmp_path / "run/file"}, ("",), 2, "title", Target(REPO))
    queue.finish_deletions()
    queue.prune()
    queue.write_state({})
    assert content(victim) == {"file": b"kept"}


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "7", '{"sent": 7}', '{"sent": {"a": {"": "x"}}}', '{"pushed": {}}', '{"error": {"text": 3}}'),
        *('{"lost": "all"}', '{"refused": [3]}', '{"pushed": [1]}', "[" * 100_000),
    ],
)
def test_an_odd_state_is_ignored(tmp_path: Path, text: str) -> None:
    queue = _good(tmp_path)
    (queue.folder / "state.json").write_text(text)
    assert queue.state() == {} and len(queue.pending()) == 1
    assert QueueStatus.read(queue.folder).waiting == (1,)


def test_a_status_has_no_terminal_codes(tmp_path: Path) -> None:
    queue = _good(tmp_path)
    texts = {"error": {"text": "\x1b[31mbad\x07", "step": 1, "permanent": True, "time": 1.0}}
    queue.write_state({**texts, "lost": ["\x1b]0;title\x07gone"], "refused": ["\x9bno\nway"]})
    line = QueueStatus.read(queue.folder).line("out")
    assert line.isprintable() and "gone" in line and "no way" in line


@pytest.mark.parametrize("first", ["state", "waiting"])
def test_a_status_never_misses_a_job_that_is_sent_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    queue = _good(tmp_path)
    (job,), read = queue.jobs(), getattr(UploadQueue, first)

    def then_sent(self: UploadQueue) -> Any:
        found = read(self)
        monkeypatch.undo()
        queue.write_state({"pushed": {"step": 1, "commit": "c0ffee", "repo_id": REPO, "revision": None}})
        queue.remove(job)
        return found

    monkeypatch.setattr(UploadQueue, first, then_sent)
    status = QueueStatus.read(queue.folder)
    assert status.waiting or status.pushed_step == 1


def test_the_command_that_sends_the_rest_can_be_pasted() -> None:
    status = QueueStatus("alice/model@main", None, None, waiting=(2,), error=None, permanent=False)
    assert status.line("runs/my run").endswith("Send the rest with: hf-nexus push 'runs/my run'")
