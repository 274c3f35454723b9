"""Views of a text in a notebook: colored by feature activations, and its attention by heads.

A `Feature` displays itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import row_norms
from tl_adapters.data.tokens import CONTINUATION, WITHHELD, span_texts, token_text
from tl_adapters.data.traces import GivenPrompt, Trace, prompt_token_ids
from tl_adapters.errors import UserError
from tl_adapters.features.feature import VISIBLE_WHITESPACE, ResidualStream
from tl_adapters.features.firing_reader import features_read_on
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.utils.arguments import HasFeatures, choice, feature_pairs
from tl_adapters.utils.notebook import NotebookView, circuitsvis_tokens, circuitsvis_view
from tl_adapters.utils.renamed import renamed_arguments


@renamed_arguments(ids="features")
def show_features(
    pair: PairedModel,
    text: GivenPrompt,
    features: Sequence[FeatureId | tuple[int, int]] | HasFeatures,
    *,
    stream: ResidualStream = "replacement",
) -> NotebookView:
    """A text colored by the activations of one feature at a time; hovering over a token shows all of them.

    Args:
        pair: the pair, with adapters.
        text: a text, tokenized as it stands (special tokens may be written out), token ids, or a document. One that
            is not to be republished has a mark in place of every token's text.
        features: pairs (layer, index), in the order in which they can be chosen, or those of a circuit.
        stream: the model whose residual stream they are read on.

    Raises:
        UserError: the text is empty or longer than the context, or there is no tokenizer for it; there are no features,
            or the adapters do not have them.
        ArgumentError: the text is no token ids of the model, or a value is not a feature.
        PairMismatchError: the pair has no adapters.
    """
    choice(stream, get_args(ResidualStream), "stream")
    adapters = pair.installed_adapters()
    chosen = [FeatureId(*feature) for feature in feature_pairs(features)]
    unknown = [f for f in chosen if f.layer not in adapters.layer_indices or not 0 <= f.index < adapters.n_features]
    if unknown or not chosen:
        raise UserError(
            f"Got the features {unknown or 'none'}; the adapters have {adapters.n_features}, from 0, in each of the "
            f"layers {adapters.layer_indices}."
        )
    tokens, strings = _read_text(pair, text)
    with torch.no_grad(), features_read_on(pair, stream), pair.recorded(ACTS_HOOK) as recorded:
        pair.run_blocks(pair.embed(torch.tensor([tokens], device=pair.device)), 0, pair.n_layers)
    columns = [
        recorded[f.layer][0, :, f.index].float() * row_norms(adapters[f.layer].W_dec[f.index].detach()) for f in chosen
    ]
    properties: dict[str, object] = {
        "tokens": circuitsvis_tokens(strings),
        "values": torch.stack(columns, dim=-1).tolist(),
        "labels": [f"{f.layer}.{f.index}" for f in chosen],
    }
    return circuitsvis_view([("ColoredTokensMulti", properties)])


@torch.no_grad()
def show_attention(
    pair: PairedModel,
    text: GivenPrompt,
    layer: int,
    heads: Sequence[int] | None = None,
    *,
    route: str = "target",
) -> NotebookView:
    """The attention patterns of one layer, a heatmap per head; choose a head to see it large.

    Adapters change attention only through what they write below it, so patterns of two routes may differ.

    Args:
        pair: the pair; routes with adapters need some.
        text: as in `show_features`.
        layer: the layer.
        heads: the heads, in the order in which they are shown; None is all.
        route: the route whose patterns they are: "target", "hybrid" or "replacement".

    Raises:
        UserError: the text is empty or longer than the context, or there is no tokenizer for it; the model has no such
            layer or head.
        ArgumentError: the text is no token ids of the model.
        PairMismatchError: the route needs adapters, and the pair has none.
    """
    n_heads = pair.model.cfg.n_heads
    chosen = list(range(n_heads)) if heads is None else [int(head) for head in heads]
    if not 0 <= layer < pair.n_layers or not chosen or not all(0 <= head < n_heads for head in chosen):
        raise UserError(
            f"Got layer {layer} and heads {chosen}; the model has {pair.n_layers} layers of {n_heads} heads, from 0."
        )
    tokens, strings = _read_text(pair, text)
    with pair.routed(route), pair.recorded("attn.hook_pattern") as recorded:
        pair.run_blocks(pair.embed(torch.tensor([tokens], device=pair.device)), 0, layer + 1)
    properties: dict[str, object] = {
        "attention": recorded[layer][0, chosen].float().tolist(),
        "attentionHeadNames": [f"{layer}.{head}" for head in chosen],
        "tokens": [string.translate(VISIBLE_WHITESPACE) for string in strings],  # drawn as text, so not escaped
    }
    return circuitsvis_view([("AttentionHeads", properties)])


def _read_text(pair: PairedModel, text: GivenPrompt) -> tuple[list[int], list[str]]:
    """Token ids of a text, and the text of each token for views that draw a box per token. Raises UserError."""
    tokens = prompt_token_ids(pair.model, text, UserError, "text").tolist()
    if isinstance(text, Trace) and not text.republish:
        return tokens, [WITHHELD] * len(tokens)
    return tokens, span_texts([token_text(pair.model.tokenizer, token) for token in tokens], CONTINUATION)
