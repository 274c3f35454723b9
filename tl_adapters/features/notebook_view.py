"""A text colored by feature activations, in a notebook. (A `Feature` displays itself.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import row_norms
from tl_adapters.data.tokens import CONTINUATION, span_texts, token_text
from tl_adapters.errors import UserError
from tl_adapters.features.feature import ResidualStream
from tl_adapters.features.firing_reader import features_read_on
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.utils.arguments import choice, feature_pairs, token_ids
from tl_adapters.utils.notebook import NotebookView, circuitsvis_tokens, circuitsvis_view


def show_features(
    pair: PairedModel,
    text: str | Sequence[int],
    ids: Sequence[FeatureId | tuple[int, int]],
    *,
    stream: ResidualStream = "replacement",
) -> NotebookView:
    """A text colored by the activations of one feature at a time; hovering over a token shows all of them.

    Args:
        pair: the pair, with adapters.
        text: a text, tokenized as it stands (special tokens may be written out), or token ids.
        ids: the features, in the order in which they can be chosen.
        stream: the model whose residual stream they are read on.

    Raises:
        UserError: the text is empty, or there is no tokenizer for it; there are no features, or the adapters do not
            have them.
    """
    choice(stream, get_args(ResidualStream), "stream")
    adapters = pair.installed_adapters()
    features = [FeatureId(*feature) for feature in feature_pairs(ids, "ids")]
    unknown = [f for f in features if f.layer not in adapters.layer_indices or not 0 <= f.index < adapters.n_features]
    if unknown or not features:
        raise UserError(
            f"Got the features {unknown or 'none'}; the adapters have {adapters.n_features}, from 0, in each of the "
            f"layers {adapters.layer_indices}."
        )
    tokenizer = pair.model.tokenizer
    if isinstance(text, str):
        if tokenizer is None:
            raise UserError("There is no tokenizer to read the text with; give token ids.")
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        tokens = token_ids(text, pair.model.cfg.d_vocab, "text")
    if not tokens:
        raise UserError("The text is empty; give at least one token.")
    strings = span_texts([token_text(tokenizer, token) for token in tokens], CONTINUATION)
    with torch.no_grad(), features_read_on(pair, stream), pair.recorded(ACTS_HOOK) as recorded:
        pair.run_blocks(pair.embed(torch.tensor([tokens], device=pair.device)), 0, pair.n_layers)
    columns = [
        recorded[f.layer][0, :, f.index].float() * row_norms(adapters[f.layer].W_dec[f.index].detach())
        for f in features
    ]
    properties: dict[str, object] = {
        "tokens": circuitsvis_tokens(strings),
        "values": torch.stack(columns, dim=-1).tolist(),
        "labels": [f"{f.layer}.{f.index}" for f in features],
    }
    return circuitsvis_view([("ColoredTokensMulti", properties)])
