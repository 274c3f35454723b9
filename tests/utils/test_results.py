"""results.json is changed by many processes, and no block is lost."""

import os
from pathlib import Path

import pytest

from tl_adapters.utils import results
from tl_adapters.utils.files import FolderBusyError, WriteError, locked
from tl_adapters.utils.results import changed_results, read_results, stage, write_results


def test_two_processes_lose_no_block(tmp_path: Path) -> None:
    """120 blocks, 60 by each; the seconds of all stages are one block that both change."""
    children = []
    for number in range(2):
        if (child := os.fork()) == 0:
            try:
                for i in range(60):
                    with stage(tmp_path, f"stage-{number}-{i}"):
                        write_results(tmp_path, **{f"block-{number}-{i}": {"value": i}})
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    found = read_results(tmp_path)
    assert {name for name in found if name.startswith("block")} == {f"block-{n}-{i}" for n in (0, 1) for i in range(60)}
    assert len(found["seconds"]) == 120
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    write_results(tmp_path, train={"steps": 3})
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="only finite"), changed_results(tmp_path) as blocks:
        blocks["train"] = {"steps": float("nan")}
    with pytest.raises(KeyError), changed_results(tmp_path) as blocks:
        blocks.pop("train").pop("nothing")
    assert (tmp_path / "results.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_that_refuses_or_is_busy_is_known_before_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="a file is where a folder is needed"), stage(tmp_path / "file", "features"):
        pytest.fail("the stage began")
    monkeypatch.setattr("tl_adapters.utils.files.LOCK_SECONDS", 0.05)
    with locked(tmp_path / results.RESULTS_FILE), pytest.raises(FolderBusyError, match=r"changing .*results.json"):
        write_results(tmp_path, train={})
