"""Wrong calls of the command line: the folder in which they are made, and what they print."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path

from helpers.random_models import randomise

from tl_adapters import organism
from tl_adapters.cli.main import main
from tl_adapters.config import RunConfig
from tl_adapters.study.open_run import load_organism_pair


def write_small_place(folder: Path) -> None:
    """A run of the model organism with random adapters, its models by name, and files that cannot be used."""
    run = folder / "runs" / "mine"
    run.mkdir(parents=True)
    randomise(load_organism_pair("cpu"), n_features=4).installed_adapters().save_pretrained(run / "adapters")
    (run / "config.json").write_text(json.dumps(RunConfig().to_dict()))
    record = {"schema_version": 1, "pair": {"base": organism.BUILTIN_BASE, "target": organism.BUILTIN_TARGET}}
    (run / "results.json").write_text(json.dumps(record))
    (folder / "BASE").symlink_to(organism.BASE)
    (folder / "TARGET").symlink_to(organism.TARGET)
    texts = {
        "prompt.txt": "a\n",
        "file.txt": "text\n",
        "empty.jsonl": "",
        "null.jsonl": "null\n",
        "damaged.json": '{"schema_version": 2, "features"',
        "unknown.yaml": "training:\n  learning_rate: 1\n",
        "nan.yaml": "training:\n  lr: .nan\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("é\n".encode("latin-1"))


LONG = "x" * 256
"""A name longer than any file system takes; a call says LONG."""


def message_of(call: str, place: Path) -> tuple[int, str]:
    """Exit code and message of a call, made in ``place``; the message names its files relative to that folder.

    Raises AssertionError where the call prints anything but one line "error: ..." to the standard error.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([LONG if word == "LONG" else word for word in shlex.split(call)])
    said = err.getvalue().replace(LONG, "LONG").replace(f"{place}/", "")
    assert not out.getvalue() and said.startswith("error: ") and said.count("\n") == 1, (call, out.getvalue(), said)
    return status, said.removeprefix("error: ").rstrip("\n")
