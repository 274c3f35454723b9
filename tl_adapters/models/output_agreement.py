"""Does a model of TransformerLens compute what the Hugging Face model that it was made of computes?

A model may compute more than its configuration and weights say, and a release of either library may change what the
other does. So `require_agreement` gives every block of the new model the inputs that `hf_outputs` has of the Hugging
Face model: errors do not add up that way, and the first layer that differs is named. `require_hybrid` does the same for
the target with the base's MLP modules, and `require_cache` holds greedy tokens made with the key-value cache against
logits computed without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.models.backend import Backend
from tl_adapters.models.hf_outputs import HFOutputs, hidden_states, probe_tokens
from tl_adapters.models.output_comparison import DisagreementError, compare, named, norm, tolerance, versions
from tl_adapters.models.routed_mlp import RoutedMLP

log = logging.getLogger(__name__)

NEW_TOKENS = 5
"""Greedy tokens that are made with the key-value cache."""
WHOLE = 4.0
"""A pass through the whole model may be off by so many times what one block may be."""


@torch.no_grad()
def require_agreement(backend: Backend, hf_outputs: HFOutputs | None) -> None:
    """Give every part of the model what its Hugging Face model was given, and compare what comes out.

    The embedding, then MLP and block of each layer, the final norm with the unembedding, all of it together, and a few
    greedy tokens (`require_cache`). Before or after a pair was made of the model, on the route "target".

    Raises:
        DisagreementError: names the first layer that differs, with both numbers.
    """
    if hf_outputs is None:
        return
    model, tokens, blocks, mlps = backend.model, hf_outputs.tokens, hf_outputs.target.blocks, hf_outputs.target.mlps
    compare("The embedding of the target", blocks[0].input, backend.embed(tokens))
    for layer, (block, mlp) in enumerate(zip(blocks, mlps, strict=True)):
        compare(
            f"The MLP of layer {layer} of the target", mlp.output, hidden_states(model.blocks[layer].mlp(mlp.input))
        )
        compare(
            f"Layer {layer} of the target (attention, norms or sums: its MLP agrees)",
            block.output,
            backend.run_blocks(block.input, layer, layer + 1),
            given=block.input,
            rounding=None if hf_outputs.attention_rounding is None else hf_outputs.attention_rounding[layer],
        )
    compare("The unembedding of the target", hf_outputs.target.logits, backend.unembed(blocks[-1].output))
    composed = backend.unembed(backend.run_blocks(backend.embed(tokens), 0, len(blocks)))
    compare("The target as a whole (its parts agree)", composed, model(tokens), times=WHOLE)
    require_cache(model, tokens)


@torch.no_grad()
def require_hybrid(mlps: Sequence[RoutedMLP], hf_outputs: HFOutputs | None) -> None:
    """Compare the base's MLPs in a pair, and both models' weights as other code reads them, with Hugging Face's MLPs.

    Raises:
        DisagreementError: names the first layer that differs, with both numbers.
    """
    if hf_outputs is None or hf_outputs.base_mlp_outputs is None:
        return
    for layer, (mlp, call, output) in enumerate(
        zip(mlps, hf_outputs.target.mlps, hf_outputs.base_mlp_outputs, strict=True)
    ):
        assert mlp.base is not None
        compare(f"The MLP of layer {layer} of the base", output, mlp.base(call.input))
        require_base_weights(mlp, layer, call.input, output)
        of_target, _ = mlp.weights()
        ours = of_target.neurons(call.input) @ of_target.W_out
        compare(f"The MLP of layer {layer} of the target", call.output, ours)


def require_base_weights(mlp: RoutedMLP, layer: int, x: Tensor, output: Tensor) -> None:
    """Raises DisagreementError where the base's weights in a pair do not make ``output`` of ``x``."""
    _, weights = mlp.weights()
    compare(f"The MLP of layer {layer} of the base", output, weights.neurons(x) @ weights.W_out)


@torch.no_grad()
def require_cache(model: Any, tokens: Int[Tensor, "1 pos"]) -> None:
    """Raises DisagreementError where `generate` with the key-value cache sees other logits than a pass without it.

    Compared are the logits themselves, at every token that was made: tokens alone may agree by chance.
    """
    new = min(NEW_TOKENS, model.cfg.n_ctx - tokens.shape[1])
    if new < 1:
        return
    seen: list[Tensor] = []
    handle = model.unembed.register_forward_hook(lambda module, args, logits: seen.append(logits[0]))
    try:
        with _without_tokenizer(model):
            options = dict(do_sample=False, stop_at_eos=False, prepend_bos=False, verbose=False)
            made = model.generate(tokens, max_new_tokens=new, use_past_kv_cache=True, **options)
            model(made)
    finally:
        handle.remove()
    *steps, whole = seen
    cached, plain = torch.stack([logits[-1] for logits in steps]), whole[-new - 1 : -1]
    if cached.shape == plain.shape:
        allowed = WHOLE * tolerance(plain.dtype, plain.device)
        wrong = ~(norm(cached - plain) <= allowed * norm(plain))
    else:
        wrong = torch.ones(new, dtype=torch.bool)
    if not bool(wrong.any()):
        return
    at, made_id = int(wrong.nonzero()[0]), int(made[0, int(wrong.nonzero()[0]) - new])
    raise DisagreementError(
        f"Generating with the key-value cache goes wrong at token {at + 1} of {new}: the logit of the token it makes "
        f"({made_id}) is {float(steps[at][-1, made_id]):.4g}, and {float(plain[at, made_id]):.4g} without the cache. "
        f"These releases do not work together for a {type(model).__name__}: {versions()}. Install releases that "
        "tl_adapters' pyproject.toml allows, or take the other backend."
    )


@torch.no_grad()
def require_consistent(model: Any) -> None:
    """What can be asked of a model of TransformerLens alone: finite logits, and a key-value cache that changes nothing.

    A model with hooks is not asked, since a hook may act on single positions of a pass.

    Raises:
        DisagreementError: where either does not hold.
    """
    if model.W_E.is_meta or any(point.fwd_hooks for point in model.hook_dict.values()):
        log.info("The model has hooks or no values, so its logits and its key-value cache were not tried.")
        return
    tokens = probe_tokens(model.cfg.d_vocab, model.cfg.n_ctx).to(model.W_E.device)
    with _without_tokenizer(model):
        finite = bool(model(tokens).isfinite().all())
    if not finite:
        raise DisagreementError(
            f"The model's logits are not finite in {named(model.cfg.dtype)}. Load it in float32 or bfloat16; else its "
            "weights are damaged."
        )
    require_cache(model, tokens)


@contextmanager
def _without_tokenizer(model: Any) -> Iterator[None]:
    """TransformerLens then takes token ids as they are, and looks for no padding in them."""
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        yield
    finally:
        model.tokenizer = tokenizer
