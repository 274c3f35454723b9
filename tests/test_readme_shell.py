"""Every tl-adapters line of README and guides is run on the small demo, its size bounded where an option does so."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from helpers.readme import commands

from tl_adapters import organism
from tl_adapters.cli.main import main, parse

PRINTED = [line for line in commands() if line.startswith("tl-adapters")]
LINES = list({line.split("  #")[0].strip(): line for line in PRINTED}.values())  # a guide may repeat another's command
SMALL = ("--config", "small.yaml")
BOUNDS = {
    "hesitation": ("--limit", "32"),
    "benchmark": ("--limit", "8"),
    "features": ("--data", "held_out.jsonl"),
    "train": SMALL,
    "sweep": (*SMALL, "--documents", "8"),
    "serve": ("--port", "0"),
}
"""By subcommand, what the test adds to a line as it is printed."""
FEWER_STEPS = {
    "--set steps=80": "--set steps=2",
    "--config builtin_end_to_end": "--config builtin_end_to_end --set steps=2",
}
"""What the test writes where a line trains by the paper's objective."""
ELSEWHERE = ("push", "pull", "gsm8k", "--config paper", "nathu0/", "--engine vllm", "--engine http")
"""What only the hub, or vLLM, can answer: where it is not, one error that says so."""


def test_the_readme_has_commands() -> None:
    assert len(LINES) > 15


@pytest.fixture
def place(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every line finds what it names."""
    for name in ("demo", "mine"):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "BASE").symlink_to(organism.BASE)
    (tmp_path / "TARGET").symlink_to(organism.TARGET)
    shutil.copytree(run / "adapters", tmp_path / "adapters")
    rows = [{"prompt": q, "response": r} for q, r in organism.reasoning_pairs("train", 40)]
    for name in ("traces", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompt.txt").write_text("<|bos|><|user|>47+85+19=?<|assistant|><think>47+85=122.\n")
    (tmp_path / "small.yaml").write_text(
        "training:\n  n_features: 16\n  local: {steps: 2, max_tokens: 2000, polish: false, revisions: []}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tl_adapters.study.open_run.ORGANISM_TRACES", 400)  # of which two steps read 2,000 tokens
    # The demo itself is run once for all tests; here its command is.
    copied = lambda folder, *args, **options: shutil.copytree(run, folder) / "report.html"  # noqa: E731
    monkeypatch.setattr("tl_adapters.study.demo.demo", copied)
    monkeypatch.setattr("tl_adapters.pages.server.ThreadingHTTPServer.serve_forever", lambda self: None)
    return tmp_path


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.split("#")[0].split()[1:]))
def test_a_line_runs_as_printed(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, fewer in FEWER_STEPS.items():
        line = line.replace(steps, fewer)
    words = shlex.split(line, comments=True)[1:]
    if "--resume" in words:
        shutil.rmtree("runs/mine")
        begin = ["train", "--base", "BASE", "--target", "TARGET", "--data", "traces.jsonl", "--out", "runs/mine"]
        assert main([*begin, *SMALL, "--quiet"]) == 0
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    if out is not None and out.exists():
        shutil.rmtree(out)
    if words[0] == "features":
        shutil.rmtree("runs/demo/features")  # the demo's own store has other documents
    bounded = any(option in words for option in ("--config", "--resume", "--data" if words[0] == "features" else ""))
    quiet = () if words[0] == "config" else ("--quiet",)  # it has nothing to be quiet about
    status = main([*words, *(() if bounded else BOUNDS.get(words[0], ())), *quiet])
    printed = capsys.readouterr()
    if any(name in line for name in ELSEWHERE):
        assert status == 2 and printed.err.startswith("error: ") and "Traceback" not in printed.err
        assert out is None or not out.exists()
        return
    assert status == 0, printed.err
    assert printed.out.strip()
    assert out is None or out.exists()
    for shown in (line for line in printed.out.splitlines() if line.startswith("next: ")):
        parse(shlex.split(shown)[2:])  # the next command is one, too
