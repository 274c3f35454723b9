"""Adapters: how they start, and how they are written and read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS
from sae_lens import SAE

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.adapters.set_folder import SET_METADATA_FILE, read_description, record_hash
from tl_adapters.adapters.transcoder import TranscoderAdapter, unit_rows
from tl_adapters.checkpoints.layer_samples import LayerSamples


def adapter_set(n_layers: int = 3, d_model: int = 8, n_features: int = 12, activation: str = "relu") -> AdapterSet:
    generator = torch.Generator().manual_seed(0)
    options = ACTIVATION_OPTIONS[activation]
    layers = [TranscoderAdapter(d_model, n_features, generator=generator, **options) for _ in range(n_layers)]
    with torch.no_grad():
        for adapter in layers:
            for weight in adapter.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator))
            if activation in ("jumprelu", "batchtopk"):
                adapter.threshold.copy_(torch.rand(n_features, generator=generator))
    kept = [LayerSamples(*torch.randn(3, d_model, generator=generator)) for _ in range(n_layers)]
    k = layers[0].k
    about = AdapterMetadata(base="b", target="t", figures={"kl": 0.5}, activation=layers[0].activation, k=k)
    return AdapterSet(layers, kept, about)


def test_initialisation_is_the_papers() -> None:
    adapter = TranscoderAdapter(64, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    bound = 64**-0.5
    assert adapter.W_enc.abs().max() <= bound
    assert adapter.W_enc.abs().mean() == pytest.approx(bound / 2, rel=0.02)  # uniform in +-bound
    assert not any(w.any() for w in (adapter.b_enc, adapter.W_dec, adapter.b_dec))


def test_encode_and_decode_keep_any_leading_axes() -> None:
    adapter = adapter_set()[0]
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(adapter(x)[1, 2], adapter(x[1, 2][None])[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decoder_norms_and_directions(dtype: torch.dtype) -> None:
    adapters = adapter_set().to(dtype)
    with torch.no_grad():
        adapters[1].W_dec[3] = 0  # a feature that writes nothing
    rows = adapters[1].W_dec.detach()
    norms = adapters[1].decoder_norms()
    assert norms.dtype == torch.promote_types(dtype, torch.float32) and norms.requires_grad and norms[3] == 0
    torch.testing.assert_close(norms.detach(), rows.to(norms.dtype).square().sum(-1).sqrt())
    units = unit_rows(rows)
    assert units.dtype == dtype and not units[3].any()
    torch.testing.assert_close(units * norms.detach()[:, None].to(dtype), rows)
    whole = adapters.decoder_norms()
    assert whole.shape == (3, 12) and whole.dtype == torch.float32 and not whole.requires_grad
    assert torch.equal(whole[1], norms.detach().float())


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_round_trip(activation: str, tmp_path: Path) -> None:
    before = adapter_set(activation=activation)
    before.save_pretrained(tmp_path / "a")
    after = AdapterSet.from_pretrained(tmp_path / "a")
    assert after.metadata == before.metadata
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    assert [name for name, _ in before.named_parameters()] == [name for name, _ in after.named_parameters()]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before[1](x), after[1](x)) and after.fingerprint == before.fingerprint
    assert read_description(tmp_path / "a").metadata.activation == activation
    assert before.layer_samples is not None and after.layer_samples is not None
    for layer, kept in before.layer_samples.items():
        assert all(torch.equal(a, b) for a, b in zip(kept, after.layer_samples[layer], strict=True))
    names = {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    per_layer = {f"layer_{layer}/{file}" for layer in range(3) for file in ("cfg.json", "sae_weights.safetensors")}
    assert names == per_layer | {"tl_adapters.json", "layer_marks.safetensors"}


def test_the_folder_is_a_sae_lens_folder(tmp_path: Path) -> None:
    adapters = adapter_set()
    adapters.save_pretrained(tmp_path / "a")
    theirs = SAE.load_from_disk(tmp_path / "a" / "layer_1")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(theirs.encode(x), adapters[1].encode(x), atol=1e-6)
    assert theirs.cfg.metadata.hook_name == "blocks.1.mlp.hook_in"


def test_some_layers_only(tmp_path: Path) -> None:
    adapters = adapter_set()
    adapters.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "layer_2" / "sae_weights.safetensors").unlink()
    some = AdapterSet.from_pretrained(tmp_path / "a", layers=[1])
    assert some.layer_indices == [1] and some.n_layers == 3 and len(some) == 1
    assert torch.equal(some[1].W_enc, adapters[1].W_enc)
    with pytest.raises(KeyError, match="no adapter of layer 0"):
        some[0]
    with pytest.raises(AdapterFormatError, match=r"no adapters of layers \[3\]; it has those of \[0, 1, 2\]"):
        AdapterSet.from_pretrained(tmp_path / "a", layers=[1, 3])
    some.save_pretrained(tmp_path / "some")
    assert AdapterSet.from_pretrained(tmp_path / "some").layer_indices == [1]


def test_the_fingerprint_says_which_features_these_are(tmp_path: Path) -> None:
    adapters = adapter_set()
    assert adapters.normalized().fingerprint == adapters.fingerprint == adapter_set().fingerprint
    assert not torch.equal(adapters.normalized()[0].W_enc, adapters[0].W_enc)
    other = adapter_set()
    with torch.no_grad():
        other[1].W_dec[3] += 0.1
    assert other.fingerprint != adapters.fingerprint
    adapters.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    shutil.copytree(tmp_path / "b" / "layer_1", tmp_path / "a" / "layer_1", dirs_exist_ok=True)
    with pytest.raises(AdapterFormatError, match="files of two sets were mixed"):
        AdapterSet.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_what_decides_which_features_are_active_is_in_the_fingerprint(activation: str) -> None:
    adapters = adapter_set(activation=activation)
    normalized = adapters.normalized()
    assert normalized.fingerprint == adapters.fingerprint and normalized.metadata.activation == activation
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert adapters.layer_samples is not None
    scaled = x * adapters.layer_samples[1].ln2_w  # what the MLP reads, where x stands before the norm's weight
    assert torch.allclose(normalized[1].encode(x), adapters[1].encode(scaled), atol=1e-6)
    assert adapters[1].encode(scaled).any()
    for changed in (n for n in ("jumprelu", "topk", "batchtopk") if n != activation):
        if {activation, changed} != {"jumprelu", "batchtopk"}:  # these two are one function of the same tensors
            assert adapter_set(activation=changed).fingerprint != adapters.fingerprint
    if activation in ("jumprelu", "batchtopk"):
        with torch.no_grad():
            adapters[2].threshold[0] += 0.1
        assert adapters.fingerprint != adapter_set(activation=activation).fingerprint
    if activation == "topk":
        for adapter in adapters:
            adapter.k = 6
        again = AdapterSet(list(adapters), adapters.layer_samples, replace(adapters.metadata, k=6))
        assert again.fingerprint != adapter_set(activation="topk").fingerprint


def test_one_set_has_one_activation_and_its_metadata_says_which(tmp_path: Path) -> None:
    adapters = adapter_set(activation="topk")
    with pytest.raises(ValueError, match="one activation; got several"):
        AdapterSet([*adapters, *adapter_set()])
    with pytest.raises(ValueError, match=r"\('relu', None\) in the metadata and \('topk', 5\) in the adapters"):
        AdapterSet(list(adapters), metadata=AdapterMetadata())
    assert AdapterSet(list(adapters)).metadata == AdapterMetadata(activation="topk", k=5)
    adapters.save_pretrained(tmp_path / "a")
    record = json.loads((tmp_path / "a" / SET_METADATA_FILE).read_text())
    for change, message in (
        ({"activation": "gelu"}, "activation is 'gelu'; allowed is"),
        ({"k": 99}, "k is 99"),
        ({"activation": "jumprelu", "k": None}, "no tensor threshold"),
        ({"activation": "relu", "k": None}, "not those its tl_adapters.json was written with"),
    ):
        (tmp_path / "a" / SET_METADATA_FILE).write_text(json.dumps({**record, **change}))
        with pytest.raises(AdapterFormatError, match="was edited or is damaged"):
            AdapterSet.from_pretrained(tmp_path / "a")
        rehashed = {name: value for name, value in {**record, **change}.items() if name != "sha256"}
        rehashed["sha256"] = record_hash(rehashed)  # whoever writes such a set on purpose still gets no other features
        (tmp_path / "a" / SET_METADATA_FILE).write_text(json.dumps(rehashed))
        with pytest.raises(AdapterFormatError, match=message):
            AdapterSet.from_pretrained(tmp_path / "a")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapter_set()
    adapters.save_pretrained(tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already"):
        adapters.save_pretrained(tmp_path / "a")
    import tl_adapters.adapters.set_folder as module

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "write_transcoder", full)
    with pytest.raises(OSError, match="No space"):
        adapters.save_pretrained(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    adapter_set().save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="not a set of adapters"):
        AdapterSet.from_pretrained(tmp_path)
    layer = tmp_path / "a" / "layer_1" / "sae_weights.safetensors"
    whole = layer.read_bytes()
    layer.write_bytes(whole[:100])
    with pytest.raises(AdapterFormatError, match=r"sae_weights\.safetensors is missing or damaged"):
        AdapterSet.from_pretrained(tmp_path / "a")
    layer.unlink()
    with pytest.raises(AdapterFormatError, match=r"sae_weights\.safetensors is missing or damaged"):
        AdapterSet.from_pretrained(tmp_path / "a")
    layer.write_bytes(whole)
    record = json.loads((tmp_path / "a" / SET_METADATA_FILE).read_text())
    for change, message in (
        ({"n_features": 13}, "expected"),
        ({"schema_version": 9}, "schema_version 9"),
        ({"x": 1}, "x"),
    ):
        (tmp_path / "a" / SET_METADATA_FILE).write_text(json.dumps({**record, **change}))
        with pytest.raises(AdapterFormatError, match=message):
            AdapterSet.from_pretrained(tmp_path / "a")


def test_the_hook_names_are_sae_lens_names() -> None:
    from sae_lens import Transcoder, TranscoderConfig

    theirs = Transcoder(TranscoderConfig(d_in=8, d_sae=12, d_out=8, apply_b_dec_to_input=False))
    ours = adapter_set()[0]
    names = {name for name, _ in ours.named_modules() if name}
    assert names <= set(theirs.hook_dict)
    assert isinstance(theirs, SAE)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(theirs.encode(x), ours.encode(x), atol=1e-6)
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)
