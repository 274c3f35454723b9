"""The command line: how words become values, what is printed at the end, and what the reference says."""

import errno
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.readme import ROOT
from helpers.wrong_calls import write_small_place

from tl_adapters import organism
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import Circuit, CircuitFeature
from tl_adapters.cli.common import feature_ids, read_prompt, tasks_of
from tl_adapters.cli.main import EXIT_CODES, SUBCOMMANDS, app, main, parse
from tl_adapters.cli.result import Result
from tl_adapters.config import json_schema
from tl_adapters.errors import UserError
from tl_adapters.pages.server import make_server
from tl_adapters.utils.printing import command, quoted

NAMES = [function.__name__ for function in SUBCOMMANDS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_small_place(folder)
    rows = [{"prompt": q, "response": r} for q, r in organism.reasoning_pairs("train", 12)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# -- words ------------------------------------------------------------------------------------------------------------


def given(*words: str) -> dict[str, Any]:
    """The options of a call that differ from their defaults."""
    call, plain = parse(words).keywords, parse(words[:2]).keywords
    return {name: value for name, value in call.items() if value != plain[name]}


def test_an_option_takes_every_word_up_to_the_next_option() -> None:
    found = given(
        "generate", "RUN", "--ablate", "2.17", "a b.json:output", "--raw", "--ablate", "4.3", "--prompt", "-x"
    )
    assert found == {"ablate": [("2.17", "a b.json:output"), ("4.3",)], "raw": True, "prompt": "-x"}
    assert given("generate", "RUN", "--scale", "-2.5", "3.1") == {"scale": [("-2.5", "3.1")]}
    assert given("benchmark", "RUN", "--words", "wait", "hold on", "--limit=3") == {
        "hesitation_words": [("wait", "hold on")],
        "limit": 3,
    }
    assert parse(["pull", "a/b", "--layers", "0", "1", "--out", "x"]).keywords["layers"] == [("0", "1")]
    assert parse(["pull", "a/b", "--layers", "0", "1", "--out=x y"]).keywords["layers"] == [("0", "1")]


def test_an_option_in_brackets_may_stand_alone() -> None:
    assert given("label", "RUN", "--judge", "--model", "NAME") == {"judge": 0, "model": "NAME"}
    assert given("label", "RUN", "--judge") == given("label", "RUN", "--judge", "0") == {"judge": 0}
    assert given("label", "RUN", "--judge", "12") == {"judge": 12}
    assert parse(["label", "--judge", "RUN"]).keywords["run_folder"] == Path("RUN")


def test_a_value_that_looks_like_an_option_is_given_with_an_equals_sign() -> None:
    with pytest.raises(UserError, match="--out needs a value, and the option --quiet follows; give --out DIR"):
        parse(["demo", "--out", "--quiet"])
    assert parse(["demo", "--out=--quiet"]).keywords["out"] == Path("--quiet")


def test_paths_hold_colons_and_commas(tmp_path: Path) -> None:
    features = [CircuitFeature(FeatureId(3, i), "output", 1.0, 0.0, 1.0, 0.0, 1.0, 1.0) for i in (1, 2)]
    circuit = Circuit("hesitation", ("Wait",), tuple(features), 1.5, "select", {}, 8, 4, 0.1)
    (tmp_path / "a:b.json:c").mkdir()
    path = circuit.save(tmp_path / "a:b.json:c")
    assert feature_ids([str(path)]) == [FeatureId(3, 1), FeatureId(3, 2)]
    assert feature_ids([f"{path}:output", "0.5"]) == [FeatureId(3, 1), FeatureId(3, 2), FeatureId(0, 5)]
    assert tasks_of(["gsm8k=/a,b.jsonl", "math500"]) == {"gsm8k": "/a,b.jsonl", "math500": None}
    assert tasks_of(["a,b=x,y,c=z"]) == {"a": None, "b": "x,y", "c": "z"}


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert read_prompt(None, tmp_path / "prompt.txt") == "a\n"


# -- results ----------------------------------------------------------------------------------------------------------

HARD = ["a b", "it's", "-x", "$HOME", "`ls`", "a\nb", "\x1b[31m'\\\u202e", "\x9bé", "漢", "a\udcff1"]


def test_a_shell_reads_printed_words_as_they_were() -> None:
    printf = " ".join(["printf", shlex.quote("%s\\0"), *map(quoted, HARD)])
    read = subprocess.run(["bash", "-c", printf], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert os.fsdecode(read).split("\0")[:-1] == HARD
    assert all(c.isprintable() for word in HARD for c in quoted(word))


def test_a_command_leaves_out_what_is_not_given() -> None:
    line = command("benchmark", Path("my runs/a"), limit=None, samples=4, open_thinking=True, words=["a b", "c"])
    assert line == "tl-adapters benchmark 'my runs/a' --samples 4 --open-thinking --words 'a b' c"
    assert given(*shlex.split(line)[1:])["hesitation_words"] == [("a b", "c")]


def test_a_command_is_parsed_as_it_was_meant() -> None:
    line = command("features", Path("-a run"), data="--b", tokens_per_batch=5)
    assert line == "tl-adapters features --data=--b --tokens-per-batch 5 -- '-a run'"
    call = parse(shlex.split(line)[1:]).keywords
    assert (call["run_folder"], call["data"], call["tokens_per_batch"]) == (Path("-a run"), "--b", 5)
    line = command("benchmark", "RUN", words=["--x", "hold on"], quiet=False)
    assert parse(shlex.split(line)[1:]).keywords["hesitation_words"] == [("--x",), ("hold on",)]


def test_the_next_command_and_the_object_follow_a_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What doctor prints is run, with options of its own, and what that prints is parsed."""
    monkeypatch.chdir(place)
    assert main(["doctor", "BASE", "TARGET", "--data", "traces.jsonl", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert all(finding["level"] != "error" for finding in found["results"]["findings"])
    words = shlex.split(found["next"])[1:]
    assert words[:2] == ["train", "--base"] and "traces.jsonl" in words
    sets = ["local.steps=1", "n_features=4", "beta1=0.5", "data.validation_fraction=0.25"]
    small = [word for option in sets for word in ("--set", option)]
    words[words.index("--out") + 1] = "runs/a new one"
    assert main([*words, *small, "--quiet", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    options = json.loads(Path("runs/a new one/config.json").read_text())
    assert (options["training"]["beta1"], options["data"]["validation_fraction"]) == (0.5, 0.25)
    assert found["paths"] == {"adapters": "runs/a new one/adapters"} and found["results"]["train"]["steps"] == 1
    assert found["next"] == "tl-adapters evaluate 'runs/a new one' --data HELD_OUT.jsonl"
    parse(shlex.split(found["next"])[1:])


def test_config_prints_its_options_as_an_object(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "paper", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["results"]["training"]["n_features"] == 8192
    assert main(["config", "--list", "--json"]) == 0
    assert "paper" in json.loads(capfd.readouterr().out)["results"]["configurations"]


def test_what_libraries_print_does_not_enter_the_object(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make = make_server

    def noisy(*arguments: Any) -> ThreadingHTTPServer:
        print("noise")
        return make(*arguments)

    monkeypatch.setattr("tl_adapters.pages.server.make_server", noisy)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda self: None)
    assert main(["serve", str(place), "--port", "0", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["results"]["url"].startswith("http://127.0.0.1:") and "noise" in err


def test_a_list_of_paths_is_a_line_each(capfd: pytest.CaptureFixture[str]) -> None:
    result = Result({"answers": ["a", Path("b\nc")]}, {"n": 1}, "text", command("serve", "x y"))
    result.show()
    assert capfd.readouterr().out == "text\nanswers: a\nanswers: b\\nc\nnext: tl-adapters serve 'x y'\n"
    result.show(as_json=True)
    paths = {"answers": ["a", "b\nc"]}
    assert json.loads(capfd.readouterr().out) == {
        "results": {"n": 1}, "paths": paths, "next": "tl-adapters serve 'x y'"
    }  # fmt: skip


def test_a_place_that_cannot_be_read_is_one_line_and_other_errors_are_bugs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(error: OSError) -> None:
        def raise_it(*_: object) -> None:
            raise error

        monkeypatch.setattr("tl_adapters.pages.server.make_server", raise_it)

    fail(PermissionError(errno.EACCES, "Permission denied", "a\nb"))
    assert main(["serve", "x"]) == 2
    assert capfd.readouterr().err == "error: a\\nb: Permission denied. Choose another place, or change that one.\n"
    fail(OSError(errno.EIO, "Input/output error", "a"))
    with pytest.raises(OSError, match="Input/output"):
        main(["serve", "x"])


def test_a_reader_that_leaves_ends_the_command_without_a_word() -> None:
    call = f"{shlex.quote(sys.executable)} -m tl_adapters.cli config | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", call], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (ended.stdout.strip(), ended.stderr) == ("130", "")


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_that_parse(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out, err = capfd.readouterr()
    examples = [line.strip() for line in out.split("Examples:")[1].splitlines() if line.strip()]
    assert examples and all(example.startswith(f"tl-adapters {name}") for example in examples) and not err
    for example in examples:
        parse(shlex.split(example.split(" > ")[0])[1:])
    assert "--json" in out and "[default: auto]" not in out


def test_help_says_what_the_exit_codes_mean(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert " ".join(EXIT_CODES.split()) in out
    assert re.findall(r"(\d+) ", EXIT_CODES) == ["0", "1", "2", "130"]


def test_a_shell_completes_subcommands_and_options() -> None:
    def completed(line: str) -> list[str]:
        words = {
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
            "_TL_ADAPTERS_COMPLETE": "complete_bash",
        }
        call = [sys.executable, "-m", "tl_adapters.cli"]
        out = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **words}, check=True)
        return out.stdout.split()

    assert completed("tl-adapters h") == ["hesitation"]
    assert completed("tl-adapters export x --t") == ["--to", "--target"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("commands", ROOT / ".ci" / "commands.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(script: ModuleType) -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert text == script.page(), "write it anew: make commands"
    for name, one in app().commands.items():
        for option in one.params:
            spellings = [spelling for spelling in option.opts if spelling.startswith("--")]
            missing = [one for one in spellings if not re.search(rf"(`|, ){one}[ ,`]", text)]
            assert not missing, (name, missing)


def test_the_schema_of_configurations_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capfd.readouterr().out) == json_schema()
    assert main(["config", "--schema", "--list"]) == main(["config", "--schema", "paper"]) == 2


def test_the_command_lets_waiting_threads_sleep_and_a_call_from_python_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["--version"]) == 0 and "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setattr("sys.argv", ["tl-adapters", "--version"])
    assert main() == 0 and os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main() == 0 and os.environ["OMP_WAIT_POLICY"] == "active"
