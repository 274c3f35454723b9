"""README and guides are run: their Python in order, their commands against Makefile and parser."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.readme import ROOT, blocks

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.circuits.circuit import Circuit
from tl_adapters.cli.main import parse
from tl_adapters.interop.export import export


def label_of(line: str) -> str:
    """What stands before the figures of a line."""
    return re.sub(r"\d+", "N", line.partition(": ")[0])


def test_the_python_runs(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hub: LoopbackHub,  # noqa: F811
) -> None:
    """The hub's names stand for the built-in pair: its target, and its replacement as the paper's authors write one.

    What is pushed goes to a hub of this process.
    """
    monkeypatch.chdir(tmp_path)
    export(run, "authors", tmp_path / "theirs")
    local = {"nathu0/transcoder-adapters-R1-Distill-Qwen-7B-l1w0.001-l0-1.4": tmp_path / "theirs"}
    local["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"] = organism.TARGET
    local["runs/demo"] = run
    local['"math500", pair, n=100'] = '"builtin", pair, n=24'
    local["steps=60, polish"] = "steps=20, revisions=(0.5,), polish"
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        for name, folder in local.items():
            block = block.replace(name, str(folder))
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    shapes = [line for line in printed if line.startswith("torch.Size")]
    shown = [line for block in blocks("text") for line in block.splitlines() if line.startswith("torch.Size")]
    assert shapes == shown and shown
    labels = [label_of(line) for line in blocks("text")[0].splitlines()]
    assert len(labels) > 8 and {*labels[:7]} <= {label_of(line) for line in printed}, "what README shows, it prints"
    assert any(isinstance(value, torch.Tensor) for value in namespace.values())
    pushed = Circuit.from_hub("user/adapters")
    assert (
        pushed.features and pushed.fingerprints["adapters"] == AdapterSet.from_pretrained("user/adapters").fingerprint
    )


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]
    assert "make demo" in commands and "make test" in commands
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        elif words[0].endswith("tl-adapters"):
            parse(words[1:])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), command
        else:
            assert words[0] in ("pip", "git", "cd", ".venv/bin/python", "for"), command
