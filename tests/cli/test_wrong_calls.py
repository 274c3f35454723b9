"""Every wrong call of the table ends in the line that the table holds, with exit code 2, and leaves nothing behind."""

import hashlib
import json
import shlex
import tomllib
from pathlib import Path

import pytest
from helpers.wrong_calls import message_of, write_small_place

from tl_adapters.cli.main import main

CALLS: dict[str, str] = tomllib.loads((Path(__file__).parent / "wrong_calls.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_small_place(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, by path; folders and links, too."""
    paths = {str(path): path for path in folder.rglob("*")}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for name, p in paths.items()}


def test_there_are_sixty_and_more() -> None:
    assert len(CALLS) >= 60


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_ends_in_one_line(call: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    status, message = message_of(call, place)
    assert status == 2
    assert message == CALLS[call], "a wording that is better is taken over by: make commands"
    assert contents(place) == before, "the call left something behind"


@pytest.mark.parametrize("call", ["trian", "evaluate nowhere", "serve runs/mine --port 99999"])
def test_with_json_the_line_is_an_object(
    call: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main([*shlex.split(call), "--json"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out) == {"error": CALLS[call]} and not err
