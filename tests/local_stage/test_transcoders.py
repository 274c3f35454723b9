"""Transcoders of a model's own MLPs: what they are trained on, and that SAELens has the same ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS, random_model
from helpers.users_models import bridge, plain, process, with_saes
from sae_lens import SAE, Transcoder
from sae_lens.saes.transcoder import JumpReLUTranscoder
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.data.traces import DataError, Trace, collate
from tl_adapters.interop.saelens import from_saelens, to_saelens
from tl_adapters.local_stage.regression_data import HookMissingError, MLPOutputs
from tl_adapters.local_stage.transcoders import measure_transcoders, train_transcoders
from tl_adapters.models.paired_model import PairedModel

SHORT = LocalConfig(steps=120, tokens_per_step=256, max_tokens=4000, penalty="l1", sparsity_weight=0.02)


def documents(seed: int, n: int = 60, vocab: int = 61) -> list[Trace]:
    generator = torch.Generator().manual_seed(seed)
    return [Trace(tuple(torch.randint(1, vocab, (20,), generator=generator).tolist()), 3) for _ in range(n)]


def trained(model: Any, activation: str = "relu", n_features: int = 128) -> AdapterSet:
    options: dict[str, Any] = {**ACTIVATION_OPTIONS[activation], "n_features": n_features}
    return train_transcoders(model, documents(1), TrainingConfig(**options), SHORT, progress=False)


@pytest.fixture(scope="module")
def two_layers() -> HookedTransformer:
    return plain(dtype=torch.float32, num_hidden_layers=2)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])  # SAELens has no topk transcoder
@torch.no_grad()
def test_trained_transcoders_are_stock_transcoders_of_saelens(
    two_layers: HookedTransformer, activation: str, tmp_path: Path
) -> None:
    with torch.enable_grad():
        ours = trained(two_layers, activation)
    _, cache = two_layers.run_with_cache(torch.tensor([documents(2)[0].tokens]))
    to_saelens(ours, tmp_path / "s")
    for layer in range(2):
        theirs = SAE.load_from_disk(tmp_path / "s" / f"layer_{layer}")
        assert type(theirs) is (Transcoder if activation == "relu" else JumpReLUTranscoder)
        assert theirs.cfg.metadata.hook_name == f"blocks.{layer}.ln2.hook_normalized"
        assert theirs.cfg.metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out"
        x = cache[theirs.cfg.metadata.hook_name]
        assert (ours[layer].encode(x) > 0).any()
        torch.testing.assert_close(theirs.encode(x), ours[layer].encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(x), ours[layer](x), atol=1e-5, rtol=1e-5)
    assert from_saelens(tmp_path / "s").metadata.writes == "mlp_out"


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_most_of_the_output_is_explained_on_other_documents(two_layers: HookedTransformer, activation: str) -> None:
    transcoders = trained(two_layers, activation)
    untrained = train_transcoders(
        two_layers, documents(1), TrainingConfig(n_features=4), LocalConfig(steps=1, max_tokens=500), progress=False
    )
    fits = measure_transcoders(two_layers, transcoders, documents(3))
    for fit, start in zip(fits, measure_transcoders(two_layers, untrained, documents(3)), strict=True):
        assert fit.tokens == 60 * 19
        assert fit.fvu < 0.75 * start.fvu
        assert 0 < fit.l0 < 128
        assert 0 < fit.alive <= 128
    if "topk" in activation:
        assert fits[0].l0 == pytest.approx(5, abs=0 if activation == "topk" else 1.5)


@torch.no_grad()
def test_fvu_and_l0_are_those_of_all_tokens_at_once(two_layers: HookedTransformer) -> None:
    with torch.enable_grad():
        transcoders = trained(two_layers, n_features=24)
    held_out = documents(3, n=7)
    _, cache = two_layers.run_with_cache(torch.tensor([trace.tokens for trace in held_out]))
    fits = measure_transcoders(two_layers, transcoders, held_out, tokens_per_batch=50)
    for layer, fit in enumerate(fits):
        x, output = (
            cache[f"blocks.{layer}.{name}"][:, 1:].flatten(0, 1) for name in ("ln2.hook_normalized", "hook_mlp_out")
        )
        acts = transcoders[layer].encode(x)
        error = (transcoders[layer](x) - output).square().sum() / (output - output.mean(0)).square().sum()
        assert fit.fvu == pytest.approx(float(error), rel=1e-4)
        assert fit.l0 == pytest.approx(float((acts > 0).sum(1).float().mean()))
        assert fit.alive == int((acts > 0).any(0).sum())


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize("how", ["stock", "saelens", "folded", "bridge"])
@torch.no_grad()
def test_every_kind_of_model_gives_the_hook_points_that_saelens_reads(architecture: str, how: str) -> None:
    options: dict[str, Any] = {"dtype": torch.float32}
    model = {"bridge": bridge, "saelens": with_saes}.get(how, plain)(architecture, **options)
    if how == "folded":
        process(model, "fold_ln")
    batch = collate([Trace((5, 3, 9, 1), 1), Trace((4, 7), 1)])
    read = list(MLPOutputs(model).read(batch))
    _, cache = plain(architecture, **options).run_with_cache(batch.tokens)
    rows = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 3, 1])  # neither padding nor the first of a document
    assert len(read) == 4
    for layer, (x, output) in enumerate(read):
        torch.testing.assert_close(x, cache[f"blocks.{layer}.ln2.hook_normalized"][rows], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output, cache[f"blocks.{layer}.hook_mlp_out"][rows], atol=1e-4, rtol=1e-4)


def test_the_route_of_a_pair_decides_whose_mlps_are_explained() -> None:
    pair = PairedModel.from_pretrained(*(random_model(seed, torch.float32) for seed in (1, 2)))
    batch = collate(documents(4, n=1))
    with pair.routed("hybrid"):
        (x, output), *_ = MLPOutputs(pair.model).read(batch)
    _, base = pair.mlps[0].weights()
    norm = pair.backend.second_norm(0)
    assert norm is not None
    torch.testing.assert_close(base.output(x * norm), output, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_explained_is_refused(two_layers: HookedTransformer) -> None:
    transcoders = trained(two_layers, n_features=4)
    with pytest.raises(DataError, match="first token"):
        measure_transcoders(two_layers, transcoders, [Trace((3,), 0)])
    without_mlps = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=8, n_ctx=8, d_head=4, act_fn="relu", d_vocab=61, attn_only=True, init_weights=False
        )
    )
    with pytest.raises(HookMissingError, match="ln2.hook_normalized"):
        train_transcoders(without_mlps, documents(1), progress=False)
    with pytest.raises(PairMismatchError, match="2 layers of width 32"):
        measure_transcoders(plain(dtype=torch.float32), transcoders, documents(3))
