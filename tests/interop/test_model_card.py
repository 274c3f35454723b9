"""The model card: hostile names are text in its Markdown and strings in its code, and no path of a machine is in it."""

import ast
import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.users_models import reference
from huggingface_hub import RepoCard

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.interop.licenses import licenses_of
from tl_adapters.interop.model_card import card, picture

HOSTILE = 'x")\nimport os; os.system("id")  # | `a` <img src=x onerror=alert(1)> [l](javascript:alert(1))\n---\n'
HOSTILE += "```\n# heading\u202e"


def test_hostile_names_are_text_in_the_card() -> None:
    adapters = replaced(
        base=HOSTILE, target=HOSTILE, base_revision=HOSTILE, target_revision=HOSTILE, datasets=[HOSTILE],
        stream=HOSTILE, fingerprints={"base_mlps": HOSTILE, "target": HOSTILE},
        figures={HOSTILE: {"value": None, **dict.fromkeys(("reason", "unit", "split", "n"), HOSTILE)}, "a": HOSTILE},
    )  # fmt: skip
    text = card(adapters, HOSTILE, {HOSTILE: HOSTILE})
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(head)) == {"library_name", "tags"}
    blocks = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)}
        assert not called - {
            "tla.load", "print", "pair.check", "pair.routed", "model.run_with_cache", "SAE.from_pretrained",
        }  # fmt: skip
    assert HOSTILE in [node.value for node in ast.walk(ast.parse(blocks[1])) if isinstance(node, ast.Constant)]
    rest = re.sub(r"^```python\n.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\\[^\w\s]", "", rest)  # what is escaped is text
    assert not re.findall(r"<|javascript:|\u202e", prose) and prose.count("](") == 2
    assert [line for line in rest.splitlines() if line.startswith("#")] == [
        line for line in rest.splitlines() if line.startswith(("# Transcoder adapters: ", "## "))
    ]
    rows = [line for line in rest.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 5, 6}


@pytest.mark.parametrize(
    "name", ["/home/me/secret/{}", "~/secret/{}", "./secret/{}", "../secret/{}/", "C:\\Users\\me\\secret\\{}"]
)
def test_no_path_of_this_machine_is_in_the_card(name: str) -> None:
    adapters = replaced(**{key: name.format(key) for key in ("base", "target")}, datasets=[name.format("data")])
    text = card(adapters, "user/repo")
    assert "secret" not in text and "Users" not in text and "home" not in text
    assert "# Transcoder adapters: ./target against ./base\n" in text and "trained on ./data." in text
    assert 'base="BASE", target="TARGET"' in text


def replaced(**fields: Any) -> AdapterSet:
    """Adapters with other metadata."""
    adapters = reference(dtype=torch.float32).installed_adapters()
    changed = copy.copy(adapters)
    object.__setattr__(changed, "metadata", dataclasses.replace(adapters.metadata, **fields))
    return changed


def test_figures_come_with_their_meaning_and_licenses_are_said_openly() -> None:
    adapters = replaced(figures={"KL(target || hybrid)": 0.5, "L0, layer 0": 3.0, "L0, layer 1": 4.0})
    text = card(adapters, "user/repo", {"base": "apache-2.0", "data: x": "unknown"})
    assert text.count("active features per token") == 1 and text.count("the difference to be explained") == 1
    assert "accuracy recovered" not in text.lower()
    assert "| base | apache-2.0 |" in text and "| data\\: x | unknown |" in text and "ask the authors" in text
    assert "were not looked up" in card(adapters, "user/repo")
    RepoCard(text, ignore_metadata_errors=False)  # the hub's own reader


def test_the_picture_shows_what_was_measured() -> None:
    """Figures of one kind or both, of any form and any number of layers; without figures there is none."""
    assert picture(replaced(figures={})) is None and "![" not in card(replaced(figures={}), "user/repo")
    l0 = {f"L0, layer {layer}": {"value": 2.0, "low": 2.5, "high": None} for layer in range(28)}
    kl = {f"KL(target || {route})": {"value": 0.5, "low": 0.4, "high": 0.6} for route in ("hybrid", "replacement")}
    odd = {"L0, layer x": {"value": 1.0}, "KL(target || base)": {"value": 1.0}, "L0, layer 28": "many", "n": None}
    odd |= {"L0, layer 29": {"value": math.inf}, "L0, layer 30": {"value": math.nan}, "L0, layer 31": {"value": [1.0]}}
    widths = []
    for figures in (l0, kl, {**l0, **kl}):
        drawn = picture(replaced(figures={**odd, **figures}))
        assert drawn is not None and drawn.startswith(b"\x89PNG")
        assert drawn == picture(replaced(figures=figures)), "odd figures draw nothing"
        widths.append(int.from_bytes(drawn[16:20]))
        assert "](measured.png)" in card(replaced(figures=figures), "user/repo")
    assert widths[0] == widths[1] == widths[2] / 2
    assert picture(replaced(figures={**odd, "L0, layer 0": {"value": 1.0}})) is None, "one bar is no picture"


def test_licenses_are_read_from_cards(tmp_path: Path) -> None:
    for name, card_text in {
        "plain": "---\nlicense: mit\n---\n",
        "named": "---\nlicense: other\nlicense_name: qwen\n---\n",
        "several": "---\nlicense: [mit, apache-2.0]\n---\n",
        "bare": "# A model\n",
        "odd": "---\n- a list\n---\n",
        "broken": "---\na: [\n---\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(card_text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "traces.jsonl").write_text("{}\n")
    about = replaced().metadata

    def found(base: str, *data: str, commit: str | None = None) -> list[str]:
        changed = dataclasses.replace(about, base=base, base_revision=commit, target=organism.BUILTIN_TARGET)
        changed = dataclasses.replace(changed, datasets=list(data))
        return list(licenses_of(changed).values())

    expected = {"plain": "mit", "named": "qwen", "several": "mit, apache-2.0"}
    for name in ("plain", "named", "several", "bare", "odd", "broken", "empty", "nowhere"):
        assert found(str(tmp_path / name)) == [expected.get(name, "unknown"), "apache-2.0"], name
    assert found("", str(tmp_path / "plain"), str(tmp_path / "traces.jsonl"), "org/data", organism.BUILTIN_TEXT) == [
        "unknown", "apache-2.0", "mit", "unknown", "unknown", "apache-2.0",
    ]  # fmt: skip
    assert found(str(tmp_path / "plain"), commit="a" * 40)[0] == "mit", "a folder of the hub's cache has a commit"
    assert "secret" not in str(licenses_of(dataclasses.replace(about, datasets=["/home/me/secret/data"])))
