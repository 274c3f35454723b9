"""Direct effects of features on the logits: decoder rows through the final norm's weight and the unembedding.

The final norm's scale differs from token to token and is left out. So the effects of one feature compare with each
other and, in decoder-norm units, features of one model compare with each other, but the effects are not differences of
logits. Where the MLP is followed by a norm (Gemma 2's ln2_post), that norm's weight is part of the effect and its scale
is left out too; the scale differs between layers by more than a factor of ten, so there only features of one layer
compare with each other. Effects at given positions, with every scale, are computed by `circuits.roles` and by
attribution graphs. The mean over the vocabulary is subtracted from each row, which changes no probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.adapters.transcoder import row_norms, unit_rows
from tl_adapters.features.feature import UnitKind
from tl_adapters.models.paired_model import PairedModel

N_TOP_TOKENS, N_EFFECT_BINS = 10, 40
"""Tokens that are kept at each end of a feature's effects, and bins of their histogram."""


class LayerEffects(NamedTuple):
    """Direct logit effects of every feature of a layer, per unit of activation in decoder-norm units."""

    top_tokens: Int[Tensor, "n top"]
    """Tokens it raises most, strongest first."""
    top: Float[Tensor, "n top"]
    """Effects on these tokens."""
    bottom_tokens: Int[Tensor, "n top"]
    """Tokens it lowers most, strongest first."""
    bottom: Float[Tensor, "n top"]
    """Effects on these tokens (negative)."""
    norm: Float[Tensor, "n"]
    """Norm of the decoder row: what it writes per unit of raw activation."""
    words: Float[Tensor, "n words"]
    """Effects on the chosen words."""
    spread: Float[Tensor, "n"]
    """Standard deviation of the effects over the vocabulary."""
    kurtosis: Float[Tensor, "n"]
    """Excess kurtosis of the effects over the vocabulary; 0 for a feature that writes nothing."""
    range: Float[Tensor, "n 2"]
    """Smallest and largest effect: the ends of the histogram."""
    histogram: Int[Tensor, "n bins"]
    """Tokens in each of the equal bins between the two."""


def logit_effects(
    pair: PairedModel,
    layer: int,
    written: Float[Tensor, "n d_model"],
    unembedding: Float[Tensor, "d_vocab d_model"] | None = None,
) -> Float[Tensor, "n d_vocab"]:
    """Effects on the logits of vectors that the MLP of a layer writes, on the CPU; each row has mean 0.

    Args:
        pair: the pair whose norms and unembedding the vectors go through.
        layer: layer of the MLP.
        written: the vectors, such as decoder rows.
        unembedding: the pair's unembedding in float32, if the caller has it; None casts it here.
    """
    return _effects(pair, layer, written, _unembedding(pair) if unembedding is None else unembedding).cpu()


def _effects(pair: PairedModel, layer: int, written: Tensor, unembedding: Tensor) -> Tensor:
    """`logit_effects` on the pair's device."""
    written = written.detach().to(pair.device).float()
    for norm in (f"blocks.{layer}.ln2_post", "ln_final"):
        if norm == "ln_final" or hasattr(pair.model.blocks[layer], "ln2_post"):
            weight = pair.backend.norm(norm)
            written = written if weight is None else written * weight.float()
    effects = written @ unembedding.T
    return effects - effects.mean(-1, keepdim=True)


def _unembedding(pair: PairedModel) -> Float[Tensor, "d_vocab d_model"]:
    return pair.backend.unembedding().detach().float()


@torch.no_grad()
def layer_effects(
    pair: PairedModel, layer: int, written: Float[Tensor, "n d_model"], words: Sequence[int] = ()
) -> LayerEffects:
    """The effects of all features of a layer, summarized one chunk at a time, so that [n, d_vocab] is never in memory.

    Args:
        pair: the pair whose norms and unembedding the rows go through.
        layer: layer of the MLP beside which the features write.
        written: decoder rows, or output rows of neurons, of any norm.
        words: token ids whose effects are kept one by one.
    """
    unembedding = _unembedding(pair)
    # A large model's effects are hundreds of gigabytes, so they are summarized where they are computed. MPS lacks some
    # of these operations.
    device = pair.device if pair.device.type == "cuda" else torch.device("cpu")
    chosen = torch.tensor(list(words), dtype=torch.long).to(device)
    chunks = []
    for rows in written.split(pair.rows_at_once):
        effects = _effects(pair, layer, unit_rows(rows), unembedding).to(device)
        chunks.append([part.cpu() for part in _summary(effects, row_norms(rows).float(), chosen)])
    return LayerEffects(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _summary(effects: Tensor, norm: Tensor, words: Tensor) -> LayerEffects:
    n_top = min(N_TOP_TOKENS, effects.shape[1])
    top, bottom = effects.topk(n_top), (-effects).topk(n_top)
    variance = effects.square().mean(-1)
    kurtosis = effects.square().square().mean(-1) / variance.square().clamp(min=1e-30) - 3
    low, high = effects.aminmax(dim=-1)
    width = ((high - low) / N_EFFECT_BINS).clamp(min=1e-30)
    bins = ((effects - low[:, None]) / width[:, None]).long().clamp(max=N_EFFECT_BINS - 1)
    histogram = bins.new_zeros(len(effects), N_EFFECT_BINS).scatter_add_(1, bins, torch.ones_like(bins))
    return LayerEffects(
        top_tokens=top.indices.int(),
        top=top.values,
        bottom_tokens=bottom.indices.int(),
        bottom=-bottom.values,
        norm=norm,
        words=effects[:, words],
        spread=variance.sqrt(),
        kurtosis=torch.where(variance > 0, kurtosis, torch.zeros_like(kurtosis)),
        range=torch.stack([low, high], -1),
        histogram=histogram.int(),
    )


def decoder_rows(
    pair: PairedModel, kind: UnitKind, layers: Sequence[int]
) -> Iterator[tuple[int, Float[Tensor, "n d_model"]]]:
    """Layer by layer, what every feature writes per unit of activation: decoder rows, or rows of the target's W_out."""
    for layer in layers:
        if kind == "neuron":
            yield layer, pair.mlps[layer].weights()[0].W_out.detach()
        else:
            yield layer, pair.installed_adapters()[layer].W_dec.detach()
