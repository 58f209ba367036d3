"""A local Hugging Face hub: as much of its API as huggingface_hub uses to load and push a model."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers import Site, WebHandler, serving

TOKEN = "hf_the_only_right_one"
COMMIT = re.compile(r"[0-9a-f]{40}")
API = r"/api/models/([\w.-]+/[\w.-]+)"


@dataclass
class Hub(Site):
    """Repositories by owner/name, each with the files of its revisions."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    posted: list[str] = field(default_factory=list)  # the paths of POST requests

    def add(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a revision of a repository; returns its commit, by which it can be asked for too."""
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        revisions = self.repositories.setdefault(name, {})
        revisions[revision] = revisions[commit] = files
        return commit

    def commit_of(self, name: str, revision: str) -> str:
        revisions = self.repositories[name]
        commits = [one for one in revisions if COMMIT.fullmatch(one)]
        return next(one for one in commits if revisions[one] is revisions[revision])


class _HubHandler(WebHandler):
    site: Hub

    def do_GET(self) -> None:
        place = self.path.partition("?")[0]
        self.site.asked.append((place, self.headers.get("Range")))
        tree = re.fullmatch(rf"{API}/tree/(.+)", place)
        info = re.fullmatch(rf"{API}(?:/revision/(.+))?", place)
        file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", place)
        found = tree or info or file
        if found is None:
            self._send(404, b"none")
            return
        name = found.group(1)
        revision = found.group(2) or "main"
        if self._refuses(name, revision):
            return
        files = self.site.repositories[name][revision]
        commit = self.site.commit_of(name, revision)
        if tree:
            self._answer([{"type": "file", "path": path, "size": 1, "oid": "0"} for path in files])
        elif info:
            siblings = [{"rfilename": path} for path in files]
            self._answer({"id": name, "sha": commit, "siblings": siblings, "private": False})
        elif file.group(3) in files:
            self._send_hub_file(files[file.group(3)], commit)
        else:
            self._send(404, b"none", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _send_hub_file(self, body: bytes, commit: str) -> None:
        digest = hashlib.sha256(body).hexdigest()
        breaks = self.site.broken.get("hub")
        end = breaks.pop(0) if breaks and self.command == "GET" else len(body)
        head = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        requested = self.headers.get("Range")
        if requested and self.command == "GET":
            start = int(re.match(r"bytes=(\d+)-", requested).group(1))
            head["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(206, body[start : max(start, end)], head, len(body) - start)
            return
        self._send(200, b"" if self.command == "HEAD" else body[:end], head, len(body))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        place = self.path.partition("?")[0]
        self.site.posted.append(place)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        elif place == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.site.repositories.setdefault(name, {})
            self._answer({"url": f"{self.site.url}/{name}", "id": name, "name": name})
        elif place == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif preupload := re.fullmatch(rf"{API}/preupload/.+", place):
            names = [file["path"] for file in json.loads(body)["files"]]
            assert preupload.group(1) in self.site.repositories
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self._answer({"files": modes})
        elif commit := re.fullmatch(rf"{API}/commit/(.+)", place):
            self._commit(commit.group(1), commit.group(2), body)
        else:
            self._send(404, b"none")

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = self.site.add(name, files, revision)
        url = f"{self.site.url}/{name}/commit/{commit}"
        self._answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _refuses(self, name: str, revision: str) -> bool:
        """Whether the request was answered with an error, in the hub's form."""
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.site.repositories or (name in self.site.private and not is_known):
            # The hub answers so for both, so that nobody learns which private models exist.
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif name in self.site.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision not in self.site.repositories[name]:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _answer(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


@contextmanager
def hugging_face_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub for this process and its children while the block runs, with an empty cache.

    HF_ENDPOINT is read when huggingface_hub is imported, so what it became is set here as well.
    """
    from huggingface_hub import constants

    hub = Hub({})
    with serving(_HubHandler, hub) as port:
        hub.url = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(cache))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        yield hub
