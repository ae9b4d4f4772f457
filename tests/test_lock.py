"""A locked folder keeps other processes out, and is free once its process is gone."""

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

import pytest

from hf_nexus.lock import HOLDER_NAME, LOCK_NAME, locked


def test_another_process_is_named(tmp_path, hold):
    process = hold(tmp_path)
    with pytest.raises(ValueError, match=rf"process {process.pid} on {socket.gethostname()}, since 20\d\d-"):
        locked(tmp_path).__enter__()
    process.kill()
    process.wait()
    with locked(tmp_path):  # free, although the files of the killed process remain
        assert json.loads((tmp_path / HOLDER_NAME).read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_holder_that_reads_its_folder_keeps_it(tmp_path, hold):
    process = hold(tmp_path / "run", "copy")
    assert (tmp_path / "run.copy" / HOLDER_NAME).exists()
    with pytest.raises(ValueError, match=f"process {process.pid}"):
        locked(tmp_path / "run").__enter__()


def test_children_that_outlive_a_process_do_not_hold_its_folder(tmp_path, hold):
    process = hold(tmp_path, "fork")
    process.kill()
    process.wait()
    os.killpg(process.pid, 0)  # the child lives
    with locked(tmp_path):
        pass


def test_a_process_may_enter_its_own_folder_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "new/folder"):
        with locked("new//folder"):
            pass
        assert (tmp_path / "new/folder" / LOCK_NAME).exists()
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize(
    "left",
    ["", "{", "[]", pytest.param("[" * 100_000, id="nested"), '{"pid": 7, "host": "elsewhere", "since": "yesterday"}'],
)
def test_what_a_lost_process_left_does_not_lock(tmp_path, left, caplog):
    (tmp_path / LOCK_NAME).touch()
    (tmp_path / HOLDER_NAME).write_text(left)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        pass
    named = "process 7 on elsewhere, since yesterday" in caplog.text
    assert named == ("elsewhere" in left)  # it may still run, if the disk has no locks between machines


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without(tmp_path, number, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked" in caplog.text


def test_a_lock_that_cannot_be_deleted_while_open_is_left(tmp_path, monkeypatch):
    """On Windows, filelock deletes it."""
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.name == LOCK_NAME:
            raise PermissionError(13, "used by another process")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with locked(tmp_path):
        pass
    assert not (tmp_path / HOLDER_NAME).exists()


@pytest.mark.parametrize("name", [LOCK_NAME, HOLDER_NAME])
def test_a_link_is_not_written_through(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "file")
    with locked(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_its_holder_deletes_is_made_again(tmp_path, monkeypatch):
    """Between opening and locking, the holder may end and delete the file, and a third process make another one."""
    flock, calls = fcntl.flock, []

    def delete_first(*args):
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(args)
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK_NAME).exists()
