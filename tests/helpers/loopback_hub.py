"""A Hugging Face hub on this machine, spoken to by the real client: the routes it uses, with faults wherever one likes.

    def test_x(hub: LoopbackHub) -> None:  # the fixture
        hub.files["user/repo"] = {"config.json": b"{}"}
        hub.fault = lambda request: Response(status=500) if "/resolve/" in request.path else None

A commit appears whole or not at all. Files are sent within the commit, as the hub asks for small ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets.config
import huggingface_hub.constants as constants
import pytest
from datasets.utils import file_utils
from helpers.loopback_server import LoopbackServer, Request, Response
from huggingface_hub import RepoCard, file_download, hf_api
from huggingface_hub.utils import _http, close_session

LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "llama3", "other", "unknown")
"""Some of the identifiers that a card may give as its license."""
COMMIT = "0123abcd" * 5
"""The commit of every main branch."""


class LoopbackHub:
    """Repositories by name, as files by path; those of data sets under "datasets/USER/NAME".

    Branches other than main are under "USER/NAME@BRANCH".
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits = {"main": COMMIT}  # branch -> commit
        self.fault: Callable[[Request], Response | None] = lambda request: None
        self.server = LoopbackServer(self.answer)

    def downloads(self) -> list[str]:
        """The files that were asked for with GET, in order."""
        asked = [r.path for r in self.server.requests if r.method == "GET" and "/resolve/" in r.path]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in asked]

    def answer(self, request: Request) -> Response:
        if (fault := self.fault(request)) is not None:
            return fault
        path = request.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return _validated(str(request.json()["content"]))
        if path == "/api/repos/create":
            asked = request.json()
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.files.setdefault(name, {})
            return _json({"url": f"{self.server.url}/{name}"})
        if (found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path)) is None:
            return self._file(request, path)
        prefix = "datasets/" if found[1] == "datasets" else ""
        return self._api(request, f"{prefix}{found[2]}", found[3] or "")

    def _api(self, request: Request, repo: str, route: str) -> Response:
        action, _, rest = route.lstrip("/").partition("/")
        if repo not in self.files:
            return Response('{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})
        if action == "branch":
            self.commits[rest] = hashlib.sha1(rest.encode()).hexdigest()
            self.files.setdefault(f"{repo}@{rest}", dict(self.files[repo]))
            return _json({})
        revision = rest.partition("/")[0] or "main"
        files = self._at(repo, revision)
        if files is None:
            return Response(f'{{"error": "Invalid rev id: {rest}"}}', 404, {"X-Error-Code": "RevisionNotFound"})
        if action == "tree":
            return _json([{"type": "file", "path": p, "size": len(b), "oid": _sha(b)} for p, b in files.items()])
        if action == "preupload":
            taken = {"uploadMode": "regular", "shouldIgnore": False}
            return _json({"files": [{**file, **taken} for file in request.json()["files"]]})
        if action == "commit":
            lines = [json.loads(line) for line in request.body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            files |= {file["path"]: base64.b64decode(file["content"]) for file in sent}
            commit = self.commits[revision]
            return _json({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})
        siblings = [{"rfilename": path} for path in files]
        sha = self.commits.get(revision, revision)
        return _json({"id": repo.removeprefix("datasets/"), "sha": sha, "siblings": siblings, "private": False})

    def _at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or commit."""
        branch = next((name for name, commit in self.commits.items() if revision in (name, commit)), None)
        return None if branch is None else self.files.get(repo if branch == "main" else f"{repo}@{branch}")

    def _file(self, request: Request, path: str) -> Response:
        found = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        content = (self._at(found[1], found[2]) or {}).get(found[3]) if found else None
        if found is None or content is None:
            return Response("", 404, {"X-Error-Code": "EntryNotFound"})
        commit = self.commits.get(found[2], found[2])
        headers = {"ETag": f'"{_sha(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if (asked := re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))) is None:
            return Response(content, headers=headers)
        headers["Content-Range"] = f"bytes {asked[1]}-{len(content) - 1}/{len(content)}"
        return Response(content[int(asked[1]) :], 206, headers)


def _validated(card: str) -> Response:
    """The answer about a card: an error where its license is on no list."""
    license = RepoCard(card, ignore_metadata_errors=True).data.to_dict().get("license", "unknown")
    if license in LICENSES:
        return _json({"errors": [], "warnings": []})
    allowed = ", ".join(LICENSES)
    return _json({"errors": [{"message": f'"license" must be one of [{allowed}]'}], "warnings": []}, 400)


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, {"Content-Type": "application/json"})


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The hub that the client of this process speaks to; it waits for nothing between its tries."""
    running = LoopbackHub()
    with running.server as server:
        point_client_at(server.url, tmp_path, monkeypatch)
        yield running
    close_session()


def point_client_at(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the client of this process speak to ``url``, with an empty cache and without waiting."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("ENDPOINT", url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_TOKEN_PATH", str(tmp_path / "no token")),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_DISABLE_TELEMETRY", True),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    patient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download, hf_api, file_utils):
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", patient)
    close_session()
