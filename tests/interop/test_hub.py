"""Adapters go up to the hub in one commit and come down whole or not at all, through the real client."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.loopback_hub import COMMIT, LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.loopback_server import Response
from helpers.random_models import random_model, randomise
from helpers.users_models import plain, reference
from huggingface_hub import RepoCard
from sae_lens import SAE

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.adapters.set_folder import read_description
from tl_adapters.checkpoints.hub_client import HubError
from tl_adapters.checkpoints.model_files import CheckpointError
from tl_adapters.interop.hub import pull, push_to_hub
from tl_adapters.interop.model_card import card
from tl_adapters.models.attach import attach
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.arguments import ArgumentError


@pytest.fixture
def adapters() -> AdapterSet:
    found = reference(dtype=torch.float32).installed_adapters()
    figures = {
        "KL(target || replacement)": {
            "value": 0.0123,
            "low": 0.01,
            "high": 0.02,
            "n": 900,
            "unit": "nats",
            "split": "report",
        },
        **{f"L0, layer {layer}": {"value": 2.0 + layer, "low": 1.5, "high": 6.0} for layer in range(3)},
    }
    for name, value in (
        ("base", "org/base"),
        ("target", "org/target"),
        ("figures", figures),
        ("datasets", ["org/data"]),
    ):
        object.__setattr__(found.metadata, name, value)
    return found


def test_up_and_down(hub: LoopbackHub, adapters: AdapterSet, tmp_path: Path) -> None:  # noqa: F811
    address = push_to_hub(adapters, "user/repo", private=True)
    assert address == f"{hub.server.url}/user/repo/commit/{COMMIT}"
    created = next(request for request in hub.server.requests if request.path == "/api/repos/create")
    assert b"private" in created.body
    back = AdapterSet.from_pretrained("user/repo")
    assert back.metadata.reads == "normalized" and back.fingerprint == adapters.fingerprint
    model, expected = plain(dtype=torch.float32), plain(dtype=torch.float32)
    attach(model, back, on="own_mlp")
    attach(expected, adapters, on="own_mlp")
    tokens = torch.tensor([[3, 5, 8]])
    assert torch.allclose(model(tokens), expected(tokens), atol=1e-5)
    pulled = pull("user/repo", tmp_path / "pulled")
    assert pulled.fingerprint == adapters.fingerprint
    assert type(SAE.load_from_disk(tmp_path / "pulled" / "layer_3")).__name__ == "Transcoder"  # one copy serves both
    push_to_hub(adapters, "user/raw", reads="mlp_input")
    assert torch.equal(AdapterSet.from_pretrained("user/raw")[1].W_enc, adapters[1].W_enc)


def test_branches_and_single_layers(hub: LoopbackHub, adapters: AdapterSet, tmp_path: Path) -> None:  # noqa: F811
    push_to_hub(adapters, "user/repo", revision="seed-1")
    with pytest.raises(AdapterFormatError, match="is not a set of adapters"):
        AdapterSet.from_pretrained("user/repo")  # its main branch is empty
    read_description("user/repo", revision="seed-1")
    assert not any("weights" in file for file in hub.downloads())
    some = AdapterSet.from_pretrained("user/repo", layers=[2], revision="seed-1")
    assert some.layer_indices == [2]
    assert {file for file in hub.downloads() if "weights" in file} == {"layer_2/sae_weights.safetensors"}
    pull("user/repo", tmp_path / "some", layers=[0, 2], revision="seed-1")
    assert AdapterSet.from_pretrained(tmp_path / "some").layer_indices == [0, 2]


def test_a_stated_license_and_the_picture_come_with_the_card(
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
    tmp_path: Path,
) -> None:
    push_to_hub(adapters, "user/repo", license="cc-by-4.0")
    files = hub.files["user/repo"]
    text = files["README.md"].decode()
    assert RepoCard(text).data.license == "cc-by-4.0" and "| these adapters | cc-by-4.0 |" in text
    assert [name for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text) if name in files] == ["measured.png"]
    pull("user/repo", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "measured.png").read_bytes() == files["measured.png"]
    before = len(hub.server.requests)
    with pytest.raises(ArgumentError, match="license is 'MIT, or so'; give an identifier"):
        push_to_hub(adapters, "user/repo", license="MIT, or so")
    assert len(hub.server.requests) == before


def test_the_token_is_the_clients_business(
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    push_to_hub(adapters, "user/repo")
    assert hub.server.requests[0].headers["authorization"] == "Bearer hf_secret"
    assert not any(b"hf_secret" in content for content in hub.files["user/repo"].values())


def test_a_push_that_breaks_off_leaves_nothing(hub: LoopbackHub, adapters: AdapterSet) -> None:  # noqa: F811
    hub.fault = lambda request: Response(reset=True) if "/commit/" in request.path else None
    with pytest.raises(HubError, match=r"did not accept user/repo.*push again|did not accept user/repo.*call again"):
        push_to_hub(adapters, "user/repo")
    hub.fault = lambda request: None
    with pytest.raises(AdapterFormatError, match="is not a set of adapters"):
        AdapterSet.from_pretrained("user/repo")


def test_names_that_nobody_has(adapters: AdapterSet, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="give user/name"):
        push_to_hub(adapters, "not a name")
    with pytest.raises(CheckpointError, match="Names of repositories are NAME or USER/NAME"):
        pull("not a name", tmp_path / "pulled")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        pull("user/repo", tmp_path / "pulled")
    with pytest.raises(FileExistsError, match="exists already"):
        pull("user/repo", tmp_path)


def test_the_card_says_what_they_are(
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
    tmp_path: Path,
) -> None:
    push_to_hub(adapters, "user/repo")
    text = hub.files["user/repo"]["README.md"].decode()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == ["org/target", "org/base"] and head["datasets"] == ["org/data"]
    assert head["library_name"] == "tl_adapters" and "arxiv:2602.20904" in head["tags"]
    assert "| KL(target \\|\\| replacement) | 0.0123 | 0.01 to 0.02 | nats | report, n = 900 |" in text
    assert "https://arxiv.org/abs/2602.20904" in text and adapters.fingerprint in text
    assert "changes nothing" in text and "with folded norms" in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        compile(block, "card", "exec")
    assert "Nothing yet" in card(reference().installed_adapters(), "user/repo")
    local = reference().installed_adapters()
    object.__setattr__(local.metadata, "base", str(tmp_path))
    assert "base_model" not in yaml.safe_load(card(local, "user/repo").split("---")[1])  # a folder is no hub name


def test_the_code_of_the_card_runs(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for folder in (organism.BASE, organism.TARGET):
        hub.files[f"org/{folder.name}"] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    pair = PairedModel.from_pretrained(*(f"org/{folder.name}" for folder in (organism.BASE, organism.TARGET)))
    push_to_hub(randomise(pair, n_features=4).installed_adapters(), "user/repo")
    text = hub.files["user/repo"]["README.md"].decode()
    block, with_saelens = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    hook = re.findall(r"cache\[[\"'](.*?)[\"']\]", block)[0]
    assert names["cache"][hook].shape[-1] == 4 and torch.isfinite(names["logits"]).all()
    assert "KL(target || replacement)" in capsys.readouterr().out
    exec(with_saelens, names)
    assert names["transcoder"].cfg.d_sae == 4


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        ("jumprelu", ("JumpReLU with a learned threshold", "is a stock JumpReLUTranscoder that reads")),
        ("batchtopk", ("5 features per token on average", "is a stock JumpReLUTranscoder that reads")),
    ],
)
def test_thresholds_go_up_and_down(hub: LoopbackHub, activation: str, words: tuple[str, ...]) -> None:  # noqa: F811
    models = (random_model(seed, torch.float32) for seed in (1, 2))
    adapters = randomise(PairedModel.from_pretrained(*models), activation=activation).installed_adapters()
    push_to_hub(adapters, "user/repo")
    back = AdapterSet.from_pretrained("user/repo")
    assert back.fingerprint == adapters.fingerprint and back.metadata.activation == activation
    text = hub.files["user/repo"]["README.md"].decode()
    assert all(word in text for word in words)


def test_what_sae_lens_cannot_load_is_not_pushed(hub: LoopbackHub) -> None:  # noqa: F811
    models = (random_model(seed, torch.float32) for seed in (1, 2))
    adapters = randomise(PairedModel.from_pretrained(*models), activation="topk").installed_adapters()
    with pytest.raises(AdapterFormatError, match="SAELens has no transcoder"):
        push_to_hub(adapters, "user/repo")
    with pytest.raises(AdapterFormatError, match="SAELens has no transcoder"):
        card(adapters, "user/repo")
    assert hub.server.requests == []


def test_the_commit_of_a_hub_model_is_recorded(tmp_path: Path, hub: LoopbackHub) -> None:  # noqa: F811
    for seed, name in ((1, "base"), (2, "target")):
        random_model(seed, torch.float32).save_pretrained(tmp_path / name)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        hub.files[f"org/{name}"] = files
    pair = PairedModel.from_pretrained("org/base", "org/target")
    about = pair.new_adapters(8).metadata
    assert (about.base, about.base_revision) == ("org/base", COMMIT)
    assert (about.target, about.target_revision) == ("org/target", COMMIT)
    assert about.fingerprints == pair.fingerprints and set(json.loads(json.dumps(about.fingerprints))) == {
        "base_mlps",
        "base_dtype",
        "target",
        "target_embedding_and_norms",
        "dtype",
    }
