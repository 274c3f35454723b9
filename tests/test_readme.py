"""README and guides are run: their Python in order, their commands against Makefile and parser."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from helpers.bound_calls import check_calls
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.readme import GENERATED, NOT_RUN, PAGES, ROOT, blocks, blocks_of, commands

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
    for block in (block for page in PAGES if page.name not in NOT_RUN for block in blocks_of(page, "python")):
        for name, folder in local.items():
            block = block.replace(name, str(folder))
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    shapes = [line for line in printed if line.startswith("torch.Size")]
    shown = [line for block in blocks("text") for line in block.splitlines() if line.startswith("torch.Size")]
    assert shapes == shown and shown
    # What README shows, it prints: the labels of all figures, and the prompt; the response is the model's own.
    *results, prompt = blocks("text")[0].partition("<think>")[0].splitlines()
    assert len(results) == 7 and {*map(label_of, results)} <= {*map(label_of, printed)}
    assert prompt.endswith("=?<|assistant|>") and label_of(prompt) in {
        label_of(line.partition("<think>")[0]) for line in printed
    }
    assert any(isinstance(value, torch.Tensor) for value in namespace.values())
    pushed = Circuit.from_hub("user/adapters")
    assert (
        pushed.features and pushed.fingerprints["adapters"] == AdapterSet.from_pretrained("user/adapters").fingerprint
    )


def test_every_page_with_a_block_is_read_here() -> None:
    """Another page with commands, a block in a language that nothing reads: neither is left out without a word."""
    texts = {page: page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")}
    with_blocks = {page for page, text in texts.items() if re.search(r"^ *```(python|sh)\b", text, re.M)}
    assert with_blocks - {*PAGES} == {ROOT / "docs" / name for name in GENERATED}
    assert {*NOT_RUN} <= {page.name for page in PAGES} and len({*PAGES}) == len(PAGES)
    for page, text in {**texts, **{page: page.read_text(encoding="utf-8") for page in PAGES}}.items():
        fences = re.findall(r"^( *)```(\w*) *$", text, re.M)
        assert len(fences) % 2 == 0, page
        assert {*fences[::2]} <= {("", name) for name in ("python", "sh", "text", "sql")}, page
        assert {*fences[1::2]} <= {("", "")}, page


def test_calls_of_python_that_is_not_run_here_bind() -> None:
    for name in NOT_RUN:
        for block in blocks_of(ROOT / "docs" / name, "python"):
            assert check_calls(block) >= 3, block


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("tla.lode('runs/mine')", AttributeError),
        ("from tl_adapters.config import NoConfig", AttributeError),
        ("tla.load('runs/mine', devise=0)", TypeError),
        ("tla.PairedModel.from_pretrained('base', device_map='auto')", TypeError),
        ("tla.HarnessModel()", TypeError),
        ("pair = tla.load('runs/mine')\nwith pair.ablate([(0, 1)]) as model:\n    print(model)", AttributeError),
        ("with tla.opened_engine(run, 'vllm') as served:\n    print(served.model_of())", TypeError),
        ("pair = tla.load('runs/mine', device_map={0: 1, ...})", SyntaxError),
    ],
)
def test_a_call_that_does_not_bind_is_noticed(source: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_calls(f"import tl_adapters as tla\n{source}")


class Parsed(Exception):
    """A script has read its options."""


@pytest.fixture
def only_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts end when they have read their options."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(*args: object, **options: object) -> None:
        parse_args(*args, **options)  # type: ignore[call-overload]
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)


def test_the_commands_exist(only_options: None, monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "make demo" in commands() and "make test" in commands()
    for command in commands():
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        elif words[0].endswith("tl-adapters"):
            parse(words[1:])
        elif words[0] == "python":
            script = ROOT / words[1]
            if "parse_args" not in script.read_text(encoding="utf-8"):
                assert not words[2:], f"{command}: the script has no options"
                continue
            monkeypatch.setattr(sys, "argv", [str(script), *words[2:]])
            monkeypatch.syspath_prepend(script.parent)
            with pytest.raises(Parsed):
                runpy.run_path(str(script), run_name="__main__")
        elif words[0] == "accelerate":
            assert words[1] == "launch"
            launched, others = launch_command_parser().parse_known_args(words[2:])
            assert launched.module and launched.training_script == "tl_adapters" and not others, command
            parse(launched.training_script_args)
        else:
            assert words[0] in ("pip", "git", "cd", ".venv/bin/python", "for"), command
