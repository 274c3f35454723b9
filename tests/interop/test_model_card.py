"""The model card: hostile names are text in its Markdown and strings in its code, and no path of a machine is in it."""

import ast
import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
import yaml
from helpers.users_models import reference

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.interop.model_card import card

HOSTILE = 'x")\nimport os; os.system("id")  # | `a` <img src=x onerror=alert(1)> [l](javascript:alert(1))\n---\n'
HOSTILE += "```\n# heading\u202e"


def test_hostile_names_are_text_in_the_card() -> None:
    adapters = replaced(
        base=HOSTILE, target=HOSTILE, base_revision=HOSTILE, target_revision=HOSTILE, datasets=[HOSTILE],
        stream=HOSTILE, fingerprints={"base_mlps": HOSTILE, "target": HOSTILE},
        figures={HOSTILE: {"value": None, **dict.fromkeys(("reason", "unit", "split", "n"), HOSTILE)}, "a": HOSTILE},
    )  # fmt: skip
    text = card(adapters, HOSTILE)
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(head)) == {"library_name", "tags"}
    blocks = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)}
        assert not called - {
            "PairedModel.from_pretrained", "pair.load_adapters", "AdapterSet.from_pretrained", "pair.routed",
            "model.run_with_cache", "SAE.from_pretrained",
        }  # fmt: skip
    assert HOSTILE in [node.value for node in ast.walk(ast.parse(blocks[1])) if isinstance(node, ast.Constant)]
    rest = re.sub(r"^```python\n.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\\[^\w\s]", "", rest)  # what is escaped is text
    assert not re.findall(r"<|javascript:|\u202e", prose) and prose.count("](") == 2
    assert [line for line in rest.splitlines() if line.startswith("#")] == [
        line for line in rest.splitlines() if line.startswith(("# Transcoder adapters: ", "## "))
    ]
    rows = [line for line in rest.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5, 6}


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
