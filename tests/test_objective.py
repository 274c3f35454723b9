"""The fast objective equals the objective as the formulas read, and its terms are what is optimised."""

import pytest
import torch
from conftest import random_batch, random_model

from tl_adapters.config import LossWeights
from tl_adapters.data import Batch
from tl_adapters.losses import kl_from_residual, masked_kl, sparsity, squared_error_ratio
from tl_adapters.objective import StepTerms, reference_step, shared_prefix_step
from tl_adapters.paired import PairedModel

WEIGHTS = LossWeights(output_kl=0.7, forward_bridge=1.3, backward_bridge=1.9, nmse=0.4, lowest_cut=0)


def gradients(pair: PairedModel) -> dict[str, torch.Tensor]:
    assert pair.adapters is not None
    found = {name: p.grad.clone() for name, p in pair.adapters.named_parameters()}
    pair.adapters.zero_grad()
    return found


@pytest.mark.parametrize("cut", range(5))
def test_shared_prefixes_change_neither_value_nor_gradient(pair: PairedModel, batch: Batch, cut: int) -> None:
    slow = reference_step(pair, batch, cut, WEIGHTS, 0.05)
    slow_gradients = gradients(pair)
    fast = shared_prefix_step(pair, batch, cut, WEIGHTS, 0.05)
    fast_gradients = gradients(pair)
    for name in ("output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity", "total"):
        assert abs(getattr(slow, name) - getattr(fast, name)) < 1e-10, name
    for name, gradient in slow_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_the_total_is_the_weighted_sum_of_the_terms(pair: PairedModel, batch: Batch) -> None:
    t: StepTerms = shared_prefix_step(pair, batch, 2, WEIGHTS, 0.05)
    expected = 0.7 * t.output_kl + 1.3 * t.forward_bridge + 1.9 * t.backward_bridge + 0.4 * t.nmse + 0.05 * t.sparsity
    assert abs(t.total - expected) < 1e-12


def test_at_the_ends_the_bridges_are_the_pure_models(pair: PairedModel, batch: Batch) -> None:
    for step in (reference_step, shared_prefix_step):
        lowest, highest = step(pair, batch, 0, WEIGHTS, 0.0), step(pair, batch, 4, WEIGHTS, 0.0)
        assert abs(lowest.forward_bridge) < 1e-12 and abs(highest.backward_bridge) < 1e-12
        assert abs(lowest.backward_bridge - lowest.output_kl) < 1e-12
        assert abs(highest.forward_bridge - highest.output_kl) < 1e-12
        assert lowest.output_kl > 0.01


def test_padding_changes_no_term(pair: PairedModel) -> None:
    one = random_batch(4, lengths=(8,))
    padded = Batch(*(torch.nn.functional.pad(t, (0, 5)) for t in (one.tokens, one.region)))
    for step in (reference_step, shared_prefix_step):
        a, b = step(pair, one, 2, WEIGHTS, 0.05), step(pair, padded, 2, WEIGHTS, 0.05)
        for name in ("output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity", "total"):
            assert abs(getattr(a, name) - getattr(b, name)) < 1e-10, name


def test_the_terms_against_plain_python() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counted = [(0, 0), (0, 1), (1, 0)]
    p, q = draw(2, 3, 5), draw(2, 3, 5)
    kls = [sum(a * (a / b).log() for a, b in zip(p[i].softmax(0), q[i].softmax(0), strict=True)) for i in counted]
    assert abs(masked_kl(p, q, mask) - sum(kls) / 3) < 1e-12
    error = sum(((p[i] - q[i]) ** 2).sum() for i in counted) / sum((p[i] ** 2).sum() for i in counted)
    assert abs(squared_error_ratio(p, q, mask) - error) < 1e-12
    acts, decoder = draw(2, 3, 4).relu(), draw(4, 6)
    l1 = sum(acts[i][f] * decoder[f].norm() for i in counted for f in range(4)) / 3
    assert abs(sparsity(acts, decoder, mask) - l1) < 1e-12


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_kl_in_chunks_is_the_kl(rows_at_once: int) -> None:
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
