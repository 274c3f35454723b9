"""Does a TransformerLens model compute what the Hugging Face model that it was made of computes?

A model may compute more than its configuration and weights say, and a release of either library may change its
results. `require_agreement` therefore gives every block of the new model the inputs that `hf_outputs` recorded in the
Hugging Face model, so that errors do not add up over layers and the first layer that differs is named. `require_hybrid`
does the same for the base's MLPs in a pair, and `require_cache` compares generation with the key-value cache to passes
without it. `require_consistent` makes the checks that need no Hugging Face model, for a model that the user made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.checkpoints.layer_samples import dtype_name
from tl_adapters.models.backend import Backend
from tl_adapters.models.hf_outputs import HFOutputs, hidden_states, probe_tokens
from tl_adapters.models.output_comparison import (
    DisagreementError,
    compare,
    library_versions,
    position_norms,
    tolerance,
)
from tl_adapters.models.routed_mlp import RoutedMLP

log = logging.getLogger(__name__)

NEW_TOKENS = 5
"""Greedy tokens that are generated with the key-value cache."""
WHOLE_MODEL_FACTOR = 4.0
"""The tolerance of a pass through the whole model, as a multiple of that of one block."""


@torch.no_grad()
def require_agreement(backend: Backend, hf_outputs: HFOutputs | None) -> None:
    """Give every part of the model the inputs of its Hugging Face model, and compare the outputs.

    Compared are the embedding, the MLP and the block of each layer, the final norm with the unembedding, all of it
    together, and a few greedy tokens (`require_cache`). The model may be in a pair, on the route "target".

    Raises:
        DisagreementError: names the first layer that differs, with both numbers.
    """
    if hf_outputs is None:
        return
    model, tokens, blocks, mlps = backend.model, hf_outputs.tokens, hf_outputs.target.blocks, hf_outputs.target.mlps
    compare("The embedding of the target", blocks[0].input, backend.embed(tokens))
    for layer, (block, mlp) in enumerate(zip(blocks, mlps, strict=True)):
        mlp_output = hidden_states(model.blocks[layer].mlp(mlp.input))
        compare(f"The MLP of layer {layer} of the target", mlp.output, mlp_output)
        compare(
            f"Layer {layer} of the target (attention, norms or sums: its MLP agrees)",
            block.output,
            backend.run_blocks(block.input, layer, layer + 1),
            residual=block.input,
            rounding=None if hf_outputs.attention_rounding is None else hf_outputs.attention_rounding[layer],
        )
    compare("The unembedding of the target", hf_outputs.target.logits, backend.unembed(blocks[-1].output))
    composed = backend.unembed(backend.run_blocks(backend.embed(tokens), 0, len(blocks)))
    compare("The target as a whole (its parts agree)", composed, model(tokens), tolerance_factor=WHOLE_MODEL_FACTOR)
    require_cache(model, tokens)


@torch.no_grad()
def require_hybrid(mlps: Sequence[RoutedMLP], hf_outputs: HFOutputs | None) -> None:
    """Compare the base's MLPs in a pair, and both models' weights as `RoutedMLP.weights`, with Hugging Face's MLPs.

    Raises:
        DisagreementError: names the first layer that differs, with both numbers.
    """
    if hf_outputs is None or hf_outputs.base_mlp_outputs is None:
        return
    calls = zip(mlps, hf_outputs.target.mlps, hf_outputs.base_mlp_outputs, strict=True)
    for layer, (mlp, call, output) in enumerate(calls):
        assert mlp.base is not None
        compare(f"The MLP of layer {layer} of the base", output, mlp.base(call.input))
        require_base_weights(mlp, layer, call.input, output)
        weights, _ = mlp.weights()
        compare(f"The MLP of layer {layer} of the target", call.output, weights.neurons(call.input) @ weights.W_out)


def require_base_weights(mlp: RoutedMLP, layer: int, x: Tensor, output: Tensor) -> None:
    """Raises DisagreementError where the base's weights in a pair do not compute ``output`` from ``x``."""
    _, weights = mlp.weights()
    compare(f"The MLP of layer {layer} of the base", output, weights.neurons(x) @ weights.W_out)


@torch.no_grad()
def require_cache(model: Any, tokens: Int[Tensor, "1 pos"]) -> None:
    """Raises DisagreementError where `generate` with the key-value cache sees other logits than a pass without it.

    The logits themselves are compared, at every generated token, since the tokens alone may agree by chance.
    """
    n_new = min(NEW_TOKENS, model.cfg.n_ctx - tokens.shape[1])
    if n_new < 1:
        return
    logits_of_passes: list[Tensor] = []
    handle = model.unembed.register_forward_hook(lambda module, args, logits: logits_of_passes.append(logits[0]))
    try:
        with _without_tokenizer(model):
            options = dict(do_sample=False, stop_at_eos=False, prepend_bos=False, verbose=False)
            generated = model.generate(tokens, max_new_tokens=n_new, use_past_kv_cache=True, **options)
            model(generated)
    finally:
        handle.remove()
    *steps, whole = logits_of_passes
    cached, uncached = torch.stack([logits[-1] for logits in steps]), whole[-n_new - 1 : -1]
    if cached.shape == uncached.shape:
        allowed = WHOLE_MODEL_FACTOR * tolerance(uncached.dtype, uncached.device)
        wrong = ~(position_norms(cached - uncached) <= allowed * position_norms(uncached))
    else:
        wrong = torch.ones(n_new, dtype=torch.bool)
    if not bool(wrong.any()):
        return
    step = int(wrong.nonzero()[0])
    token = int(generated[0, step - n_new])
    raise DisagreementError(
        f"Generating with the key-value cache goes wrong at token {step + 1} of {n_new}: the logit of the token it "
        f"generates ({token}) is {float(steps[step][-1, token]):.4g}, and {float(uncached[step, token]):.4g} without "
        f"the cache. These releases do not work together for a {type(model).__name__}: {library_versions()}. Install "
        "releases that tl_adapters' pyproject.toml allows, or take the other backend."
    )


@torch.no_grad()
def require_consistent(model: Any) -> None:
    """Check a TransformerLens model by itself: its logits are finite and its key-value cache changes nothing.

    A model with hooks is not checked, since a hook may act on single positions of a pass.

    Raises:
        DisagreementError: where either is not true.
    """
    if model.W_E.is_meta or any(point.fwd_hooks for point in model.hook_dict.values()):
        log.info("The model has hooks or no values, so its logits and its key-value cache were not checked.")
        return
    tokens = probe_tokens(model.cfg.d_vocab, model.cfg.n_ctx).to(model.W_E.device)
    with _without_tokenizer(model):
        finite = bool(model(tokens).isfinite().all())
    if not finite:
        raise DisagreementError(
            f"The model's logits are not finite in {dtype_name(model.cfg.dtype)}. Load it in float32 or bfloat16; "
            "if they are still not finite, its weights are damaged."
        )
    require_cache(model, tokens)


@contextmanager
def _without_tokenizer(model: Any) -> Iterator[None]:
    """For the length of a block TransformerLens takes token ids as they are and infers no padding from them."""
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        yield
    finally:
        model.tokenizer = tokenizer
