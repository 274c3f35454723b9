"""Log-odds of a behavior, written out for single tokens, and of the texts of a pair."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tl_adapters.circuits.onsets import Onsets, final_residual, log_odds
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.precision import at_least_float32


def word_log_odds(logits: Tensor, words: Sequence[int]) -> Tensor:
    """log p(words) - log p(all other tokens), of words that are one token each."""
    logits = at_least_float32(logits)
    others = [token for token in range(logits.shape[-1]) if token not in words]
    return logits[..., list(words)].logsumexp(-1) - logits[..., others].logsumexp(-1)


def log_odds_at(pair: PairedModel, onsets: Onsets, at: Tensor) -> Tensor:
    """`log_odds` at the chosen positions, on the present routes and under the present interventions."""
    return log_odds(pair, final_residual(pair, onsets.tokens), onsets, at)
