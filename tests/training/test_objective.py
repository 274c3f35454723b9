"""The fast objective equals the reference objective, and its terms sum to the loss that is optimized."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS, random_batch, random_model, randomise

from tl_adapters.adapters import active_features, transcoder
from tl_adapters.adapters.active_features import run_over_active
from tl_adapters.adapters.transcoder import row_norms
from tl_adapters.config import LossWeights
from tl_adapters.data.traces import Batch
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training import kl_divergence
from tl_adapters.training.kl_divergence import TargetDistributions, kl_from_residual, masked_kl
from tl_adapters.training.loss_terms import l0_term, l1_term, nmse_term
from tl_adapters.training.objective import StepTerms, held_out_terms, reference_step, shared_prefix_step

WEIGHTS = LossWeights(
    output_kl=0.7, forward_bridge=1.3, backward_bridge=1.9, nmse=0.4, local=0.6, local_l1=0.3, lowest_cut=0
)


def gradients(pair: PairedModel) -> dict[str, torch.Tensor]:
    assert pair.adapters is not None
    found = {name: p.grad.clone() for name, p in pair.adapters.named_parameters()}
    pair.adapters.zero_grad()
    return found


TERMS = ("output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity", "local", "total")
OTHERS = [name for name in ACTIVATION_OPTIONS if name != "relu"]


def make(activation: str) -> PairedModel:
    models = (random_model(seed) for seed in (1, 2))
    return randomise(PairedModel.from_pretrained(*models), activation=activation)


@pytest.mark.parametrize("cut", range(5))
def test_shared_prefixes_change_neither_value_nor_gradient(pair: PairedModel, batch: Batch, cut: int) -> None:
    both_steps_agree(pair, batch, cut)


@pytest.mark.parametrize("cut", range(5))
@pytest.mark.parametrize("activation", OTHERS)
def test_shared_prefixes_change_nothing_with_any_other_activation(activation: str, batch: Batch, cut: int) -> None:
    both_steps_agree(make(activation), batch, cut)


@pytest.mark.parametrize("cut", range(5))
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_a_pass_over_active_features_changes_nothing(
    activation: str, batch: Batch, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_features, "LARGEST_DENSITY", 1.0)
    passes: list[torch.Size] = []

    def counted(x: torch.Tensor, *args: Any) -> Any:
        passes.append(x.shape)
        return run_over_active(x, *args)

    monkeypatch.setattr(transcoder, "run_over_active", counted)
    pair = make(activation)
    for adapter in pair.installed_adapters():
        adapter.lay_out_by_feature()
    both_steps_agree(pair, batch, cut)
    routed = 4 + (4 - cut if 0 < cut < 4 else 0)  # the replacement and the backward bridge
    assert len(passes) == 3 * routed + 2 * 4  # recomputed passes run twice; the local term of a layer once a step


def both_steps_agree(pair: PairedModel, batch: Batch, cut: int) -> None:
    slow = reference_step(pair, batch, cut, WEIGHTS, 0.05)
    slow_gradients = gradients(pair)
    for recompute in (False, True):
        fast = shared_prefix_step(pair, batch, cut, WEIGHTS, 0.05, want_l0=True, recompute=recompute)
        fast_gradients = gradients(pair)
        for name in TERMS:
            assert abs(getattr(slow, name) - getattr(fast, name)) < 1e-10, name
        assert fast.l0 is not None and len(fast.l0) == pair.n_layers
        assert (slow.smallest_active is None) is (fast.smallest_active is None)
        for ours, theirs in zip(slow.smallest_active or [], fast.smallest_active or [], strict=True):
            assert abs(ours - theirs) < 1e-10 and ours > 0
        for name, gradient in slow_gradients.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_recomputing_keeps_only_the_residual_stream_between_blocks(batch: Batch) -> None:
    """Most of what a step's largest graph keeps grows with the blocks; recomputed, a block keeps its input alone."""
    kept = []
    for recompute in (False, True):
        pair = make("relu")
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if tensor.shape[:2] == batch.tokens.shape:  # an activation
                sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            shared_prefix_step(pair, batch, 0, WEIGHTS, 0.05, recompute=recompute)
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_the_total_is_the_weighted_sum_of_the_terms(activation: str, batch: Batch) -> None:
    t: StepTerms = shared_prefix_step(make(activation), batch, 2, WEIGHTS, 0.05)
    assert bool(t.sparsity > 0) is (activation in ("relu", "jumprelu"))
    expected = 0.7 * t.output_kl + 1.3 * t.forward_bridge + 1.9 * t.backward_bridge + 0.4 * t.nmse + 0.05 * t.sparsity
    assert t.local is not None and t.local > 0
    assert abs(t.total - expected - 0.6 * t.local) < 1e-12


def test_the_local_term_is_the_error_of_the_difference_at_the_targets_own_inputs(
    pair: PairedModel, batch: Batch
) -> None:
    """Computed token by token, from the inputs that the target's MLPs record."""
    terms = shared_prefix_step(pair, batch, 2, LossWeights(local=0.5, local_l1=0.25), 0.0)
    with torch.no_grad(), pair.routed("target"), pair.recorded("mlp.hook_in") as inputs:
        pair.residual_streams(batch.tokens)
    expected = 0.0
    for layer, mlp in enumerate(pair.mlps):
        adapter, x = pair.installed_adapters()[layer], inputs[layer][batch.counted]
        d, acts = mlp.difference(x), adapter.encode(mlp.adapter_input(x)).detach()
        energy = float(d.square().sum(1).mean())
        missed = float((adapter.decode(acts) - d).detach().square().sum(1).mean())
        l1 = float((acts * row_norms(adapter.W_dec)).detach().sum(1).mean())
        expected += missed / energy + 0.25 * l1 / energy**0.5
    assert terms.local is not None
    assert abs(float(terms.local) - expected) < 1e-6 * expected
    without = shared_prefix_step(pair, batch, 2, LossWeights(), 0.0)
    assert without.local is None and "local" not in without.by_name()
    assert abs(terms.total - without.total - 0.5 * terms.local) < 1e-10


@pytest.mark.parametrize("step", [reference_step, shared_prefix_step])
def test_the_local_term_of_a_layer_whose_mlps_are_equal_is_0(batch: Batch, step: Callable[..., StepTerms]) -> None:
    base, target = random_model(1), random_model(2)
    target.model.layers[1].mlp.load_state_dict(base.model.layers[1].mlp.state_dict())
    with torch.no_grad():
        target.model.layers[1].post_attention_layernorm.weight.copy_(
            base.model.layers[1].post_attention_layernorm.weight
        )
    pair = randomise(PairedModel.from_pretrained(base, target))
    step(pair, batch, 2, LossWeights(0, 0, 0, 0, local=1.0), 0.0)
    for layer, adapter in enumerate(pair.installed_adapters()):
        assert bool(adapter.W_dec.grad.isfinite().all())
        assert bool(adapter.W_dec.grad.any()) is (layer != 1)


def test_the_bridges_of_the_lowest_and_highest_cut_are_pure_models(pair: PairedModel, batch: Batch) -> None:
    for step in (reference_step, shared_prefix_step):
        lowest, highest = step(pair, batch, 0, WEIGHTS, 0.0), step(pair, batch, 4, WEIGHTS, 0.0)
        assert abs(lowest.forward_bridge) < 1e-12 and abs(highest.backward_bridge) < 1e-12
        assert abs(lowest.backward_bridge - lowest.output_kl) < 1e-12
        assert abs(highest.forward_bridge - highest.output_kl) < 1e-12
        assert lowest.output_kl > 0.01


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
@pytest.mark.parametrize("step", [reference_step, shared_prefix_step])
def test_padding_changes_neither_term_nor_gradient(activation: str, step: Callable[..., StepTerms]) -> None:
    pair = make(activation)
    one = random_batch(4, lengths=(8,))
    padded = Batch(*(torch.nn.functional.pad(t, (0, 5)) for t in (one.tokens, one.region)))
    a, of_one = step(pair, one, 2, WEIGHTS, 0.05), gradients(pair)
    b, of_padded = step(pair, padded, 2, WEIGHTS, 0.05), gradients(pair)
    for name in TERMS:
        assert abs(getattr(a, name) - getattr(b, name)) < 1e-10, name
    for name, gradient in of_one.items():
        torch.testing.assert_close(of_padded[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_steps_use_training_mode_and_held_out_documents_evaluation_mode(activation: str, batch: Batch) -> None:
    pair = make(activation)
    before = {name: value.clone() for name, value in pair.installed_adapters().state_dict().items()}
    terms = shared_prefix_step(pair, batch, 2, WEIGHTS, 0.05, want_l0=True)
    held_out = held_out_terms(pair, [batch])
    assert terms.l0 is not None
    if activation == "batchtopk":
        assert terms.l0 == pytest.approx([5.0] * 4)  # k per real token of the batch
        assert all(abs(count - 5) > 0.1 for count in held_out["l0"])  # by these thresholds: any number
    else:
        assert terms.l0 == pytest.approx(held_out["l0"])
        assert terms.l0 == [5.0] * 4 if activation == "topk" else max(terms.l0) > 1
        assert terms.output_kl == pytest.approx(held_out["output_kl"], abs=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in pair.installed_adapters().state_dict().items())
    assert all(adapter.training_tokens is None for adapter in pair.installed_adapters())


def test_batchtopk_counts_real_tokens_whatever_the_objective_counts(batch: Batch) -> None:
    pair = make("batchtopk")
    answers = Batch(batch.tokens, batch.region, ("answer",))
    everything, some = (shared_prefix_step(pair, b, 2, WEIGHTS, 0.0) for b in (batch, answers))
    assert [float(v) for v in everything.smallest_active or []] == [float(v) for v in some.smallest_active or []]
    assert abs(everything.output_kl - some.output_kl) > 1e-3


def test_the_l0_term_is_jumprelus_l0_and_moves_only_thresholds(batch: Batch) -> None:
    pair = make("jumprelu")
    terms = shared_prefix_step(pair, batch, 2, LossWeights(0, 0, 0, 0), 1.0, want_l0=True)
    assert terms.l0 is not None
    assert float(terms.sparsity) == pytest.approx(sum(terms.l0), abs=1e-5)  # one is summed in float32
    for name, gradient in gradients(pair).items():
        assert bool(gradient.any()) is name.endswith("threshold"), name
        assert (gradient <= 0).all()  # a higher threshold, fewer features


def test_the_terms_equal_plain_python() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counted = [(0, 0), (0, 1), (1, 0)]
    p, q = draw(2, 3, 5), draw(2, 3, 5)
    kls = [sum(a * (a / b).log() for a, b in zip(p[i].softmax(0), q[i].softmax(0), strict=True)) for i in counted]
    assert abs(masked_kl(p, q, mask) - sum(kls) / 3) < 1e-12
    error = sum(((p[i] - q[i]) ** 2).sum() for i in counted) / sum((p[i] ** 2).sum() for i in counted)
    assert abs(nmse_term(p, q, mask) - error) < 1e-12
    acts, decoder = draw(2, 3, 4).relu(), draw(4, 6)
    l1 = sum(acts[i][f] * decoder[f].norm() for i in counted for f in range(4)) / 3
    assert abs(l1_term(acts, row_norms(decoder), mask) - l1) < 1e-12
    active = (acts > 0).double()
    l0 = sum(float(acts[i][f] > 0) for i in counted for f in range(4)) / 3
    assert abs(l0_term(active, mask) - l0) < 1e-12


@pytest.mark.parametrize(("kept", "several", "n"), [(1000, True, 1), (10, True, 3), (1000, False, 3)])
def test_a_targets_distributions_are_computed_once_where_they_may_be_kept(
    kept: int, several: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl_divergence, "LOGPROBS_KEPT", kept)
    generator = torch.Generator().manual_seed(0)
    target, *streams = (torch.randn(2, 6, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    W_U = torch.randn(8, 13, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, generator=generator) > 0.3
    of_target: list[int] = []

    def unembed(rows: torch.Tensor) -> torch.Tensor:
        if not rows.requires_grad:
            of_target.append(len(rows))
        return rows @ W_U

    distributions = TargetDistributions(target, mask, unembed, 4, several)
    for stream in streams:
        stream.requires_grad_()
        found, whole = distributions.kl(stream), masked_kl(target @ W_U, stream @ W_U, mask)
        assert abs(found - whole) < 1e-12
        gradients = (torch.autograd.grad(value, stream)[0] for value in (found, whole))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert sum(of_target) == n * int(mask.sum())


@pytest.mark.parametrize(("rows_at_once", "logprobs_at_once"), [(1, 100), (4, 30), (100, 40), (100, 1), (100, 1000)])
def test_kl_in_chunks_equals_the_kl(rows_at_once: int, logprobs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_divergence, "LOGPROBS_AT_ONCE_CPU", logprobs_at_once)
    generator = torch.Generator().manual_seed(0)
    target, resid = (torch.randn(2, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    W_U = torch.randn(8, 13, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, generator=generator) > 0.3
    resid.requires_grad_()
    whole = masked_kl(target @ W_U, resid @ W_U, mask)
    (expected,) = torch.autograd.grad(3 * whole, resid)
    chunked = kl_from_residual(target, resid, mask, lambda x: x @ W_U, rows_at_once)
    (found,) = torch.autograd.grad(3 * chunked, resid)
    assert abs(whole - chunked) < 1e-12
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_adapters_learn(pair: PairedModel, batch: Batch) -> None:
    shared_prefix_step(pair, batch, 2, WEIGHTS, 0.05)
    learning = {name for name, p in pair.model.named_parameters() if p.grad is not None}
    assert learning == {f"blocks.{i}.mlp.adapter.{w}" for i in range(4) for w in ("W_enc", "b_enc", "W_dec", "b_dec")}


def test_an_untrained_adapter_has_the_hybrids_loss() -> None:
    pair = PairedModel.from_pretrained(random_model(1), random_model(2))
    pair.new_adapters(16, dtype=torch.float64)
    batch = collate_one()
    with pair.routed("hybrid"):
        hybrid = pair.model(batch.tokens)
    target = pair.model(batch.tokens)
    terms = shared_prefix_step(pair, batch, 4, LossWeights(), 0.1)
    assert abs(terms.output_kl - masked_kl(target, hybrid, batch.predicting)) < 1e-10
    assert terms.sparsity == 0


def collate_one() -> Batch:
    return random_batch(9, lengths=(10,))
