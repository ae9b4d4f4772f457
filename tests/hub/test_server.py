"""The test Hub: real clients accept it, and it refuses what the Hub refuses."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_download
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RepositoryNotFoundError

from tests.support.hub.runs import CARD, REPO, api, impatient_client
from tests.support.hub.server import ALICE, READER, HubServer


@pytest.fixture(params=["lfs", "xet"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server and a client on one of the transfer paths."""
    with impatient_client(monkeypatch, xet=request.param == "xet"), HubServer(tmp_path / "hub") as hub:
        yield hub


def test_files_come_back_bit_by_bit(hub: HubServer, tmp_path: Path) -> None:
    """Random content, compressible content and floats: hf_xet packs each in another way."""
    client = api(hub)
    client.create_repo(REPO)
    floats = np.linspace(0, 1, 200_000, dtype=np.float32).tobytes()
    files = {"a.bin": os.urandom(300_000), "b.bin": b"nexus " * 60_000, "c.safetensors": floats, "README.md": b"# x"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    additions = [CommitOperationAdd(name, tmp_path / name) for name in files]
    client.create_commit(REPO, additions, commit_message="all")
    for name, data in files.items():
        path = hf_hub_download(REPO, name, endpoint=hub.endpoint, token=ALICE, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == data, name
    assert set(hub.files(REPO)) == set(files)


def test_invalid_commits_are_refused(hub: HubServer) -> None:
    """A stale parent, a bad card, an object that is not there, a deletion of nothing."""
    client = api(hub)
    client.create_repo(REPO)
    before = client.repo_info(REPO).sha
    client.create_commit(REPO, [CommitOperationAdd("a.txt", b"1")], commit_message="first")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        client.create_commit(REPO, [CommitOperationAdd("a.txt", b"2")], commit_message="x", parent_commit=before)
    with pytest.raises(HfHubHTTPError):
        client.create_commit(REPO, [CommitOperationDelete("b.txt")], commit_message="x")
    with pytest.raises(ValueError, match="Invalid metadata"):
        client.create_commit(
            REPO, [CommitOperationAdd("README.md", b"---\nmodel-index: 1\n---\n")], commit_message="x"
        )
    absent = CommitOperationAdd("a.bin", b"\0" * 100)
    absent._is_uploaded, absent._upload_mode = True, "lfs"
    with pytest.raises(BadRequestError, match="missing file"):
        client.create_commit(REPO, [absent], commit_message="x")
    assert [commit["title"] for commit in hub.history(REPO)] == ["first"]


def test_content_must_have_the_announced_hash_and_size(hub: HubServer) -> None:
    """Neither a wrong hash nor a wrong size gets in."""
    from huggingface_hub.utils import get_session

    digest = hashlib.sha256(b"announced").hexdigest()
    assert get_session().put(f"{hub.endpoint}/__lfs/{digest}", content=b"other").status_code == 400
    assert get_session().put(f"{hub.endpoint}/__lfs/{digest}", content=b"announced").status_code == 200
    client = api(hub)
    client.create_repo(REPO)
    wrong = CommitOperationAdd("a.bin", b"announced")
    wrong._is_uploaded, wrong._upload_mode, wrong.upload_info.size = True, "lfs", 3
    with pytest.raises(BadRequestError, match="has 9 bytes, not 3"):
        client.create_commit(REPO, [wrong], commit_message="x")


def test_tokens_decide_who_may_read_and_write(hub: HubServer) -> None:
    """Readers read what is public; of what is private strangers do not learn that it exists."""
    client = api(hub)
    client.create_repo(REPO, private=True)
    client.upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id=REPO)
    assert client.model_info(REPO).private
    card = client.model_info(REPO).card_data
    assert card is not None and card.license == "mit"
    with pytest.raises(RepositoryNotFoundError):
        client.model_info(REPO, token=READER)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client.whoami(token="hf_nobody")
    with pytest.raises(HfHubHTTPError, match="403"):
        client.create_repo("alice/other", token=READER)


_STREAM = """
import sys
from datasets import load_dataset
for name in sys.argv[1:]:
    print([row["n"] for row in load_dataset(name, split="train", streaming=True)])
"""


@pytest.mark.slow
def test_datasets_streams_from_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset("user/name", streaming=True)` reads over HTTP what was uploaded."""
    from datasets import Dataset

    rows = Dataset.from_dict({"n": list(range(50))})
    rows.to_parquet(tmp_path / "train.parquet")
    rows.to_json(tmp_path / "train.jsonl")
    with impatient_client(monkeypatch, xet=False), HubServer(tmp_path / "hub") as hub:
        for name in ("parquet", "jsonl"):
            file, repo = f"train.{name}", f"alice/{name}"
            api(hub).create_repo(repo, repo_type="dataset")
            path = tmp_path / file
            api(hub).upload_file(path_or_fileobj=path, path_in_repo=file, repo_id=repo, repo_type="dataset")
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ALICE, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", _STREAM, "alice/parquet", "alice/jsonl"]
        done = subprocess.run(
            command, env={**environment, "HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n")[:2] == [str(list(range(50)))] * 2
        assert all(hub.count("GET", f"/datasets/alice/{name}/resolve/.*train") for name in ("parquet", "jsonl"))
