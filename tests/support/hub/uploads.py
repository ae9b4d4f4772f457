"""Writing to the test Hub, with the same errors as the Hub."""

import base64
import fnmatch
import json
from collections.abc import Iterator

import yaml

from tests.support.hub.downloads import Downloads, front_matter
from tests.support.hub.store import HubError, Json, git_oid, pointer

REGULAR_LIMIT = 10 << 20  # largest regular file in bytes, without LFS


def card_errors(text: str) -> list[str]:
    """Errors in the metadata of a card."""
    try:
        data = front_matter(text) or {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}".replace("\n", " ")]
    errors = [] if isinstance(data.get("license", ""), str | list) else ['"license" must be a string']
    index = data.get("model-index", [])
    if not isinstance(index, list):
        return [*errors, '"model-index" must be an array']
    for i, model in enumerate(index):
        if not model.get("name"):
            errors.append(f'"model-index[{i}].name" is required')
        for j, result in enumerate(model.get("results") or []):
            errors += [
                f'"model-index[{i}].results[{j}].{key}" is required'
                for key in ("task", "dataset", "metrics")
                if key not in result
            ]
            if not {"name", "type"} <= set(result.get("dataset", {"name", "type"})):
                errors.append(f'"model-index[{i}].results[{j}].dataset" needs "name" and "type"')
    return errors


class Uploads(Downloads):
    """Handlers of requests that change repositories. Write access is checked before."""

    def create_repo(self, user: Json) -> None:
        """Create a repository. If it exists, the error also has its address, which the client reads."""
        body = self.json()
        namespace, kind = body.get("organization") or user["name"], (body.get("type") or "model") + "s"
        repo_id = f"{namespace}/{body['name']}"
        if user["role"] != "write" or user["name"] != namespace:
            raise HubError(
                403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"'
            )
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"
        with self.hub.store.lock:
            if self.hub.store.load(kind, repo_id):
                message = f"You already created this {kind[:-1]} repo: {repo_id}"
                raise HubError(409, message, body={"error": message, "url": url})
            self.hub.store.create(kind, repo_id, body.get("visibility") == "private", user["name"])
        self.reply(200, {"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> None:
        """Check a card before its upload."""
        errors = [{"message": error} for error in card_errors(self.json().get("content") or "")]
        answer = {"errors": errors, "warnings": []}
        self.reply(400 if errors else 200, answer | ({"error": errors[0]["message"]} if errors else {}))

    def create_branch(self, repo: Json, name: str) -> None:
        """A branch at an existing revision."""
        if name.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {name}")
        start = self.json().get("startingPoint") or "main"
        with self.hub.store.lock:
            if name in repo["branches"]:
                raise HubError(409, f"Reference already exists: refs/heads/{name}")
            repo["branches"][name] = self.hub.store.resolve(repo, start)
            self.hub.store.save(repo)
        self.reply(200, {})

    def preupload(self, repo: Json, revision: str) -> None:
        """How to send each file, and the hash of the existing one."""
        store = self.hub.store
        oid = store.resolve(repo, revision)
        tree = store.commit(repo, oid)["tree"]
        attributes = (store.read(tree, ".gitattributes") or b"").decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        files = []
        for file in self.json()["files"]:
            path, name = file["path"], file["path"].rsplit("/", 1)[-1]
            lfs = any(fnmatch.fnmatch(name, pattern) for pattern in patterns) or file["size"] > REGULAR_LIMIT
            lfs = lfs or b"\0" in base64.b64decode(file.get("sample") or "")
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in tree:
                answer["oid"] = tree[path]["sha256" if tree[path]["lfs"] else "oid"]
            files.append(answer)
        self.reply(200, {"files": files, "commitOid": oid})

    # ---- LFS: batch, then PUT to the given address, then verify ----

    def lfs_batch(self) -> None:
        """Where to send each object."""
        objects = []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.store.blob(wanted["oid"]).exists():
                href = f"{self.hub.endpoint}/__lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def lfs_object(self, oid: str) -> None:
        """Receive an object, or verify that it is there."""
        store = self.hub.store
        if self.command == "PUT":
            self.reply(200, headers={"ETag": f'"{store.put(self.chunks(), expected=oid)}"'})
        else:
            path = store.blob(oid)
            if not path.exists() or path.stat().st_size != self.json().get("size"):
                raise HubError(404, "LFS object not found")
            self.reply(200, {})

    # ---- The commit ----

    def make_commit(self, repo: Json, branch: str, user: Json) -> None:
        """Add one commit to the branch, atomically."""
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        header, store = lines[0]["value"], self.hub.store
        with store.lock:
            repo = store.load(repo["type"], repo["id"]) or repo
            if branch not in repo["branches"]:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            parent = repo["branches"][branch]
            if header.get("parentCommit", parent) != parent:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(store.commit(repo, parent)["tree"])
            for line in lines[1:]:
                self._apply(line["key"], line["value"], tree)
            if errors := card_errors((store.read(tree, "README.md") or b"").decode()):
                raise HubError(400, f"Invalid metadata in README.md: {errors[0]}")
            title, message = header["summary"], header.get("description", "")
            oid = store.add_commit(repo, branch, parent, tree, title, user["name"], message)
        url = f"{self.hub.endpoint}/{repo['id']}/commit/{oid}"
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, key: str, value: Json, tree: Json) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = self.hub.store.regular_file(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            tree[path] = self._lfs_file(path, value["oid"], value.get("size"))
        elif key in ("deletedFile", "deletedFolder"):
            gone = list(self._deleted(key, path, tree))
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise HubError(400, f"Unknown operation {key}")

    def _lfs_file(self, path: str, oid: str, size: int | None) -> Json:
        store, blob = self.hub.store, self.hub.store.blob(oid)
        if not blob.exists() and (content := self.hub.xet.read(oid)) is not None:
            store.put([content], expected=oid)
        if not blob.exists():
            raise HubError(400, f"Your push was rejected because an LFS pointer pointed to a missing file: {path}")
        found = blob.stat().st_size
        if size not in (None, found):
            raise HubError(400, f"{path} has {found} bytes, not {size}")
        return {"sha256": oid, "size": found, "oid": git_oid(pointer(oid, found)), "lfs": True}

    @staticmethod
    def _deleted(key: str, path: str, tree: Json) -> Iterator[str]:
        start = path.rstrip("/") + "/"
        return (name for name in tree if (name.startswith(start) if key == "deletedFolder" else name == path))
