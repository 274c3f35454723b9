"""Decoding steps without modules compute what the modules compute, and every hook fires as it does there."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_model, randomise
from torch import Tensor
from transformer_lens.components import GroupedQueryAttention

from tl_adapters.generation import direct_layers
from tl_adapters.generation.cached_passes import _BridgePasses, _DirectPasses, _HookedPasses, cached_passes
from tl_adapters.generation.completions import complete
from tl_adapters.interventions.feature_edits import scaled
from tl_adapters.models.paired_model import PairedModel

PROMPT, STEPS = 12, 10


def made(architecture: str, dtype: torch.dtype = torch.float64, backend: str = "hooked") -> PairedModel:
    models = [random_model(seed, dtype, architecture) for seed in (1, 2)]
    return randomise(PairedModel.from_pretrained(*models, backend=backend))


@torch.no_grad()
def logits_of(model: Any, kind: Callable[..., Any], padding: tuple[int, ...], between: Callable[[int], None]) -> Tensor:
    """Logits of every step over given tokens; after a third of the steps, every other row leaves the batch."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 61, (len(padding), PROMPT + STEPS), generator=generator)
    mask = (torch.arange(PROMPT) >= torch.tensor(padding)[:, None]).long()
    passes, found = kind(model, len(padding)), []
    new = tokens[:, :PROMPT]
    for step in range(STEPS):
        between(step)
        found.append(passes(new, mask).flatten())
        if step == STEPS // 3 and len(padding) > 1:
            kept = torch.arange(0, len(padding), 2)
            passes.select(kept)
            tokens, mask = tokens[kept], mask[kept]
        new, mask = tokens[:, PROMPT + step, None], torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
    return torch.cat(found)


def unhooked(step: int) -> None:
    """Leave the hooks as they are."""


@pytest.mark.parametrize("padding", [(0,), (0, 3, 7, 11)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_modules(
    architecture: str, padding: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a hook inside the attention comes and goes, and where the rotary tables end and are extended."""
    monkeypatch.setattr(direct_layers, "LEAST_GROWTH", 3)
    pair = made(architecture)
    model = pair.model
    for block in model.blocks:
        block.attn.rotary_cos, block.attn.rotary_sin = block.attn.rotary_cos[:17], block.attn.rotary_sin[:17]

    def halved(value: Tensor, hook: Any) -> Tensor:
        return value * 0.5

    def sometimes_hooked(step: int) -> None:
        model.reset_hooks()
        if step in (0, 3, 4, 8):
            model.add_hook("blocks.1.attn.hook_pattern", halved)
            model.add_hook("blocks.2.ln2.hook_scale", halved)
        model.add_hook("blocks.2.hook_resid_mid", halved)

    cases = (({"route": "hybrid"}, unhooked), ({"first": 2}, sometimes_hooked), ({"route": "target"}, sometimes_hooked))
    for how, between in cases:
        with pair.routed(**how), scaled(pair, [(1, 3)], -4.0):  # type: ignore[arg-type]
            expected = logits_of(model, _HookedPasses, padding, between)
            found = logits_of(model, cached_passes, padding, between)
        model.reset_hooks()
        assert (found - expected).abs().max() < 1e-10


class PassesOfTheBridge(_BridgePasses):
    """Every pass by the bridge itself."""

    def __init__(self, model: Any, n_rows: int) -> None:
        super().__init__(model, n_rows)
        assert self.steps is not None
        self.steps = None


@pytest.mark.parametrize("padding", [(0,), (0, 3, 7, 11)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_bridge(architecture: str, padding: tuple[int, ...]) -> None:
    """In float32, in which a bridge computes attention patterns; also where a hook comes and goes."""
    pair = made(architecture, backend="bridge")
    model = pair.model

    def sometimes_hooked(step: int) -> None:
        model.reset_hooks()
        if step in (0, 3, 4, 8):
            model.add_hook("blocks.1.hook_resid_mid", lambda value, hook: value * 0.5)
        model.add_hook("blocks.2.mlp.hook_in", lambda value, hook: value * 0.5)

    for how, between in (({"route": "target"}, unhooked), ({"first": 2}, sometimes_hooked)):
        with pair.routed(**how), scaled(pair, [(1, 3)], -4.0):  # type: ignore[arg-type]
            expected = logits_of(model, PassesOfTheBridge, padding, between)
            found = logits_of(model, cached_passes, padding, between)
        model.reset_hooks()
        assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_every_hook_fires_once_per_pass(backend: str) -> None:
    """Hooks of the residual stream, of an MLP, of an adapter and of a block, beside layers without any."""
    pair = made("Qwen2ForCausalLM", backend=backend)
    names = [f"blocks.{layer}.{point}" for layer in (0, 2) for point in ("hook_mlp_out", "hook_resid_post")]
    names += ["blocks.1.mlp.hook_post", "blocks.1.mlp.adapter.hook_sae_acts_post", "blocks.3.attn.hook_z"]
    names += ["embed.hook_out"] if backend == "bridge" else ["hook_embed"]
    names += ["ln_final.hook_normalized", "unembed.hook_out"]
    fired: Counter[str] = Counter()

    def count(value: Tensor, hook: Any, name: str) -> None:
        fired[name] += 1  # a bridge's hook points have several names

    handle = pair.model.blocks[1].register_forward_pre_hook(lambda *_: fired.update(["block"]))
    with (
        pair.routed("replacement") as model,
        model.hooks(fwd_hooks=[(name, partial(count, name=name)) for name in names]),
    ):
        complete(model, [[1, 2, 3]], max_new_tokens=9, stop_at=[])
    handle.remove()
    assert fired == Counter(dict.fromkeys([*names, "block"], 9))


def test_models_with_other_modules_are_called() -> None:
    model = made("Qwen2ForCausalLM").model
    assert type(cached_passes(model, 1)) is _DirectPasses
    expected = complete(model, [[1, 2, 3], [4, 5]], max_new_tokens=9, stop_at=[])
    changes: list[Callable[[Any], object]] = [
        lambda block: setattr(block.attn, "__class__", GroupedQueryAttention),
        lambda block: setattr(block.mlp, "forward", block.mlp.forward),
        lambda block: block.mlp.b_out.data.copy_(torch.arange(32)),
        lambda block: setattr(block.cfg, "use_attn_result", True),
    ]
    for i, change in enumerate(changes):
        model = made("Qwen2ForCausalLM").model
        change(model.blocks[2])
        assert type(cached_passes(model, 1)) is _HookedPasses
        assert (complete(model, [[1, 2, 3], [4, 5]], max_new_tokens=9, stop_at=[]) == expected) == (i != 2)


def test_low_precision_rounds_as_the_modules_do() -> None:
    for architecture in ("Qwen3ForCausalLM", "Gemma2ForCausalLM"):
        model = made(architecture, torch.bfloat16).model
        exact = made(architecture, torch.float32).model
        errors = []
        for kind in (_HookedPasses, cached_passes):
            error = logits_of(model, kind, (0, 3), unhooked).float()
            errors.append(float((error - logits_of(exact, kind, (0, 3), unhooked)).square().mean()))
        assert errors[1] < 1.5 * errors[0]
