"""Publishing a training run: saved files arrive on the Hub, and no failure of Hub or disk reaches the training."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import save_file

from hf_nexus.hub.publisher import FinalFlush, Publisher, checkpoint_files
from hf_nexus.hub.queue import QUEUE_NAME, QueueBusyError, UploadQueue
from hf_nexus.hub.uploader import push_queue
from tests.support.hub.runs import (
    CARD,
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
from tests.support.hub.server import ALICE, READER, HubServer
from tests.support.hub.summaries import make_run
from tests.support.tiny import tiny_llama


def test_the_strategy_selects_files_and_folders(tmp_path: Path) -> None:
    """The root holds the model; a folder named by the strategy holds all that resuming needs."""
    checkpoint = write_checkpoint(tmp_path, 2)
    everything = set(content(checkpoint))
    model = everything - {"optimizer.pt", "rng_state.pth", "totals.json"}
    for strategy, folder in {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.items():
        files, slots = checkpoint_files(checkpoint, strategy)
        assert set(files) == model | {f"{folder}/{name}" for name in everything}
        assert slots == ("", folder)
    assert set(checkpoint_files(checkpoint, "every_save")[0]) == model


@pytest.mark.parametrize("transfer", ["lfs", "xet"])
def test_round_trip(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, transfer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints and the end of a run arrive in a private repository and a branch that did not exist."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(transfer == "lfs")))
    out = tmp_path / "out"
    (tmp_path / "here/lock").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")  # the folder of the user has any names
    publisher = publish("model", private=True, revision="dev")
    assert publisher.check() == REPO
    repo = hub.store.load("models", REPO)
    assert repo is not None and repo["private"] and "dev" in repo["branches"]
    for step in (2, 4):
        checkpoint = write_checkpoint(out, step)
        publisher.submit_checkpoint(checkpoint, step, "checkpoint", ["README.md", "absent.png"])
        shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
        assert publisher.flush(SECONDS).complete
    assert digests(hub.files(REPO, "dev")) == digests(
        model_of(checkpoint) | {f"last-checkpoint/{name}": data for name, data in content(checkpoint).items()}
    )
    (out / "model.safetensors").write_bytes(b"final")
    (out / "_scratch").write_text("not for the Hub")
    publisher.submit(6, "End of training")
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


@pytest.mark.slow
def test_from_pretrained_loads_what_was_pushed(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are the same bits on both transfer paths. Card metadata and evaluation results load, too."""
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


@pytest.mark.parametrize("saved", ["root", "checkpoints"])
def test_any_finished_run_can_be_pushed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    """That of another trainer, also if it saved checkpoints only. The pickle of its arguments stays."""
    out = tmp_path / "out"
    for step in (2, 10):
        checkpoint = write_checkpoint(out, step)
    if saved == "root":
        shutil.copytree(checkpoint, out, dirs_exist_ok=True)
        for name in ("optimizer.pt", "rng_state.pth", "totals.json"):
            (out / name).unlink()
        shutil.rmtree(checkpoint)
    (out / "training_args.bin").write_bytes(b"hub_token")
    (out / "pretrain.yaml").write_text("# Of a run\ntraining: {output_dir: /home/alice/My Data/out}\n")
    (out / "closeness.json").write_text('{"model": "/home/alice/out"}')
    (out / "runs").mkdir()
    (out / "runs/events.out.tfevents.1.host").write_bytes(b'"output_dir": "/home/alice/out"')  # of TensorBoard
    expected = model_of(checkpoint if saved == "checkpoints" else out)
    with impatient_client(monkeypatch, xet=False):
        Publisher(REPO, out).queue_run()
        status, complete = push_queue(out, repo_id=REPO, token=ALICE, endpoint=hub.endpoint, retry=QUICK)
    found = hub.files(REPO)
    assert complete and status.pushed_step == 10
    assert yaml.safe_load(found.pop("pretrain.yaml")) == {"training": {"output_dir": "out"}}
    assert json.loads(found.pop("closeness.json")) == {"model": "out"}
    assert digests(found) == digests(expected)


def test_a_configuration_that_multiplies_is_sent_as_text(tmp_path: Path) -> None:
    """Parsed, it would have a billion entries. The folder may come from somebody else."""
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))
    text = f"output_dir: /home/alice/out\nl0: &l0 [x]\n{levels}"
    write_checkpoint(tmp_path, 2)
    (tmp_path / "pretrain.yaml").write_text(text)
    publisher = Publisher(REPO, tmp_path)
    publisher.queue_run()
    (job,) = publisher.queue.jobs()
    assert job.files()["pretrain.yaml"].read_text().strip() == text.replace("/home/alice/out", "out").strip()


def test_only_the_holder_of_a_folder_deletes_unfinished_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that holds it may be writing one."""
    write_checkpoint(tmp_path, 2)
    (unfinished := tmp_path / QUEUE_NAME / "new-7").mkdir(parents=True)

    @contextmanager
    def held(folder: Path) -> Iterator[None]:
        raise ValueError("used by process 7")
        yield

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="process 7"):
        patched.setattr("hf_nexus.hub.publisher.locked", held)
        Publisher(REPO, tmp_path).queue_run()
    assert unfinished.exists()
    Publisher(REPO, tmp_path).queue_run()
    assert not unfinished.exists()


def test_a_call_that_is_being_sent_is_not_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    (publisher := Publisher("alice/first", tmp_path)).queue_run()
    with FileLock(publisher.queue.folder / "lock"), pytest.raises(QueueBusyError, match="Another process is sending"):
        Publisher(REPO, tmp_path).queue_run()
    assert [str(job.target) for job in publisher.queue.jobs()] == ["alice/first@main"]


def test_the_card_of_a_finished_run_names_its_repository(tmp_path: Path) -> None:
    """As at the end of a run with `push_to_hub`. The checkpoint holds a template of peft, and float32 weights."""
    checkpoint = write_checkpoint(tmp_path, 2)
    save_file({"weight": torch.zeros(1 << 16)}, checkpoint / "model.safetensors")
    (checkpoint / "README.md").write_text("# More information needed")
    (tmp_path / "README.md").write_text("# Mine\n")
    make_run(repo_id=None, hyperparameters={"save_dtype": "bfloat16"}).save(tmp_path)
    publisher = Publisher(REPO, tmp_path)
    publisher.queue_run()
    files = publisher.queue.jobs()[0].files()
    card = files["README.md"].read_text()
    assert "# Mine" in card and f'"{REPO}"' in card and "More information" not in card
    assert json.loads(files["run_summary.json"].read_text())["repo_id"] == REPO
    assert files["model.safetensors"].stat().st_size < 1.1 * (1 << 17)


@pytest.mark.parametrize("named", [True, False])
def test_a_push_to_another_repository_names_that_one(tmp_path: Path, named: bool) -> None:
    """Neither the repository of an earlier push that was refused nor that of the run, also in the heading."""
    write_checkpoint(tmp_path, 2)
    make_run(repo_id="alice/first", model_name="My model" if named else "alice/first").save(tmp_path)
    for repo_id in ("bob/refused", REPO):
        publisher = Publisher(repo_id, tmp_path)
        publisher.queue_run()
    (job,) = publisher.queue.jobs()
    card = job.files()["README.md"].read_text()
    assert str(job.target) == f"{REPO}@main" and f'path = "{REPO}"' in card
    assert f"\n# {'My model' if named else REPO}\n" in card and "alice/first" not in card and "refused" not in card
    with pytest.raises(ValueError, match=r"--repo model: the card names the repository\. Pass --repo user/name"):
        Publisher("model", tmp_path).queue_run()


def test_pushes_of_the_run_itself_are_sent_before_its_folder(tmp_path: Path) -> None:
    publisher, checkpoint = Publisher(REPO, tmp_path), write_checkpoint(tmp_path, 2)
    job = publisher.queue.add(*checkpoint_files(checkpoint, "checkpoint"), 2, "Training", publisher.target)
    publisher.queue_run()
    assert publisher.queue.jobs() == [job]


def test_a_corrected_card_of_a_finished_run_is_sent(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the file of the run. Another repository then gets the whole model."""
    expected = model_of(write_checkpoint(out := tmp_path / "out", 2))
    (out / "README.md").write_text("---\nlicense: Apache 2.0\n---\n")
    with impatient_client(monkeypatch, xet=False):
        for repo_id in (REPO, REPO, "alice/other"):
            Publisher(repo_id, out).queue_run()
            status, complete = push_queue(out, repo_id=repo_id, token=ALICE, endpoint=hub.endpoint, retry=QUICK)
            if "README.md" not in hub.files(repo_id):
                assert not complete and f"Correct {out / 'README.md'} and push it again" in (status.error or "")
            (out / "README.md").write_text(CARD)
    assert complete and status.error is None
    for repo_id in (REPO, "alice/other"):
        assert digests(hub.files(repo_id)) == digests(expected)


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    """A copy of a checkpoint is none."""
    checkpoint = write_checkpoint(tmp_path, 12)
    shutil.copytree(write_checkpoint(tmp_path, 5), tmp_path / "checkpoint-5-copy2")
    (publisher := Publisher(REPO, tmp_path)).queue_run()
    (job,) = publisher.queue.jobs()
    assert job.step == 12 and job.files()["config.json"].read_bytes() == (checkpoint / "config.json").read_bytes()


@pytest.mark.parametrize("state", [None, "", "[]", "{}", '{"global_step": null}', '{"global_step": -1}'])
def test_a_run_without_a_readable_state_is_at_its_newest_step(tmp_path: Path, state: str | None) -> None:
    """As one of the stock Trainer after `save_model()`, which saves no state."""
    shutil.copy(write_checkpoint(tmp_path, 2) / "model.safetensors", tmp_path)
    if state is not None:
        (tmp_path / "trainer_state.json").write_text(state)
    (publisher := Publisher(REPO, tmp_path)).queue_run()
    assert [job.step for job in publisher.queue.jobs()] == [2]


def test_a_folder_without_a_model_or_in_use_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="holds no model: give the output_dir of a finished run"):
        Publisher(REPO, tmp_path).queue_run()
    write_checkpoint(tmp_path, 2)
    code = f"from hf_nexus.lock import locked\nwith locked({str(tmp_path)!r}): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="is used by process"):
            Publisher(REPO, tmp_path).queue_run()
        other.stdin.write("\n")
    assert not (tmp_path / QUEUE_NAME).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "notes.txt"])
def test_foreign_files_of_a_finished_run_are_sent_if_approved(tmp_path: Path, name: str) -> None:
    """A hard link to a file outside of the run. Then nothing is written, or the file is copied."""
    out, asked = tmp_path / "out", []
    checkpoint = write_checkpoint(out, 2)
    make_run(repo_id=None).save(out)
    (out / "linked.safetensors").hardlink_to(checkpoint / "model.safetensors")  # inside of the run
    Publisher(REPO, out).queue_run()
    shutil.rmtree(out / QUEUE_NAME)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * (1 << 18))
    (out / name).unlink(missing_ok=True)
    (out / name).hardlink_to(secret)
    publisher = Publisher(REPO, out)
    with pytest.raises(ValueError, match=rf"may not be yours: {name} is also a file outside of .* with hf-nexus push"):
        publisher.queue_run(lambda question: bool(asked.append(question)))
    assert REPO in asked[0] and not (out / QUEUE_NAME).exists() and (out / name).samefile(secret)
    if name != "README.md":  # which is not a card
        publisher.queue_run(lambda question: True)
        assert publisher.queue.refused() == [] and name in publisher.queue.jobs()[0].stamps


def test_a_finished_run_of_another_user_is_sent_if_approved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(REPO, tmp_path)
    write_checkpoint(tmp_path, 2)
    monkeypatch.setattr(UploadQueue, "_owner", os.getuid() + 1)
    with pytest.raises(ValueError, match=f"may not be yours: it belongs to the user {os.getuid()}"):
        publisher.queue_run()


def test_last_checkpoint_holds_one_checkpoint(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path
) -> None:
    """Files that only an earlier checkpoint had are deleted from the folder."""
    publisher = publish()
    for step in (2, 4):
        checkpoint = write_checkpoint(tmp_path / "out", step)
        if step == 2:
            (checkpoint / "rng_state_1.pth").write_bytes(b"of a run with two processes")
        publisher.submit_checkpoint(checkpoint, step, "checkpoint")
        assert publisher.flush(SECONDS).complete
    names = {name.removeprefix("last-checkpoint/") for name in hub.files(REPO) if name.startswith("last-checkpoint/")}
    assert names == set(content(checkpoint))


def test_a_slow_hub_gets_the_newest_save(hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path) -> None:
    """Of the saves during an upload, only the newest stays queued, and none waits (hazard A)."""
    publisher = publish(retry=replace(QUICK, request=SECONDS))
    hub.fail("/commit/", action="hold", times=1)
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save", ["README.md"])
    until(lambda: hub.count("POST", "/commit/"))
    for step in (4, 6, 8):
        checkpoint = write_checkpoint(tmp_path / "out", step)
        publisher.submit_checkpoint(checkpoint, step, "every_save", ["README.md"])
    assert hub.count("POST", "/commit/") == 1 and hub.history(REPO) == [], "it waited for the Hub"
    assert len(publisher.queue.jobs()) <= 2
    hub.heal()
    assert publisher.flush(SECONDS).pushed_step == 8
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))
    assert [commit["title"][-1] for commit in hub.history(REPO)] == ["8", "2"]


def test_the_token_is_never_sent_or_stored(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file with the token is not sent. Queue, log and errors do not contain the token (hazard D)."""
    hub.fail("/commit/", status=503, times=1)
    publisher = publish()
    publisher.check()
    checkpoint = write_checkpoint(tmp_path / "out", 2)
    (checkpoint / "training_args.bin").write_bytes(b"\0pickle" + ALICE.encode() + b"\0")
    publisher.submit_checkpoint(checkpoint, 2, "checkpoint", ["README.md"])
    queued = content(publisher.queue.folder)
    assert publisher.flush(SECONDS).complete
    until(lambda: not list(publisher.queue.folder.glob("old-*")))  # what was sent is being deleted
    assert "training_args.bin" in caplog.text and ALICE not in caplog.text
    assert "model.safetensors" in hub.files(REPO)
    for files in (hub.files(REPO), content(publisher.queue.folder), queued):
        assert not [name for name, data in files.items() if ALICE.encode() in data or "training_args" in name]


def test_links_in_an_output_folder_are_not_sent(
    publish: Callable[..., Publisher], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a link to a file nor the files of a linked folder. A warning names the links."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    checkpoint = write_checkpoint(out, 2)
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    os.mkfifo(checkpoint / "pipe")
    (checkpoint / "not linked\x1b[31m").write_text("A server removes the control character from its answer.")
    for link in (out / "run_summary.json", out / ".eval_results", checkpoint / "linked", checkpoint / "a\\b"):
        link.symlink_to(elsewhere if link.name != "run_summary.json" else elsewhere / "secret")
    publisher = publish()
    publisher.submit_checkpoint(checkpoint, 2, "checkpoint", ["run_summary.json", ".eval_results", "README.md"])
    publisher.submit(2, "title")
    assert not [name for job in publisher.queue.jobs() for name in job.stamps if "secret" in name or "linked" in name]
    assert b"secret" not in content(publisher.queue.folder).values()
    assert "README.md" in publisher.queue.jobs()[0].stamps
    for name in ("run_summary.json", ".eval_results", "linked"):
        assert name in caplog.text


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing can be queued."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", full)
        patch.setattr(os, "link", full)
        yield


def test_a_full_disk_does_not_stop_training(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No incomplete job is left, and `flush` tries again (hazard E)."""
    publisher = publish()
    checkpoint = write_checkpoint(tmp_path / "out", 2)
    with full_disk(monkeypatch):
        publisher.submit_checkpoint(checkpoint, 2, "every_save", ["README.md"])
        status = publisher.flush(SECONDS)
        assert not status.complete and status.logs() == {"hub/pending": 1}
        assert "step 2: [Errno 28] No space left" in status.line("out")
        assert list(publisher.queue.folder.glob("*step*")) == list(publisher.queue.folder.glob("new-*")) == []
    assert publisher.flush(SECONDS).logs() == {"hub/pending": 0, "hub/pushed_step": 2}
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_weights_too_large_for_the_disk_are_sent_later(publish: Callable[..., Publisher], tmp_path: Path) -> None:
    """`safetensors` has its own error. A limit on the size of files stands in for the full disk."""
    import resource

    publisher, checkpoint = publish(dtype="bfloat16"), tmp_path / "out/checkpoint-2"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.zeros(1 << 16)}, checkpoint / "model.safetensors")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        publisher.submit_checkpoint(checkpoint, 2, "every_save")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert publisher.status().logs() == {"hub/pending": 1} and publisher.queue.jobs() == []
    publisher.flush(0.0)
    assert publisher.queue.jobs()[0].files()["model.safetensors"].stat().st_size < 1.1 * (1 << 17)


def test_what_a_full_disk_kept_back_is_queued_at_the_end(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after later saves, which it does not replace. A push to another branch keeps its branch."""
    publisher, first = publish(), write_checkpoint(tmp_path / "out", 2)
    with full_disk(monkeypatch):
        publisher.submit_checkpoint(first, 2, "all_checkpoints", ["README.md"])
        publisher.submit(2, "Elsewhere", revision="dev")
    publisher.submit_checkpoint(last := write_checkpoint(tmp_path / "out", 4), 4, "all_checkpoints", ["README.md"])
    assert publisher.status().logs()["hub/pending"] >= 2
    assert publisher.flush(SECONDS).complete
    folders = {f"{step.name}/{name}": data for step in (first, last) for name, data in content(step).items()}
    assert digests(hub.files(REPO)) == digests(model_of(last) | folders)
    assert [commit["title"] for commit in hub.history(REPO, "dev")] == ["Elsewhere"]
    assert "Elsewhere" not in [commit["title"] for commit in hub.history(REPO)]


def test_the_next_run_of_a_folder_takes_over_its_queue(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path
) -> None:
    """In a notebook, the process of an interrupted cell waits for more, and holds the lock."""
    first = publish()
    FinalFlush(first, SECONDS)
    first.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    until(lambda: first.status().pushed_step == 2)
    second = publish()
    final = FinalFlush(second, SECONDS)
    second.submit_checkpoint(write_checkpoint(tmp_path / "out", 4), 4, "every_save")
    assert second.flush(SECONDS).pushed_step == 4
    final.end()


def test_an_error_that_repeats_is_reported_once(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The answers of the Hub differ in the id of the request only, which the log of the uploads has."""
    for i in range(1, 5):
        hub.fail("/commit/", status=500, times=1, headers={"X-Request-Id": f"Root=1-{i}"})
    publisher = publish()
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    assert publisher.flush(SECONDS).complete
    assert caplog.text.count("failed and will be retried") == 1
    assert "Root=1-1" not in caplog.text and "Root=1-1" in (publisher.queue.folder / "uploader.log").read_text()


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
def test_check_fails_without_write_access(
    hub: HubServer, publish: Callable[..., Publisher], token: str, repo_id: str, message: str
) -> None:
    """A wrong token, a foreign namespace, a repository that is only readable: the errors suggest a fix."""
    hub.store.create("models", "alice/theirs", private=False, author="alice")
    with pytest.raises(ValueError, match=r"hf auth login") as error:
        publish(repo_id, token=token).check()
    assert message in str(error.value) and token not in str(error.value)


@pytest.mark.parametrize(("secret", "logged_in"), [(ALICE, None), ("hf_expired", ALICE)])
def test_a_token_of_a_notebook_reaches_the_upload_process(
    hub: HubServer,
    publish: Callable[..., Publisher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    secret: str,
    logged_in: str | None,
) -> None:
    """Only the notebook can read the secrets of Colab. A token that the process finds itself goes first."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if logged_in is not None:
        monkeypatch.setenv("HF_TOKEN", logged_in)
    monkeypatch.setattr("hf_nexus.hub.uploader_process.is_google_colab", lambda: True)
    monkeypatch.setattr("hf_nexus.hub.uploader_process.get_token", lambda: secret)
    publisher = publish(token=None)
    assert publisher.check() == REPO
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save", ["README.md"])
    assert publisher.flush(SECONDS).pushed_step == 2
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]


def test_an_invalid_name_fails_without_a_network(tmp_path: Path) -> None:
    """The constructor checks the name."""
    with pytest.raises(ValueError, match="hub_model_id='a/b/c'"):
        Publisher("a/b/c", tmp_path)


def test_an_open_pull_request_gets_the_pushes(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path
) -> None:
    """The Hub refuses to make a branch of its name."""
    hub.store.create("models", REPO, private=False, author="alice")
    repo = hub.store.load("models", REPO)
    assert repo is not None
    hub.store.save({**repo, "branches": {**repo["branches"], "refs/pr/1": repo["branches"]["main"]}})
    publisher, checkpoint = publish(revision="refs/pr/1"), write_checkpoint(tmp_path / "out", 2)
    assert publisher.check() == REPO
    publisher.submit_checkpoint(checkpoint, 2, "every_save", ["README.md"])
    assert publisher.flush(SECONDS).pushed_step == 2
    assert digests(hub.files(REPO, "refs/pr/1")) == digests(model_of(checkpoint)) and hub.history(REPO) == []


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503},
        *(pytest.param(f, marks=pytest.mark.slow) for f in ({"status": 429}, {"action": "hang"}, {"action": "drop"})),
    ],
)
def test_a_hub_that_is_down_at_the_start_is_retried_later(
    hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path, fault: dict[str, Any]
) -> None:
    """`check` retries for a bounded time and returns; the saves are sent later."""
    hub.fail("/repos/create", **fault)
    publisher = publish("model")
    assert publisher.check(seconds=0.5) is None
    checkpoint = write_checkpoint(tmp_path / "out", 2)
    publisher.submit_checkpoint(checkpoint, 2, "every_save", ["README.md"])
    hub.heal()
    assert publisher.flush(SECONDS).pushed_step == 2
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))


def test_the_status_is_plain_data(hub: HubServer, publish: Callable[..., Publisher], tmp_path: Path) -> None:
    """It survives JSON, as the trainer state needs."""
    publisher = publish()
    assert json.loads(json.dumps(vars(publisher.status())))["pushed_step"] is None
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text(CARD)
    publisher.submit(0, "only a card")
    assert publisher.flush(SECONDS).logs() == {"hub/pending": 0, "hub/pushed_step": 0}


# ---- The end ----


@pytest.mark.parametrize("fault", [{"action": "hang"}, {"status": 500}, {"status": 401}])
def test_flush_is_bounded_and_push_sends_the_rest(
    hub: HubServer,
    publish: Callable[..., Publisher],
    tmp_path: Path,
    fault: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The status line names the command that sends the queue once the Hub is back."""
    hub.fail("/commit/", **fault)
    out = tmp_path / "out"
    publisher = publish(retry=replace(QUICK, request=3600.0))
    checkpoint = write_checkpoint(out, 2)
    publisher.submit_checkpoint(checkpoint, 2, "every_save", ["README.md"])
    until(lambda: publisher.status().error if "status" in fault else hub.count("POST", "/commit/"))
    status = publisher.flush(math.inf if fault.get("status") == 401 else 0.5)  # a permanent error ends the wait
    assert status.waiting == (2,) and not status.complete
    assert "step 2" in status.line(out) and f"hf-nexus push {out}" in status.line(out)
    assert ("status" in fault) == (str(fault.get("status")) in status.line(out))
    publisher.close()  # while the Hub hangs
    hub.heal()
    with impatient_client(monkeypatch, xet=False):
        status, complete = push_queue(out, token=ALICE, endpoint=hub.endpoint, retry=QUICK)
    assert complete and status.line(out) == "On the Hub (alice/model@main): step 2."
    assert digests(hub.files(REPO)) == digests(model_of(checkpoint))


def test_offline_runs_do_not_wait_for_the_hub(
    publish: Callable[..., Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saves stay on disk, and the status names the variable to unset."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    publisher = publish()
    assert publisher.check() is None
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    status = publisher.flush(math.inf)
    assert status.waiting == (2,) and "HF_HUB_OFFLINE" in status.line("out") and "hf-nexus push" in status.line("out")


_EXIT = """
import sys
from pathlib import Path
from hf_nexus.hub.publisher import FinalFlush, Publisher
from tests.support.hub.runs import QUICK, write_checkpoint
out, endpoint, token, seconds = sys.argv[1:]
publisher = Publisher("alice/model", out, token=token, endpoint=endpoint, retry=QUICK)
FinalFlush(publisher, float(seconds))
publisher.submit_checkpoint(write_checkpoint(Path(out), 2), 2, "every_save")
raise RuntimeError("training failed")
"""


@pytest.mark.parametrize(("hangs", "printed"), [(True, "nothing. Not yet on the Hub: step 2"), (False, "step 2.")])
def test_a_failed_run_flushes_for_a_bounded_time(hub: HubServer, tmp_path: Path, hangs: bool, printed: str) -> None:
    """The process flushes at exit and prints the status, also if the Hub hangs."""
    if hangs:
        hub.fail("/commit/", action="hang")
    command = [sys.executable, "-c", _EXIT, str(tmp_path / "out"), hub.endpoint, ALICE, "1" if hangs else str(SECONDS)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 1 and "training failed" in done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("Uploading step 2 to the Hub, for at most")
    assert last.startswith(f"On the Hub (alice/model@main): {printed}")


def test_the_last_flush_neither_repeats_a_line_nor_a_wait(
    publish: Callable[..., Publisher], hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an incomplete flush, the end of the process does not wait again."""
    hub.fail("/commit/", status=500)
    publisher = publish()
    final = FinalFlush(publisher, math.inf)
    publisher.submit_checkpoint(write_checkpoint(tmp_path / "out", 2), 2, "every_save")
    until(lambda: publisher.status().error)
    assert not final.wait(0.1).complete
    assert capsys.readouterr().out.count("Not yet on the Hub: step 2") == 1
    publisher.close()  # no further error
    final.end()
    assert capsys.readouterr().out == ""
