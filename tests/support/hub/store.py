"""Repositories of the test Hub in a folder: content-addressed blobs, one JSON file per commit, branches."""

import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# The Hub's `.gitattributes` in every new repository: these files use LFS or xet.
_LARGE = (
    "7z",
    "arrow",
    "bin",
    "gz",
    "npy",
    "npz",
    "onnx",
    "parquet",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "safetensors",
    "zip",
)
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LARGE).encode()

Json = dict[str, Any]


class HubError(Exception):
    """An error response of a handler."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        body: Json | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}
        self.body = body or {"error": message}


def git_oid(data: bytes) -> str:
    """The git object id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The pointer file of an LFS file in git."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Store:
    """
    A folder of repositories. `lock` makes a series of reads and writes atomic.

    A repository is `{type, id, private, createdAt, branches: {name: oid}}`, a commit `{oid, parent, title, message,
    author, date, tree}`, a tree `{path: {sha256, size, oid, lfs}}`. "refs/pr/1" may be a branch.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.lock = threading.RLock()
        for name in ("blobs", "repos"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    # ---- Content ----

    def blob(self, sha256: str) -> Path:
        """Path of the content with this hash, which may be missing."""
        return self.root / "blobs" / sha256

    def put(self, chunks: Iterable[bytes], expected: str | None = None) -> str:
        """
        Store content.

        Args:
            chunks (`Iterable[bytes]`): The content.
            expected (`str`, *optional*): Its expected SHA-256.

        Returns:
            `str`: its SHA-256.
        """
        digest, size = hashlib.sha256(), 0
        handle, scratch = tempfile.mkstemp(dir=self.root)
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        found = digest.hexdigest()
        if expected not in (None, found):
            os.unlink(scratch)
            raise HubError(400, f"LFS content mismatch: expected {expected}, got {found} ({size} bytes)")
        os.replace(scratch, self.blob(found))
        return found

    def read(self, tree: Json, path: str) -> bytes | None:
        """The content of a file of a tree."""
        return self.blob(tree[path]["sha256"]).read_bytes() if path in tree else None

    def regular_file(self, data: bytes) -> Json:
        """The tree entry of a regular file, without LFS."""
        return {"sha256": self.put([data]), "size": len(data), "oid": git_oid(data), "lfs": False}

    # ---- Repositories ----

    def _folder(self, kind: str, repo_id: str) -> Path:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or ".." in repo_id:
            raise HubError(400, f"Invalid repo name: {repo_id}")
        return self.root / "repos" / kind / repo_id

    def load(self, kind: str, repo_id: str) -> Json | None:
        """The repository, `None` if there is none; `kind` is `models` or `datasets`."""
        path = self._folder(kind, repo_id) / "repo.json"
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, repo: Json) -> None:
        """Save the repository."""
        self._write(self._folder(repo["type"], repo["id"]) / "repo.json", repo)

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> None:
        """A repository with the Hub's first commit."""
        repo = {"type": kind, "id": repo_id, "private": private, "createdAt": _now(), "branches": {}}
        self.add_commit(
            repo, "main", None, {".gitattributes": self.regular_file(GITATTRIBUTES)}, "initial commit", author
        )

    # ---- History ----

    def add_commit(
        self, repo: Json, branch: str, parent: str | None, tree: Json, title: str, author: str, message: str = ""
    ) -> str:
        """Append a commit to a branch and return its id."""
        commit = {"parent": parent, "title": title, "message": message, "author": author, "date": _now(), "tree": tree}
        oid = hashlib.sha1(json.dumps([commit, time.time_ns()], sort_keys=True).encode()).hexdigest()
        self._write(self._folder(repo["type"], repo["id"]) / "commits" / f"{oid}.json", commit)
        repo["branches"][branch] = oid
        self.save(repo)
        return oid

    def commit(self, repo: Json, oid: str) -> Json:
        """One commit."""
        path = self._folder(repo["type"], repo["id"]) / "commits" / f"{oid}.json"
        return {"oid": oid, **json.loads(path.read_text())}

    def resolve(self, repo: Json, revision: str) -> str:
        """The commit of a branch or commit id."""
        name = revision.removeprefix("refs/heads/")
        if name in repo["branches"]:
            return repo["branches"][name]
        if any(
            commit["oid"] == revision for branch in repo["branches"].values() for commit in self.history(repo, branch)
        ):
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, repo: Json, oid: str | None) -> Iterator[Json]:
        """A commit and its ancestors, newest first."""
        while oid:
            commit = self.commit(repo, oid)
            yield commit
            oid = commit["parent"]

    def _write(self, path: Path, value: Json) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{threading.get_ident()}")
        scratch.write_text(json.dumps(value))
        scratch.replace(path)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
