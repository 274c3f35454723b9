"""results.json is changed by many processes, and no block is lost."""

import json
import os
from pathlib import Path

import pytest

from tl_adapters.utils import results
from tl_adapters.utils.files import FolderBusyError, WriteError, locked
from tl_adapters.utils.reading import UnreadableFileError
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


VALUE = {"value": 1.5, "n": 1}
KNOWN = {
    "schema_version": 1,
    "pair": {"base": "b", "target": "t", "n_layers": 2, "recipe": "1f"},
    "train": {"steps": 3, "tokens": 7, "seconds": 1, "n_features": 8},
    "seeds": [0],
    "seconds": {"train": 1},
    "faithfulness": {
        "kl": {"hybrid": VALUE, "replacement": VALUE},
        "top1_agreement": {"value": 0.5},
        "l0": [{"value": None}],
    },
    "attribution": {"graphs": 1, "moments": [{"page": "a.html"}]},
    "a block of mine": [1, None, "x"],
}


def test_unknown_blocks_and_keys_are_kept(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(KNOWN))
    assert read_results(tmp_path) == KNOWN
    assert write_results(tmp_path, labels={"judge": 1}) == {**KNOWN, "labels": {"judge": 1}}
    assert read_results(tmp_path)["a block of mine"] == [1, None, "x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "it has schema_version 2; this version of tl-adapters reads 1, so update tl-adapters"),
        ({"schema_version": "1"}, "schema_version is '1'; allowed is 1"),
        ({"pair": {"base": "b"}}, "The key pair.target is missing"),
        ({"pair": ["b", "t"]}, r"pair is \['b', 't'\]; allowed is a mapping or null"),
        ({"seeds": [True]}, r"seeds\[0\] is True; allowed is a whole number"),
        ({"seconds": {"train": "1"}}, r"seconds.train is '1'; allowed is a number"),
        (
            {"faithfulness": {"kl": {"hybrid": 3, "replacement": VALUE}, "top1_agreement": {"value": 1}, "l0": []}},
            "faithfulness.kl.hybrid is 3; allowed is a mapping",
        ),
        (
            {"files": {"a.html": {"file": "../a.html", "sha256": []}}},
            r"files\.a\.html\.file is '\.\./a\.html': it is not the name",
        ),
        ({"files": {"a.html": {"file": "..", "sha256": []}}}, r"files\.a\.html\.file is '\.\.': it is not the name"),
        ({"attribution": {"moments": [3]}}, r"attribution.moments\[0\] is 3"),
    ],
)
def test_damaged_results_are_one_error_that_names_the_key(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**KNOWN, **change}))
    before = path.read_bytes()
    for use in (lambda: read_results(tmp_path), lambda: write_results(tmp_path, labels={})):
        with pytest.raises(UnreadableFileError, match=rf"results\.json: {message}.* Restore it from a copy"):
            use()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"schema_version": 1, "a": NaN}', b"[" * 10**5])
def test_results_that_are_no_mapping_are_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UnreadableFileError, match=r"results\.json"):
        read_results(tmp_path)
    assert read_results(tmp_path / "elsewhere") == {"schema_version": 1}
