"""What is pushed or exported names models and data by hub name or folder name; it holds no path of this machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.random_models import random_model, randomise
from helpers.word_tokenizers import word_tokenizer

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.attribution.provenance import provenance
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.model_files import CheckpointError
from tl_adapters.cli.main import main
from tl_adapters.interop.export import export
from tl_adapters.interop.hub import push_to_hub
from tl_adapters.models.paired_model import PairedModel


@pytest.fixture
def pair(tmp_path: Path) -> PairedModel:
    """A pair from folders whose own files name where they were loaded from, with its adapters in adapters/."""
    private = tmp_path / "ada's models"
    for seed, name in enumerate(("base", "target")):
        random_model(seed, torch.float32, num_hidden_layers=2).save_pretrained(private / name)
        path = private / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": str(private / "earlier")}))
        record = {"tokenizer_class": "PreTrainedTokenizerFast", "name_or_path": str(private / name)}
        (private / name / "tokenizer_config.json").write_text(json.dumps(record))
    shutil.rmtree(private / "earlier", ignore_errors=True)
    pair = randomise(
        PairedModel.from_pretrained(private / "base", private / "target", tokenizer=word_tokenizer(*"abc"))
    )
    adapters = pair.installed_adapters()
    object.__setattr__(adapters.metadata, "datasets", [str(private / "traces.jsonl"), "org/data"])
    adapters.save_pretrained(tmp_path / "adapters")
    return pair


def naming(folder: Path, secret: str) -> list[str]:
    """The files that hold a text."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_nothing_that_leaves_names_a_path(hub: LoopbackHub, pair: PairedModel, tmp_path: Path) -> None:  # noqa: F811
    assert naming(tmp_path / "adapters", "ada's models")  # here they are found again
    out = tmp_path / "out"
    for to in ("saelens", "authors", "hybrid", "target"):
        export(tmp_path / "adapters", to, out / to)  # type: ignore[arg-type]
    push_to_hub(AdapterSet.from_pretrained(tmp_path / "adapters"), "user/repo")
    for name, content in hub.files["user/repo"].items():
        (out / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "hub" / name).write_bytes(content)
    assert naming(out, "ada's models") == [] == naming(out, str(tmp_path))
    about = AdapterSet.from_pretrained("user/repo").metadata
    assert (about.base, about.target, about.datasets) == ("./base", "./target", ["./traces.jsonl", "org/data"])
    assert json.loads((out / "hybrid" / "config.json").read_text())["tl_adapters"]["mlps_of"] == "./base"
    assert (provenance(pair)["base"], provenance(pair)["target"]) == ("./base", "./target")


def test_who_pulls_such_adapters_is_asked_for_the_models(
    hub: LoopbackHub,  # noqa: F811
    pair: PairedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push_to_hub(pair.installed_adapters(), "user/repo")
    pulled, private = tmp_path / "pulled", tmp_path / "ada's models"
    assert main(["pull", "user/repo", "--out", str(pulled)]) == 0
    said = capsys.readouterr().out
    assert "The base was ./base, a folder of another machine: give your copy for BASE below." in said
    assert f"next: tl-adapters doctor BASE TARGET {pulled}" in said
    assert main(["doctor", "./base", "./target", str(pulled)]) == 1
    assert "a folder of another machine: give your copy" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no folder ./target.*give your copy"):
        export(pulled, "hybrid", tmp_path / "hybrid", base=str(private / "base"))
    with pytest.raises(PairMismatchError, match="other weights than the target.*--target"):
        export(pulled, "hybrid", tmp_path / "hybrid", base=str(private / "base"), target=str(private / "base"))
    assert not (tmp_path / "hybrid").exists()
    export(pulled, "hybrid", tmp_path / "hybrid", base=str(private / "base"), target=str(private / "target"))
    other = PairedModel.from_pretrained(private / "base", private / "target", tokenizer=word_tokenizer(*"abc"))
    other.load_adapters(AdapterSet.from_pretrained(pulled))
