"""Every subcommand's next command is run as a shell reads what was printed, in a folder whose name needs quotes."""

import inspect
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from kill.subcommands import SCALE

from tl_adapters import organism
from tl_adapters.cli.main import SUBCOMMANDS, main
from tl_adapters.pages.server import make_server

RUN = "-it's a $HOME run \x1b[31m\u202e\\"
"""A run's name: it begins as an option does, and holds what a shell and a terminal act on."""
NEW = RUN + "2"
SMALL = ["--config", "small options.yaml"]
DATA = ["--data", "held out.jsonl"]
PAIR = ["--base", "BASE", "--target", "TARGET", "--data", "TRACES.jsonl"]
SWEEP = [*SMALL, "--over", "seed=0", "--documents", "4", "--out", NEW]
CASES: dict[str, list[list[str]]] = {
    "demo": [["--out", NEW]],
    "doctor": [["BASE", "TARGET", *SMALL, "--seed", "3", "--device", "cpu", "--dtype", "float32"]],
    "train": [[*PAIR, *SMALL, "--out", NEW], [*SMALL, "--out", NEW]],
    "sweep": [[*PAIR, "--held-out", "held out.jsonl", *SWEEP], SWEEP],
    "open": [["--out", NEW, "--", RUN]],
    "evaluate": [[*DATA, "--", "no features"], [*DATA, "--", RUN]],
    "features": [[*DATA, "--share", "0/1", "--examples", "3", "--", "no features"], [*DATA, "--", "no features"]],
    "label": [["--", RUN]],
    "attribute": [["--prompt", "<|user|>12+7=?", "--max-feature-nodes", "20", "--", RUN]],
    "generate": [
        ["--prompt", "47+85=?", "--max-new-tokens", "4", "--", RUN],
        ["--prompt=--47'+85=?", "--raw", "--max-new-tokens", "4", "--dtype", "float64", "--", RUN],
    ],
    "benchmark": [["--limit", "2", "--max-new-tokens", "8", "--words", "wait", "hold on", "--", RUN]],
    "hesitation": [["--limit", "16", "--", RUN]],
    "push": [["--private", "--revision", "trial", "--", RUN, "user/repo"]],
    "pull": [["user/repo", "--out", NEW]],
}
"""Subcommand -> the options of a call, for every way to its next command."""
SLOW = {("demo", 0), ("train", 1), ("sweep", 1), ("hesitation", 0)}
"""Those after which the model organism answers problems."""
CALLS = [
    pytest.param([name, *options], marks=[pytest.mark.slow] * ((name, i) in SLOW), id=f"{name}{i}")
    for name, all_options in CASES.items()
    for i, options in enumerate(all_options)
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that the calls name, and what the user has for the names in capitals."""
    place = tmp_path_factory.mktemp("place")
    for role in ("BASE", "TARGET"):
        (place / role).symlink_to(getattr(organism, role))
    rows = [{"prompt": q, "response": r} for q, r in organism.reasoning_pairs("train", 12)]
    for name in ("TRACES.jsonl", "HELD_OUT.jsonl", "held out.jsonl"):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "small options.yaml").write_text(
        "training:\n  local: {steps: 1, max_tokens: 2000, polish: false, revisions: []}\n  n_features: 4\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("tl_adapters.study.evaluate.StudyScale", lambda: SCALE)
        patch.setattr("tl_adapters.study.open_run.ORGANISM_TRACES", 60)
        for module in ("features", "label"):  # pages of every neuron would take a minute
            patch.setattr(f"tl_adapters.study.{module}.draw_pages", lambda store, pages, **options: pages)
        assert main(["train", *SMALL, "--out", "no features", "--quiet"]) == 0
        shutil.copytree("no features", RUN)
        assert main(["features", *DATA, "--quiet", "--", RUN]) == 0
        yield place


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    # The demo is the subject of another test; here its command is.
    copied = lambda folder, *args, **options: shutil.copytree(RUN, folder) / "report.html"  # noqa: E731
    monkeypatch.setattr("tl_adapters.study.demo.demo", copied)
    return tmp_path / "place"


def words_of(line: str) -> list[str]:
    """The words of a command of ours, as bash reads them."""
    call = ["bash", "-c", f"printf '%s\\0' {line}"]
    printed = subprocess.run(call, capture_output=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"}).stdout
    program, *words = printed.decode().split("\0")[:-1]
    assert program == "tl-adapters"
    return words


def test_every_way_to_a_next_command_is_here() -> None:
    ways = {function.__name__: inspect.getsource(function).count("next=") for function in SUBCOMMANDS}
    ways |= {"train": 2, "sweep": 2, "evaluate": 2, "generate": 2}  # one line with two outcomes
    assert {name: len(options) for name, options in CASES.items()} == {name: n for name, n in ways.items() if n}


@pytest.mark.parametrize("call", CALLS)
def test_the_next_command_runs_as_printed(
    call: list[str],
    place: Path,
    hub: LoopbackHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    served: list[str] = []

    def serve_nothing(folder: Path, port: int, behind: str | None) -> object:
        server = make_server(folder, 0, behind)  # another process may hold the port
        monkeypatch.setattr(server, "serve_forever", lambda: served.append(str(folder)))
        return server

    monkeypatch.setattr("tl_adapters.pages.server.make_server", serve_nothing)
    if call[0] == "pull":
        assert main(["push", "--quiet", "--", RUN, "user/repo"]) == 0
    capfd.readouterr()
    assert main([call[0], "--quiet", *call[1:]]) == 0, capfd.readouterr().err
    lines = capfd.readouterr().out.splitlines()
    (line,) = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
    assert line.isprintable()
    words = words_of(line)
    for name in ("HELD_OUT.jsonl", "TRACES.jsonl"):
        assert name not in words or name in call or any(said.startswith(f"For {name} below, give") for said in lines)
    assert main(words) == 0, capfd.readouterr().err
    assert served == ([words[-1]] if words[0] == "serve" else [])
