"""What files for other people say of models and data: hub names, or a folder's name without its path."""

import os
from pathlib import Path

import pytest

from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.organism import BUILTIN_BASE, BUILTIN_TEXT


@pytest.mark.parametrize(
    ("reference", "published"),
    [
        ("Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"),
        ("gpt2", "gpt2"),
        (BUILTIN_BASE, BUILTIN_BASE),
        ("", ""),
        (BUILTIN_TEXT, BUILTIN_TEXT),
        ("/home/ada/models/base", "./base"),
        ("/home/ada/models/base/", "./base"),
        ("~/models/base", "./base"),
        ("../base", "./base"),
        ("models/ada/base", "./base"),
        ("C:\\Users\\ada\\base", "./base"),
        ("./base", "./base"),
        ("data/traces.jsonl", "./traces.jsonl"),
        ("/home/ada/.cache/huggingface/hub/models--org--name/snapshots/89ab", "org/name"),
    ],
)
def test_no_path_is_published(reference: str, published: str) -> None:
    assert published_name(reference) == published == published_name(published)


def test_a_folder_that_looks_like_a_hub_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("models/base")
    assert published_name("models/base") == "./base"
    assert published_name("models/base", revision="0123abcd") == "models/base"  # it came from the hub, by that name


def test_metadata_are_published_without_paths() -> None:
    about = AdapterMetadata(base="/home/ada/base", target="org/target", datasets=["/home/ada/traces.jsonl", "org/data"])
    assert about.published() == AdapterMetadata(
        base="./base", target="org/target", datasets=["./traces.jsonl", "org/data"]
    )
