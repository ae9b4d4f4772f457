"""Reading from the test Hub: information about repositories, and their files."""

import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs

import yaml

from tests.support.hub.http import Plumbing
from tests.support.hub.store import HubError, Json, pointer


def front_matter(text: str) -> Json | None:
    """The metadata of a card. Raises `yaml.YAMLError`."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.S)
    data = yaml.safe_load(match[1]) if match else None
    return data if isinstance(data, dict) else None


class Downloads(Plumbing):
    """Handlers of requests that change nothing."""

    def info(self, repo: Json, oid: str) -> Json:
        """The result of `model_info` and `dataset_info`."""
        commit = self.hub.store.commit(repo, oid)
        tree, blobs = commit["tree"], self.flag("blobs")
        siblings = [
            {"rfilename": path} | (self._blob(file) | {"blobId": file["oid"]} if blobs else {})
            for path, file in sorted(tree.items())
        ]
        found: Json = {
            "_id": hashlib.sha1(repo["id"].encode()).hexdigest()[:24],
            "id": repo["id"],
            "author": repo["id"].split("/")[0],
            "sha": oid,
            "lastModified": commit["date"],
            "createdAt": repo["createdAt"],
            "private": repo["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        card = front_matter((self.hub.store.read(tree, "README.md") or b"").decode())
        if card:
            found["cardData"] = json.loads(json.dumps(card, default=str))
            found |= {
                key: found["cardData"][key] for key in ("model-index", "pipeline_tag", "library_name") if key in card
            }
            found["tags"] = card.get("tags") or []
        if expand := self.query.get("expand"):
            found["evalResults"] = self._eval_results(tree)
            found = {key: value for key, value in found.items() if key in (*expand, "_id", "id")}
        return found

    def _eval_results(self, tree: Json) -> list[Json]:
        found = []
        for path in sorted(tree):
            if re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", path):
                for entry in yaml.safe_load(self.hub.store.read(tree, path) or b""):
                    data = json.loads(json.dumps(entry, default=str))
                    found.append({"filename": path, "verified": False, "data": data})
        return found

    @staticmethod
    def _blob(file: Json) -> Json:
        size = file["size"]
        if not file["lfs"]:
            return {"size": size}
        small = len(pointer(file["sha256"], size))
        return {
            "size": size,
            "lfs": {"oid": file["sha256"], "sha256": file["sha256"], "size": size, "pointerSize": small},
        }

    def entries(self, repo: Json, oid: str, prefix: str, recursive: bool) -> list[Json]:
        """Files and folders below `prefix`."""
        commit = self.hub.store.commit(repo, oid)
        last = {"id": oid, "title": commit["title"], "date": commit["date"]}
        folders: dict[str, Json] = {}
        files = []
        start = f"{prefix}/" if prefix else ""
        for path, file in sorted(commit["tree"].items()):
            if path.startswith(start):
                parts = path[len(start) :].split("/")
                for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                    name = start + "/".join(parts[:depth])
                    oid_of_folder = hashlib.sha1(name.encode()).hexdigest()
                    folders[name] = {
                        "type": "directory",
                        "oid": oid_of_folder,
                        "size": 0,
                        "path": name,
                        "lastCommit": last,
                    }
                if recursive or len(parts) == 1:
                    entry = {"type": "file", "oid": file["oid"], "path": path, "lastCommit": last, **self._blob(file)}
                    files.append(entry)
        return [*folders.values(), *files]

    def tree(self, repo: Json, oid: str, prefix: str) -> None:
        """Files and folders in a folder."""
        entries = self.entries(repo, oid, prefix, self.flag("recursive"))
        if prefix and not entries:
            raise HubError(404, f'{prefix} does not exist on "{oid}"', "EntryNotFound")
        self.reply(200, entries)

    def paths_info(self, repo: Json, oid: str) -> None:
        """The entries of the given names."""
        raw = self.body()
        form: Any = json.loads(raw) if raw[:1] == b"{" else parse_qs(raw.decode())
        self.reply(200, [entry for entry in self.entries(repo, oid, "", True) if entry["path"] in form["paths"]])

    def file(self, repo: Json, oid: str, path: str) -> None:
        """A file or a range of it, without a redirect to another address."""
        store = self.hub.store
        entry = store.commit(repo, oid)["tree"].get(path)
        headers: dict[str, Any] = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        etag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers["ETag"] = f'"{etag}"'
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": entry["size"]}
        data, status = store.blob(entry["sha256"]).read_bytes(), 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
            last = int(match[2]) if match[1] and match[2] else len(data) - 1
            if first >= len(data):
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.reply(status, raw=data, headers=headers, kind="application/octet-stream")
