"""Adapters: how they start, and how they are written and read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from tl_adapters.adapter import METADATA_FILE, AdapterMetadata, AdapterSet, TranscoderAdapter
from tl_adapters.marks import LayerMarks
from tl_adapters.saelens import AdapterFormatError


def adapter_set(n_layers: int = 3, d_model: int = 8, n_features: int = 12) -> AdapterSet:
    generator = torch.Generator().manual_seed(0)
    layers = [TranscoderAdapter(d_model, n_features, generator=generator) for _ in range(n_layers)]
    with torch.no_grad():
        for adapter in layers:
            for weight in adapter.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator))
    kept = [LayerMarks(*torch.randn(3, d_model, generator=generator)) for _ in range(n_layers)]
    return AdapterSet(layers, kept, AdapterMetadata(base="b", target="t", figures={"kl": 0.5}))


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


def test_round_trip(tmp_path: Path) -> None:
    before = adapter_set()
    before.save_pretrained(tmp_path / "a")
    after = AdapterSet.from_pretrained(tmp_path / "a")
    assert after.metadata == before.metadata
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    assert before.marks is not None and after.marks is not None
    for layer, kept in before.marks.items():
        assert all(torch.equal(a, b) for a, b in zip(kept, after.marks[layer], strict=True))
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


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapter_set()
    adapters.save_pretrained(tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already"):
        adapters.save_pretrained(tmp_path / "a")
    import tl_adapters.adapter as module

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
    record = json.loads((tmp_path / "a" / METADATA_FILE).read_text())
    for change, message in (
        ({"n_features": 13}, "expected"),
        ({"schema_version": 9}, "schema_version 9"),
        ({"x": 1}, "x"),
    ):
        (tmp_path / "a" / METADATA_FILE).write_text(json.dumps({**record, **change}))
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
