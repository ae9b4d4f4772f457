"""
A Hub for tests. The real clients (`huggingface_hub`, `hf_xet`, `transformers`, `datasets`) use it over HTTP.

    python -m tests.support.hub.server --root hub_data --port 8765

prints the environment variables that point the clients to it. In tests:

    with HubServer(tmp_path) as hub:
        api = HfApi(endpoint=hub.endpoint, token=ALICE)
        hub.fail("/commit/", status=503, times=2)
        ...
        hub.count("POST", "/commit/")

`HF_HUB_DISABLE_XET=1` in the client's environment selects LFS uploads; otherwise hf_xet writes to a folder of the
server. Downloads are plain HTTP on both.
"""

import argparse
import re
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from tests.support.hub.http import Fault
from tests.support.hub.store import HubError, Json, Store
from tests.support.hub.uploads import Uploads
from tests.support.hub.xet import LocalXet

ALICE = "hf_alice"  # may write below alice/
READER = "hf_reader"  # of bob, read-only
_USERS = {ALICE: {"name": "alice", "role": "write"}, READER: {"name": "bob", "role": "read"}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections, which are part of the tests."""


class HubServer:
    """
    The server. The context manager runs it in a thread.

    Args:
        root (`str` or `Path`): Folder of its repositories.
        port (`int`, *optional*, defaults to 0): 0 picks a free one.
    """

    def __init__(self, root: str | Path, port: int = 0):
        self.store, self.xet = Store(root), LocalXet(Path(root) / "cas")
        self.users: dict[str, Json] = dict(_USERS)
        self.log: list[Json] = []
        self.stopping, self.healed = threading.Event(), threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.httpd = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopping.set()
        self.healed.set()
        self.httpd.shutdown()
        self.httpd.server_close()

    # ---- Faults ----

    def fail(self, path: str, **fault: Any) -> None:
        """Let requests fail from now on, as [`Fault`] says."""
        with self._lock:
            self._faults.append(Fault(path, **fault))
            self.healed.clear()

    def heal(self) -> None:
        """Remove all faults. Requests that were held continue."""
        with self._lock:
            self._faults.clear()
            self.healed.set()

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault of this request."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    # ---- What happened ----

    def count(self, method: str, path: str) -> int:
        """Number of matching requests. `path` is a regular expression."""
        return sum(entry["method"] == method and bool(re.search(path, entry["path"])) for entry in self.log)

    def history(self, repo_id: str, branch: str = "main") -> list[Json]:
        """The commits of a model without the Hub's first one, newest first; none if the branch is missing."""
        repo = self.store.load("models", repo_id)
        if repo is None or branch not in repo["branches"]:
            return []
        return list(self.store.history(repo, repo["branches"][branch]))[:-1]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch of a model, without `.gitattributes`."""
        repo = self.store.load("models", repo_id)
        assert repo is not None, f"{repo_id} does not exist"
        tree = self.store.commit(repo, repo["branches"][branch])["tree"]
        return {path: self.store.read(tree, path) or b"" for path in sorted(tree) if path != ".gitattributes"}


class _Handler(Uploads):
    """Checks permissions and routes requests."""

    def user(self) -> Json | None:
        """The user of a request; `None` without a token."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def known_user(self) -> Json:
        """The user of a request, who must have a token."""
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def writer(self, repo_id: str) -> Json:
        """The user of a request, who must have write access to the repository."""
        user = self.known_user()
        if user["role"] != "write" or user["name"] != repo_id.split("/")[0]:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        return user

    def repo(self, kind: str, repo_id: str) -> Json:
        """The repository. For other users, a private one does not exist."""
        user, repo = self.user(), self.hub.store.load(kind, repo_id)
        if repo is None or (repo["private"] and (user is None or user["name"] != repo_id.split("/")[0])):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def route(self) -> None:
        """Route a request."""
        path, method = self.url_path, self.command
        if path == "/api/whoami-v2":
            user = self.known_user()
            access = {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}}
            self.reply(200, {"type": "user", "name": user["name"], "orgs": [], "auth": access})
        elif path == "/api/repos/create":
            self.create_repo(self.known_user())
        elif path == "/api/validate-yaml":
            self.validate_yaml()
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            self._api(match[1], unquote(match[2]), match[3] or "")
        elif match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(match[1] or "models", match[2])
            self.writer(match[2])
            self.lfs_batch()
        elif match := re.fullmatch(r"/__lfs/([0-9a-f]{64})(/verify)?", path):
            self.lfs_object(match[1])  # addresses signed for one upload, which need no token
        elif match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path):
            repo = self.repo(match[1] or "models", match[2])
            self.file(repo, self.hub.store.resolve(repo, unquote(match[3])), unquote(match[4]))
        elif "/resolve/" in path:  # a name without a namespace
            raise HubError(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        else:
            raise HubError(404, f"Sorry, we can't find the page you are looking for: {method} {path}")

    def _api(self, kind: str, repo_id: str, rest: str) -> None:
        repo = self.repo(kind, repo_id)
        what, _, more = rest.partition("/")
        revision, _, below = more.partition("/")
        revision, below = unquote(revision) or "main", unquote(below).strip("/")
        if what in ("", "revision"):
            self.reply(200, self.info(repo, self.hub.store.resolve(repo, revision)))
        elif what == "auth-check":
            if more == "write":
                self.writer(repo_id)
            self.reply(200, {})
        elif what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo["branches"].items()]
            self.reply(200, {"branches": refs, "converts": [], "tags": []})
        elif what == "tree":
            self.tree(repo, self.hub.store.resolve(repo, revision), below)
        elif what == "paths-info":
            self.paths_info(repo, self.hub.store.resolve(repo, revision))
        elif what in ("xet-write-token", "xet-read-token"):
            self.writer(repo_id)
            self._xet_token()
        elif what == "preupload":
            self.writer(repo_id)
            self.preupload(repo, revision)
        elif what == "commit":
            self.make_commit(repo, revision, self.writer(repo_id))
        elif what == "branch":
            self.writer(repo_id)
            self.create_branch(repo, revision)
        else:
            raise HubError(404, f"Unknown route {self.command} {self.url_path}")

    def _xet_token(self) -> None:
        url, until = self.hub.xet.url, int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": until}
        self.reply(200, {"casUrl": url, "exp": until, "accessToken": "xet"}, headers)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A local Hub for tests.")
    parser.add_argument("--root", default="hub_data", help="Folder of its repositories.")
    parser.add_argument("--port", type=int, default=8765, help="0 picks a free one.")
    options = parser.parse_args()
    hub = HubServer(options.root, options.port)
    print(f"HF_ENDPOINT={hub.endpoint} HF_TOKEN={ALICE}", flush=True)
    hub.httpd.serve_forever()


if __name__ == "__main__":
    main()
