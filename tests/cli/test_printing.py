"""Names and texts that others wrote reach the terminal with nothing in them that a terminal acts on (D2)."""

import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_models import random_model, randomise

import tl_adapters.study.evaluate
from tl_adapters.cli.main import main
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import BASE, TARGET
from tl_adapters.utils.printing import printable, printable_line, show, show_traceback

NASTY = "x\x1b]0;title\x07\x9b31m\r\u202ey\u2066\u200b"
"""Escape sequences that rename the window and color the text, a carriage return, and marks of direction."""


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    text = "a\x1b]0;title\x07b\x9b31mc\rd\u202ee\u2028f\u200bg\x00h\ti\ud800j"
    escaped = r"a\x1b]0;title\x07b\x9b31mc\rd\u202ee\u2028f\u200bg\x00h    i\ud800j"
    assert printable(text) == escaped
    assert printable(f"{text}\né 漢 🙂") == f"{escaped}\né 漢 🙂"
    assert printable_line(f"{text}\né") == rf"{escaped}\né"


def test_a_terminal_of_another_encoding_shows_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        show("漢\nb")
    assert (tmp_path / "out").read_text() == "\\u6f22\nb\n"


@pytest.fixture(scope="module")
def nasty_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters whose every name is hostile, in a folder of such a name."""
    models = (random_model(seed, torch.float32, num_hidden_layers=1) for seed in (1, 2))
    adapters = randomise(PairedModel.from_pretrained(*models), n_features=4).installed_adapters()
    adapters.metadata = replace(adapters.metadata, base=f"org/{NASTY}", target=f"org/{NASTY}")
    folder = tmp_path_factory.mktemp("nasty") / f"set {NASTY}"
    adapters.save_pretrained(folder)
    return folder


CALLS: dict[str, Callable[[Path, Path], list[object]]] = {
    "pull": lambda nasty, _: ["pull", nasty, "--out", nasty.with_name("pulled")],
    "pull a set that is not there": lambda nasty, _: ["pull", f"{nasty}2", "--out", nasty.with_name("b")],
    "pull a damaged set": lambda nasty, files: ["pull", files / NASTY, "--out", nasty.with_name("b")],
    "doctor": lambda nasty, _: ["doctor", BASE, TARGET, f"{nasty}2"],
    "doctor of models": lambda nasty, files: ["doctor", BASE, files / NASTY],
    "a configuration": lambda _, files: ["config", files / f"{NASTY}.yaml"],
    "no configuration": lambda _, files: ["config", files / f"{NASTY}2.yaml"],
    "a run": lambda _, files: ["evaluate", files / NASTY],
    "a circuit": lambda _, files: ["generate", files, "--prompt", "a", "--ablate", f"{files / NASTY}.json"],
    "a role": lambda _, files: ["generate", files, "--prompt", "a", "--ablate", f"{files / NASTY}.json:{NASTY}"],
    "a feature": lambda _, files: ["benchmark", files, "--ablate", NASTY],
    "a sweep": lambda _, files: ["sweep", "--over", f"{NASTY}=1", "--out", files / "sweep"],
    "a device": lambda _, files: ["evaluate", files, "--device", NASTY],
    "documents": lambda _, files: [
        "train", "--base", BASE, "--target", TARGET, "--data", files / f"{NASTY}.jsonl", "--out", files / "run"
    ],
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, nasty_set: Path) -> Path:
    """Damaged files of hostile names and contents."""
    (tmp_path / f"{NASTY}.yaml").write_text(f"training: {{{NASTY!r}: 1}}".replace("'", '"'))
    (tmp_path / f"{NASTY}.json").write_text(f'{{"{NASTY}": 1}}')
    (tmp_path / f"{NASTY}.jsonl").write_text(f'{{"messages": [{{"role": "{NASTY}", "content": "a"}}]}}\n')
    shutil.copytree(nasty_set, tmp_path / NASTY)
    (tmp_path / NASTY / "config.json").write_text('{"architectures": ["X\\u001b[31m\\u202e"], "model_type": "\\u001b"}')
    (tmp_path / NASTY / "tl_adapters.json").write_text('{"schema_version": 3, "base": "\\u001b[31m\\u202e"}')
    return tmp_path


@pytest.mark.parametrize("what", CALLS)
def test_no_subcommand_prints_what_a_terminal_acts_on(
    what: str, nasty_set: Path, files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main([str(word) for word in CALLS[what](nasty_set, files)])
    out, err = capfd.readouterr()
    assert re.search(r"\\(x|u00)1b", out + err), "the name is not shown at all, so the case tests nothing"
    assert harmless(out) and harmless(err)


def harmless(text: str) -> bool:
    return all(character == "\n" or character.isprintable() for character in text)


def fail(error: BaseException) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run


def speak(*_: object) -> None:
    """A log message and a warning of another library, which has a handler of its own."""
    other = logging.getLogger("another.library")
    other.addHandler(logging.StreamHandler())
    other.warning("%s", NASTY)
    warnings.warn(NASTY, UserWarning, stacklevel=1)
    logging.getLogger("tl_adapters.test").info("%s", NASTY)
    raise UserError(NASTY)


@pytest.mark.parametrize(
    ("run", "status"), [(fail(UserError(NASTY)), 2), (fail(KeyboardInterrupt(NASTY)), 130), (speak, 2)]
)
def test_errors_and_messages_of_libraries_are_harmless(
    run: Callable[..., None], status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tl_adapters.study.evaluate, "evaluate_run", run)
    assert main(["evaluate", "anywhere"]) == status
    out, err = capfd.readouterr()
    assert not out and err.count(r"\x1b]0;title\x07") == (5 if run is speak else 1)
    assert harmless(err)


def test_the_traceback_of_a_bug_is_harmless(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tl_adapters.study.evaluate, "evaluate_run", fail(ZeroDivisionError(NASTY)))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(ZeroDivisionError) as caught:
        main(["evaluate", "anywhere"])
    assert sys.excepthook is show_traceback
    sys.excepthook(caught.type, caught.value, caught.tb)
    err = capfd.readouterr().err
    assert r"ZeroDivisionError: x\x1b]0;title\x07" in err and "Traceback" in err and harmless(err)
