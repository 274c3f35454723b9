"""SAELens: an unmodified SAELens loads what we write, and we read what it writes, or say why not."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_model, randomise
from helpers.users_models import PROCESSING, TOKENS, bridge, log_probabilities, plain, process, reference, with_saes
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE, Transcoder
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.transcoder import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    TranscoderConfig,
)
from transformer_lens import HookedTransformer

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.interop.saelens import from_saelens, to_saelens
from tl_adapters.models.attach import attach, detach
from tl_adapters.models.paired_model import PairedModel


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def single(architecture: str = "Qwen2ForCausalLM") -> PairedModel:
    """A float32 pair with float32 adapters, as people have them."""
    return reference(architecture, dtype=torch.float32)


def exported(pair: PairedModel, folder: Path, **options: Any) -> list[SAE[Any]]:
    to_saelens(pair.installed_adapters(), folder, **options)
    return [SAE.load_from_disk(folder / f"layer_{layer}") for layer in range(4)]


@pytest.mark.parametrize("how", PROCESSING)
@torch.no_grad()
def test_activations_are_ours_whatever_was_processed(architecture: str, how: str, tmp_path: Path) -> None:
    pair = single(architecture)
    transcoders = exported(pair, tmp_path / "s")
    model = with_saes(architecture, dtype=torch.float32)
    process(model, how)
    attach(model, copy.deepcopy(pair.installed_adapters()), base=random_model(1, torch.float32, architecture))
    _, cache = model.run_with_cache(TOKENS)
    with pair.routed("replacement"):
        _, ours = pair.model.run_with_cache(TOKENS)
    for layer, transcoder in enumerate(transcoders):
        assert type(transcoder) is Transcoder
        acts = transcoder.encode(cache[transcoder.cfg.metadata.hook_name])
        assert (acts > 0).any()
        assert (acts - ours[f"blocks.{layer}.mlp.adapter.hook_sae_acts_post"]).abs().max() < 1e-5


@pytest.mark.parametrize("how", PROCESSING)
@torch.no_grad()
def test_stock_add_sae_at_hook_adapter_out_is_our_replacement(architecture: str, how: str, tmp_path: Path) -> None:
    pair = single(architecture)
    transcoders = exported(pair, tmp_path / "s")
    model = with_saes(architecture, dtype=torch.float32)
    process(model, how)
    untouched = log_probabilities(model)
    theirs = attach(model, copy.deepcopy(pair.installed_adapters()), base=random_model(1, torch.float32, architecture))
    theirs.route_layers("hybrid")
    hybrid = log_probabilities(model)
    for transcoder in transcoders:
        model.add_sae(transcoder)
    with pair.routed("replacement"):
        assert (log_probabilities(model) - log_probabilities(pair.model)).abs().max() < 2e-5
    assert (log_probabilities(model) - hybrid).abs().max() > 1e-2
    _, cache = model.run_with_cache(TOKENS)
    assert "blocks.2.mlp.hook_adapter_out.hook_sae_acts_post" in cache
    model.reset_saes()
    assert torch.equal(log_probabilities(model), hybrid)
    detach(theirs)
    assert torch.equal(log_probabilities(model), untouched)


@torch.no_grad()
def test_sae_lens_on_a_bridge_too(tmp_path: Path) -> None:
    pair = single()
    transcoders = exported(pair, tmp_path / "s")
    model = bridge(dtype=torch.float32)
    model.__class__ = SAETransformerBridge  # as its boot_transformers does
    model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    untouched = log_probabilities(model)
    theirs = attach(model, copy.deepcopy(pair.installed_adapters()), base=random_model(1, torch.float32))
    theirs.route_layers("hybrid")
    hybrid = log_probabilities(model)
    for transcoder in transcoders:
        model.add_sae(transcoder)
    with pair.routed("replacement"):
        assert (log_probabilities(model) - log_probabilities(pair.model)).abs().max() < 2e-5
    model.reset_saes()
    assert (log_probabilities(model) - hybrid).abs().max() < 1e-5
    theirs.route_layers("replacement")
    with pair.routed("replacement"):
        assert (log_probabilities(model) - log_probabilities(pair.model)).abs().max() < 2e-5
    detach(theirs)
    assert (log_probabilities(model) - untouched).abs().max() < 1e-5


@torch.no_grad()
def test_on_a_stock_model_a_stock_attachment_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transcoders = exported(single(), tmp_path / "s")
    model = with_saes(dtype=torch.float32)
    before = log_probabilities(model)
    with caplog.at_level(logging.WARNING):
        for transcoder in transcoders:
            model.add_sae(transcoder)
    assert "No hook found" in caplog.text
    assert torch.equal(log_probabilities(model), before)
    assert "changes nothing" in transcoders[0].cfg.metadata.tl_adapters["note"]


def test_the_metadata_says_what_it_is(tmp_path: Path) -> None:
    pair = single()
    adapters = pair.installed_adapters()
    for name, value in (("base", "org/base"), ("target", "org/target"), ("figures", {"l0": 2.5})):
        object.__setattr__(adapters.metadata, name, value)
    for reads, hook in (("normalized", "blocks.1.ln2.hook_normalized"), ("mlp_input", "blocks.1.mlp.hook_in")):
        transcoder = exported(pair, tmp_path / reads, reads=reads)[1]
        about = transcoder.cfg.metadata
        assert (about.hook_name, about.hook_name_out) == (hook, "blocks.1.mlp.hook_adapter_out")
        assert about.model_name == "org/target" and not transcoder.cfg.apply_b_dec_to_input
        ours = about.tl_adapters
        assert (ours["base"], ours["target"], ours["additive"]) == ("org/base", "org/target", True)
        assert ours["stream"] == "replacement" and ours["figures"] == {"l0": 2.5} and ours["reads"] == reads
        known = {"base_mlps", "base_dtype", "target", "target_embedding_and_norms", "dtype", "adapters"}
        assert set(ours["fingerprints"]) == known
        assert ours["fingerprints"]["adapters"] == adapters.fingerprint  # the same in both forms


def test_sae_lens_loads_it_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens.loading.pretrained_sae_loaders as loaders

    pair = single()
    exported(pair, tmp_path / "s")

    def fake(repo_id: str, filename: str, **options: object) -> str:
        if not (tmp_path / "s" / filename).is_file():
            raise EntryNotFoundError("not there")
        return str(tmp_path / "s" / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", fake)
    transcoder = SAE.from_pretrained("user/repo", "layer_3")
    assert type(transcoder) is Transcoder
    assert transcoder.cfg.metadata.tl_adapters["layer"] == 3
    expected = pair.installed_adapters().normalized()[3]
    assert torch.equal(transcoder.W_enc, expected.W_enc) and torch.equal(transcoder.W_dec, expected.W_dec)


@pytest.mark.parametrize("reads", ["normalized", "mlp_input"])
@torch.no_grad()
def test_round_trip(architecture: str, reads: str, tmp_path: Path) -> None:
    pair = reference(architecture)
    to_saelens(pair.installed_adapters(), tmp_path / "s", reads=reads)
    back = from_saelens(tmp_path / "s")
    assert back.metadata.reads == reads and back.fingerprint == pair.installed_adapters().fingerprint
    with pair.routed("replacement"):
        before = log_probabilities(pair.model)
    for model in (plain(architecture), bridge(architecture)):
        attach(model, copy.deepcopy(back), base=random_model(1, architecture=architecture))
        tolerance = 1e-6 if isinstance(model, HookedTransformer) else 1e-5  # HF norms compute in float32
        assert (log_probabilities(model) - before).abs().max() < tolerance
    to_saelens(back, tmp_path / "again", reads=reads)  # what was read is written as it was
    for layer in range(4):
        file = f"layer_{layer}/sae_weights.safetensors"
        assert (tmp_path / "s" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    if reads == "normalized":
        with pytest.raises(ValueError, match="not unfolded"):
            to_saelens(back, tmp_path / "b", reads="mlp_input")


@torch.no_grad()
def test_a_single_layer_folder_and_what_sae_lens_itself_saves(tmp_path: Path) -> None:
    pair = single()
    transcoders = exported(pair, tmp_path / "s")
    transcoders[2].save_model(tmp_path / "resaved")  # by SAELens
    for folder in (tmp_path / "s" / "layer_2", tmp_path / "resaved"):
        one = from_saelens(folder)
        assert one.layer_indices == [2] and one.n_layers == 4 and one.metadata.writes == "adapter_out"
        assert one.metadata.target == pair.target_id and one.metadata.reads == "normalized"
        model = plain(dtype=torch.float32)
        attach(model, one, base=random_model(1, torch.float32))
        with pair.routed(only=[2]):
            assert (log_probabilities(model) - log_probabilities(pair.model)).abs().max() < 1e-5
    two = from_saelens(tmp_path / "s", ["layer_3", "layer_1"])
    assert two.layer_indices == [1, 3]


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
@torch.no_grad()
def test_thresholds_are_sae_lens_s_jumprelu(activation: str, tmp_path: Path) -> None:
    models = (random_model(seed, torch.float32) for seed in (1, 2))
    pair = randomise(PairedModel.from_pretrained(*models), activation=activation)
    transcoders = exported(pair, tmp_path / "s")
    with pair.routed("replacement"):
        _, ours = pair.model.run_with_cache(TOKENS)
    for layer, transcoder in enumerate(transcoders):
        assert type(transcoder) is JumpReLUTranscoder
        acts = transcoder.encode(ours[transcoder.cfg.metadata.hook_name])
        expected = ours[f"blocks.{layer}.mlp.adapter.hook_sae_acts_post"]
        assert (acts - expected).abs().max() < 1e-5 and (acts > 0).any()
        pre = ours[f"blocks.{layer}.mlp.adapter.hook_sae_acts_pre"]
        assert ((pre > 0) & (acts == 0)).any()  # thresholds decide
    back = from_saelens(tmp_path / "s")
    assert back.metadata.activation == activation and back.fingerprint == pair.installed_adapters().fingerprint
    one = from_saelens(tmp_path / "s", ["layer_2"])
    assert (one.metadata.activation, one.metadata.k) == (activation, pair.installed_adapters().metadata.k)
    model = plain(dtype=torch.float32)
    attach(model, one, base=random_model(1, torch.float32))
    with pair.routed(only=[2]):
        assert (log_probabilities(model) - log_probabilities(pair.model)).abs().max() < 1e-5


def test_topk_is_ours_alone(tmp_path: Path) -> None:
    models = (random_model(seed, torch.float32) for seed in (1, 2))
    adapters = randomise(PairedModel.from_pretrained(*models), activation="topk").installed_adapters()
    with pytest.raises(AdapterFormatError, match="SAELens has no transcoder that keeps the k largest.*batchtopk"):
        to_saelens(adapters, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    adapters.save_pretrained(tmp_path / "ours")
    with pytest.raises(KeyError, match="topk_transcoder"):
        SAE.load_from_disk(tmp_path / "ours" / "layer_0")  # nor does SAELens take it for another
    assert from_saelens(tmp_path / "ours").fingerprint == adapters.fingerprint  # our own whole set
    with pytest.raises(AdapterFormatError, match="architecture is 'topk_transcoder'"):
        from_saelens(tmp_path / "ours", ["layer_0"])


@torch.no_grad()
def test_jumprelu_transcoders_of_others_are_read(tmp_path: Path) -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    theirs = foreign_transcoder(JumpReLUTranscoder, JumpReLUTranscoderConfig)
    theirs.threshold.copy_(torch.randn(24, generator=torch.Generator().manual_seed(1)) * 0.3)  # some below 0
    theirs.save_model(tmp_path / "f")
    read = from_saelens(tmp_path / "f")
    assert (read.metadata.activation, read.metadata.writes) == ("jumprelu", "mlp_out")
    assert (read[1].encode(x) - SAE.load_from_disk(tmp_path / "f").encode(x)).abs().max() < 1e-5
    to_saelens(read, tmp_path / "again", reads="normalized")
    assert torch.equal(SAE.load_from_disk(tmp_path / "again" / "layer_1").threshold, theirs.threshold)


def foreign_transcoder(cls: Any = Transcoder, config_cls: Any = TranscoderConfig) -> Any:
    config = config_cls(d_in=32, d_sae=24, d_out=32, apply_b_dec_to_input=False)
    config.metadata.hook_name, config.metadata.hook_name_out = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    config.metadata.model_name = "org/other"
    return cls(config)


def foreign(folder: Path, **changes: Any) -> Path:
    """A transcoder of an MLP, written by SAELens."""
    foreign_transcoder().save_model(folder)
    if changes:
        record = json.loads((folder / "cfg.json").read_text())
        metadata = {**record["metadata"], **changes.pop("metadata", {})}
        (folder / "cfg.json").write_text(json.dumps({**record, **changes, "metadata": metadata}))
    return folder


@torch.no_grad()
def test_transcoders_of_others_are_read_as_what_they_are(tmp_path: Path) -> None:
    read = from_saelens(foreign(tmp_path / "f"))
    theirs = SAE.load_from_disk(tmp_path / "f")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(read[1](x), theirs(x), atol=1e-6)
    assert read.metadata.writes == "mlp_out" and read.metadata.target == "org/other"
    with pytest.raises(PairMismatchError, match="replace the MLP.*HookedSAETransformer"):
        attach(plain(), read, on="own_mlp")
    read.save_pretrained(tmp_path / "again")
    assert AdapterSet.from_pretrained(tmp_path / "again").metadata.writes == "mlp_out"
    assert SAE.load_from_disk(tmp_path / "again" / "layer_1").cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"


def test_what_would_be_misread_is_refused(tmp_path: Path) -> None:
    skip = SkipTranscoder(SkipTranscoderConfig(d_in=32, d_sae=24, d_out=32, apply_b_dec_to_input=False))
    skip.save_model(tmp_path / "skip")
    supported = "supported is 'transcoder' or 'jumprelu_transcoder'"
    with pytest.raises(AdapterFormatError, match=f"architecture is 'skip_transcoder'; {supported}"):
        from_saelens(tmp_path / "skip")
    assert JumpReLUTranscoderConfig.architecture() == "jumprelu_transcoder"
    for i, (changes, message) in enumerate(
        (
            ({"architecture": "jumprelu_transcoder"}, "no tensor threshold"),
            ({"metadata": {"tl_adapters": {"activation": "jumprelu"}}}, "says 'jumprelu', its architecture transcoder"),
            ({"metadata": {"tl_adapters": {"activation": "gelu"}}}, "says 'gelu', its architecture transcoder"),
            ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input is True"),
            ({"metadata": {"hook_name": "blocks.1.hook_mlp_in"}}, "it reads blocks.1.hook_mlp_in; supported are"),
            ({"metadata": {"hook_name": "blocks.1.hook_resid_mid"}}, "it reads blocks.1.hook_resid_mid"),
            ({"metadata": {"hook_name_out": "blocks.2.hook_mlp_out"}}, "it writes blocks.2.hook_mlp_out"),
            ({"metadata": {"hook_head_index": 3}}, "hook_head_index is 3"),
        )
    ):
        with pytest.raises(AdapterFormatError, match=message):
            from_saelens(foreign(tmp_path / str(i), **changes))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFormatError, match="not a SAELens transcoder"):
        from_saelens(tmp_path / "empty")
    foreign(tmp_path / "set" / "a")
    elsewhere = {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}
    foreign(tmp_path / "set" / "b", metadata=elsewhere)
    with pytest.raises(AdapterFormatError, match="do not belong to one set"):
        from_saelens(tmp_path / "set")
