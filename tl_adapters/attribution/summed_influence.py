"""The influence of every feature on a token, summed over the attribution graphs of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.pruning import NODE_THRESHOLD, prune
from tl_adapters.models.paired_model import PairedModel


def summed_influence(
    pair: PairedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    node_threshold: float = NODE_THRESHOLD,
    **options: Any,
) -> Float[Tensor, "n_layers n_features"]:
    """Sum the influence of every feature on one token over the pruned graphs of many prompts.

    A graph counts where the feature is among its kept nodes, at any position; its share of all influence is what is
    summed. (Section 5 of arXiv 2602.20904 reads the features of a behavior off such graphs.)

    Args:
        pair: with adapters on every layer.
        prompts: token ids of each prompt.
        tokens: for each prompt the token that comes next, whose logit is the graph's target.
        node_threshold: as in `prune`.
        options: of `attribute`.

    Returns: zeros for a feature that no graph keeps. Raises what `attribute` and `prune` raise.
    """
    total = torch.zeros(pair.n_layers, pair.installed_adapters().n_features)
    for prompt, token in zip(prompts, tokens, strict=True):
        graph = attribute(pair, torch.tensor(prompt), [token], progress=False, **options)
        kept, n = prune(graph, node_threshold), len(graph.features)
        influence = torch.where(kept.node_mask[:n], kept.influence[:n], 0.0)
        layer, _, index = graph.features.unbind(1)
        shares = influence / kept.influence.sum().clamp(min=torch.finfo(torch.float64).tiny)
        total.index_put_((layer, index), shares.to(total), accumulate=True)
    return total
