"""The upload queue: jobs are what was saved, the newest is never dropped, and damaged jobs block nothing."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.hub.job import Target
from hf_nexus.hub.publisher import checkpoint_files
from hf_nexus.hub.queue import QUEUE_NAME, UploadQueue
from tests.support.hub.runs import REPO, digests, write_checkpoint


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
