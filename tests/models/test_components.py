"""Components in fewer passes have the values and derivatives of the stock ones, and give way to hooks."""

from collections.abc import Callable

import pytest
import torch
from helpers.random_models import random_model
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from tl_adapters.models.components import FusedAttention, FusedBlock, FusedRMSNorm, LeanUnembed
from tl_adapters.models.hooked_transformer import OURS, build_hooked_transformer


@pytest.fixture
def model() -> HookedTransformer:
    return build_hooked_transformer(random_model(1).to(torch.float64))


def as_stock(component: nn.Module, function: Callable[[], Tensor]) -> Tensor:
    """What the function computes with a component's stock class."""
    ours = type(component)
    component.__class__ = ours.__mro__[1]
    try:
        return function()
    finally:
        component.__class__ = ours


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def same_value_and_gradient(
    component: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor], twice: bool = True
) -> None:
    def all_of_it() -> Tensor:
        """The value, its gradient, and a gradient of that if ``twice``; torch's fused attention has no second one."""
        out = function(x)
        weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).sin().view_as(out)
        gradient = torch.autograd.grad((out.sin() * weights).sum(), x, create_graph=twice)[0]
        assert gradient.abs().min() > 0
        second = [torch.autograd.grad(gradient.square().sum(), x)[0]] if twice else []
        return torch.cat([t.detach().flatten() for t in (out, gradient, *second)])

    ours, stock = all_of_it(), as_stock(component, all_of_it)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def test_every_stock_component_is_replaced(model: HookedTransformer) -> None:
    types = {type(module) for module in model.modules()}
    assert set(OURS.values()) <= types and not types & set(OURS)


def test_norms_are_the_stock_norms_and_equal_to_the_last_bit(model: HookedTransformer) -> None:
    norm = model.blocks[0].ln1
    assert type(norm) is FusedRMSNorm and norm.w.std() > 0
    x = inputs(2, 3, model.cfg.d_model)
    same_value_and_gradient(norm, x, norm)
    assert torch.equal(norm(x), as_stock(norm, lambda: norm(x)))
    assert type(norm(x).grad_fn).__name__ == "_RMSNormBackward"


@pytest.mark.parametrize("point", ["hook_scale", "hook_normalized"])
def test_a_hook_inside_a_norm_changes_what_it_computes(model: HookedTransformer, point: str) -> None:
    norm, x = model.blocks[0].ln1, inputs(2, 3, model.cfg.d_model)
    before = norm(x)
    getattr(norm, point).add_hook(lambda value, hook: 2 * value)
    factor = 0.5 if point == "hook_scale" else 2.0
    torch.testing.assert_close(norm(x), factor * before, rtol=1e-12, atol=1e-12)


def test_a_module_of_another_tool_inside_a_norm_is_called(model: HookedTransformer) -> None:
    class Doubling(HookPoint):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    norm, x = model.blocks[0].ln1, inputs(2, 3, model.cfg.d_model)
    before = norm(x)
    norm.hook_normalized = Doubling()
    torch.testing.assert_close(norm(x), 2 * before)


def test_a_norm_whose_weight_learns_gives_it_a_gradient(model: HookedTransformer) -> None:
    norm = model.blocks[0].ln1
    norm.w.requires_grad_()
    norm(inputs(2, 3, model.cfg.d_model)).sum().backward()
    assert norm.w.grad is not None and norm.w.grad.abs().min() > 0


@pytest.mark.parametrize("n_past", [0, 3])
def test_rotations_are_the_stock_ones_where_the_halves_of_a_table_differ(model: HookedTransformer, n_past: int) -> None:
    attn = model.blocks[0].attn
    assert isinstance(attn, FusedAttention)
    attn.rotary_sin = attn.rotary_sin * torch.linspace(0.5, 2.0, attn.cfg.d_head, dtype=torch.float64)
    x = inputs(2, 4, 3, attn.cfg.d_head)
    same_value_and_gradient(attn, x, lambda x: attn.apply_rotary(x, n_past))
    assert type(attn.apply_rotary(x, n_past).grad_fn).__name__ == "_RotationBackward"


def test_rotations_beyond_the_table_and_under_a_mask_are_the_stock_ones(model: HookedTransformer) -> None:
    attn, x = model.blocks[0].attn, inputs(1, 4, 3, model.cfg.d_head)
    mask = torch.tensor([[0, 1, 1, 1]])
    same_value_and_gradient(attn, x, lambda x: attn.apply_rotary(x, 0, mask))
    whole = attn.apply_rotary(x, 0)
    attn.rotary_cos, attn.rotary_sin = attn.rotary_cos[:2], attn.rotary_sin[:2]
    torch.testing.assert_close(attn.apply_rotary(x, 0), whole, rtol=1e-6, atol=1e-6)


def test_a_block_normalizes_its_input_once_and_is_the_stock_block(model: HookedTransformer) -> None:
    block, x = model.blocks[0], inputs(2, 5, model.cfg.d_model)
    assert type(block) is FusedBlock
    calls = list[int]()
    block.ln1.register_forward_hook(lambda *args: calls.append(1))
    same_value_and_gradient(block, x, block, twice=False)
    assert len(calls) == 1 + 3  # ours, then the stock block's
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    same_value_and_gradient(block, x, lambda x: block(x, attention_mask=mask), twice=False)


def test_a_hook_in_a_blocks_first_norm_is_called_as_in_the_stock_block(model: HookedTransformer) -> None:
    calls = list[int]()
    model.blocks[0].ln1.hook_scale.add_hook(lambda value, hook: calls.append(1))
    model(torch.tensor([[1, 2, 3]]))
    assert len(calls) == 3


@pytest.mark.parametrize(
    "point", ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "ln2.hook_scale"]
)
def test_hooks_of_a_block_change_it_as_they_change_the_stock_block(model: HookedTransformer, point: str) -> None:
    block, x = model.blocks[0], inputs(2, 5, model.cfg.d_model)
    before = block(x)
    block.get_submodule(point).add_hook(lambda value, hook: value * 1.5)
    same_value_and_gradient(block, x, block, twice=False)
    assert (block(x) - before).abs().max() > 1e-2


def test_logits_without_a_bias_and_with_one_are_the_stock_ones(model: HookedTransformer) -> None:
    unembed, x = model.unembed, inputs(1, 3, model.cfg.d_model)
    assert isinstance(unembed, LeanUnembed)
    same_value_and_gradient(unembed, x, unembed)
    before = unembed(x)
    unembed.b_U.data[2] = 1.0
    assert torch.equal((unembed(x) - before).abs() > 0.5, (torch.arange(model.cfg.d_vocab) == 2).expand_as(before))
    same_value_and_gradient(unembed, x, unembed)


def test_hooks_on_the_unembedding_are_called(model: HookedTransformer) -> None:
    x = inputs(1, 3, model.cfg.d_model)
    before = model.unembed(x)
    for point in (model.unembed.hook_in, model.unembed.hook_out):
        point.add_hook(lambda value, hook: 2 * value)
    torch.testing.assert_close(model.unembed(x), 4 * before)
