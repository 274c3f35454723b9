"""A hub on this machine, in the client's own terms."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import tl_adapters.checkpoints.model_files as checkpoints
import tl_adapters.interop.hub as hub


class FakeHub:
    """Repositories as folders, one per commit; a commit appears whole or not at all, as on the real one."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.fail_upload, self.cut_download = root, [], False, False
        self.tokens: list[str | None] = []

    def client(self, token: str | None = None) -> Any:
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        if repo_id.startswith("stranger/"):
            response = SimpleNamespace(headers={}, request=None, status_code=403)
            raise HfHubHTTPError("403 Forbidden: you may not write there", response=response)  # type: ignore[arg-type]
        self.calls.append(("create_repo", repo_id, private))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.calls.append(("create_branch", repo_id, branch))

    def upload_folder(self, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> Any:
        if self.fail_upload:
            raise ConnectionError("the line went dead")
        target = self.root / repo_id / (revision or "main") / "snapshots" / "0123abcd"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder_path, target)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/0123abcd")

    def snapshot_download(self, name: str, revision: str | None, allow_patterns: list[str], token: str | None) -> str:
        source = self.root / name / (revision or "main") / "snapshots" / "0123abcd"
        if not source.is_dir():
            raise RepositoryNotFoundError(f"404: {name}", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        cache = self.root / "cache" / name / (revision or "main") / "snapshots" / "0123abcd"
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            relative = file.relative_to(source)
            if any(fnmatch(str(relative), pattern) for pattern in allow_patterns):
                if self.cut_download and "layer_2" in str(relative):
                    raise ConnectionError("the line went dead")
                (cache / relative).parent.mkdir(parents=True, exist_ok=True)
                if not (cache / relative).exists():
                    self.calls.append(("download", str(relative)))
                    shutil.copy(file, cache / relative)
        return str(cache)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", found.client)
    monkeypatch.setattr(checkpoints, "snapshot_download", found.snapshot_download)
    return found
