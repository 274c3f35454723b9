"""Ban the words of a behavior: single tokens by their logits, phrases by one token right after another.

A single token is banned by its logit. The first token of a phrase ("Hold on") must stay allowed, because other phrases
begin with it. So a later token of the phrase is banned where the token before it in the phrase was just read. For two
tokens that bans the phrase and nothing else. For more tokens the pair may occur in other phrases ("on" after "Hold" in
"Hold on to"), so the pair of neighbors is taken that occurs least often elsewhere in given texts, and that number is
recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tl_adapters.circuits.onsets import Onsets
from tl_adapters.evaluation.behaviors import Words
from tl_adapters.interventions.feature_edits import InterventionError
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel

Neighbors = dict[tuple[int, int], int]
"""(token, next token) of a phrase -> how often the pair occurs in given texts outside of the phrase."""


def banned_neighbors(onsets: Onsets) -> Neighbors:
    """Return, for every phrase, the first of its neighboring tokens that occur least often outside of the phrase."""
    rarest: Neighbors = {}
    tokens, following = onsets.tokens, onsets.next_tokens
    for phrase in (word for word in onsets.words if isinstance(word, tuple)):
        within = _phrase_starts(onsets, phrase)
        elsewhere: Neighbors = {}
        for offset, pair in enumerate(pairwise(phrase)):
            occurs = onsets.predicting & (tokens == pair[0]) & (following == pair[1])
            elsewhere.setdefault(pair, int((occurs & ~within.roll(offset, 1)).sum()))
        best = min(elsewhere, key=elsewhere.__getitem__)
        rarest[best] = min(elsewhere[best], rarest.get(best, elsewhere[best]))
    return rarest


def _phrase_starts(onsets: Onsets, phrase: tuple[int, ...]) -> Tensor:
    """The positions of the first token of every occurrence of a phrase."""
    tokens = onsets.tokens
    starts = tokens == phrase[0]
    for i, token in enumerate(phrase[1:], start=1):
        starts = starts & (tokens.roll(-i, 1) == token) & onsets.predicting.roll(1 - i, 1)
        starts[:, tokens.shape[1] - i :] = False
    return starts


def banned(words: Words, neighbors: Neighbors) -> Variant:
    """The replacement with single tokens banned, and of neighbors (`banned_neighbors`) the second after the first.

    It works in generation and in whole passes. Where logits are formed at other positions than tokens were read,
    InterventionError is raised, because the token before them is not known.
    """
    single = [word for word in words if isinstance(word, int)]

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        device = pair.device
        pairs = torch.tensor(list(neighbors), dtype=torch.long, device=device).reshape(-1, 2)
        alone = torch.tensor(single, dtype=torch.long, device=device)
        seconds = torch.nn.functional.one_hot(pairs[:, 1], pair.model.cfg.d_vocab).float()
        read: list[Tensor] = []

        def remember(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[:] = [next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))]

        def ban(module: object, inputs: object, logits: Tensor) -> Tensor:
            logits = logits.index_fill(-1, alone, -torch.inf)
            return _without_seconds(logits, read[0], pairs[:, 0], seconds) if len(pairs) else logits

        handles = [pair.model.embed.register_forward_pre_hook(remember, with_kwargs=True)]
        handles.append(pair.model.unembed.register_forward_hook(ban))
        try:
            with pair.routed("replacement") as model:
                yield model
        finally:
            for handle in handles:
                handle.remove()

    return Variant("words banned", entered)


def _without_seconds(logits: Tensor, read: Tensor, first: Tensor, seconds: Tensor) -> Tensor:
    """Logits at the last positions that were read, without the second token of a pair where the first was read."""
    n = logits.shape[1]
    if logits.shape[0] != read.shape[0] or n > read.shape[1]:
        raise InterventionError(
            f"A phrase can be banned only in passes over whole texts. Tokens of shape {tuple(read.shape)} were read, "
            f"and logits are formed at {tuple(logits.shape[:2])} positions. Run the model on the tokens."
        )
    after = (read[:, -n:, None] == first).float()
    return logits.masked_fill(after @ seconds > 0, -torch.inf)
