"""What features do to the logits directly: the row they write, through the final norm's weight and the unembedding.

The final norm's scale differs from token to token and is left out, so effects of one feature compare with each other
and, in decoder-norm units, features of one model with each other; they are no differences of logits. Where the MLP has
a norm behind it (Gemma 2's ln2_post) that norm's weight is part of the effect and its scale is left out, too: it
differs from layer to layer by more than ten times, so there only features of one layer compare with each other. What a
feature does at given positions, every scale included, is in `circuit_roles` and in attribution graphs. Each row is
less its mean over the vocabulary, which changes no probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.models.paired_model import PairedModel

TOP_TOKENS, HISTOGRAM_BINS = 10, 40


class LayerEffects(NamedTuple):
    """Direct effects of every feature of a layer, per unit of activation in decoder-norm units."""

    top_tokens: Int[Tensor, "n top"]
    """Tokens it raises most, strongest first."""
    top: Float[Tensor, "n top"]
    """By how much."""
    bottom_tokens: Int[Tensor, "n top"]
    """Tokens it lowers most, strongest first."""
    bottom: Float[Tensor, "n top"]
    """By how much (negative)."""
    norm: Float[Tensor, "n"]
    """Norm of what it writes per unit of raw activation."""
    words: Float[Tensor, "n words"]
    """Effect on the chosen words."""
    spread: Float[Tensor, "n"]
    """Standard deviation over the vocabulary."""
    kurtosis: Float[Tensor, "n"]
    """Excess kurtosis over the vocabulary; 0 for a feature that writes nothing."""
    range: Float[Tensor, "n 2"]
    """Smallest and largest effect: the ends of the histogram."""
    histogram: Int[Tensor, "n bins"]
    """Tokens in each of as many equal bins between them."""


def logit_effects(
    pair: PairedModel,
    layer: int,
    written: Float[Tensor, "n d_model"],
    unembedding: Float[Tensor, "d_vocab d_model"] | None = None,
) -> Float[Tensor, "n d_vocab"]:
    """Effect on the logits of what the MLP of ``layer`` writes, on the CPU; rows have mean 0.

    Args:
        pair: whose norms and unembedding it goes through.
        layer: of the MLP.
        written: rows that are written, such as a decoder's.
        unembedding: the pair's in float32, where a caller has it; None casts it.
    """
    written = written.detach().to(pair.model.W_E.device).float()
    for norm in (f"blocks.{layer}.ln2_post", "ln_final"):
        if norm == "ln_final" or hasattr(pair.model.blocks[layer], "ln2_post"):
            weight = pair.backend.norm(norm)
            written = written if weight is None else written * weight.float()
    effects = written @ (_unembedding(pair) if unembedding is None else unembedding).T
    return (effects - effects.mean(-1, keepdim=True)).cpu()


def _unembedding(pair: PairedModel) -> Float[Tensor, "d_vocab d_model"]:
    return pair.backend.unembedding().detach().float()


@torch.no_grad()
def layer_effects(
    pair: PairedModel, layer: int, written: Float[Tensor, "n d_model"], words: Sequence[int] = ()
) -> LayerEffects:
    """The effects of all features of a layer, summarised a chunk at a time: [n, d_vocab] is never held.

    Args:
        pair: whose final norm and unembedding they go through.
        layer: of the MLP beside which they write.
        written: decoder rows, or output rows of neurons, of any norm.
        words: token ids whose effects are kept one by one.
    """
    chosen, unembedding = torch.tensor(list(words), dtype=torch.long), _unembedding(pair)
    chunks = []
    for rows in written.split(pair.rows_at_once):
        norm = rows.float().norm(dim=-1)
        directions = rows / norm.clamp(min=1e-30)[:, None].to(rows.dtype)
        chunks.append(_summary(logit_effects(pair, layer, directions, unembedding), norm.cpu(), chosen))
    return LayerEffects(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _summary(effects: Tensor, norm: Tensor, words: Tensor) -> LayerEffects:
    n_top = min(TOP_TOKENS, effects.shape[1])
    top, bottom = effects.topk(n_top), (-effects).topk(n_top)
    variance = effects.square().mean(-1)
    kurtosis = effects.square().square().mean(-1) / variance.square().clamp(min=1e-30) - 3
    low, high = effects.aminmax(dim=-1)
    width = ((high - low) / HISTOGRAM_BINS).clamp(min=1e-30)
    bins = ((effects - low[:, None]) / width[:, None]).long().clamp(max=HISTOGRAM_BINS - 1)
    histogram = torch.zeros(len(effects), HISTOGRAM_BINS, dtype=torch.int64).scatter_add_(
        1, bins, torch.ones_like(bins)
    )
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


def written_rows(
    pair: PairedModel, kind: str, layers: Sequence[int]
) -> Iterator[tuple[int, Float[Tensor, "n d_model"]]]:
    """What every feature of each layer writes per unit of activation: decoder rows, or the target's W_out rows."""
    for layer in layers:
        if kind == "neuron":
            yield layer, pair.mlps[layer].weights()[0].W_out.detach()
        else:
            yield layer, pair.installed_adapters()[layer].W_dec.detach()
