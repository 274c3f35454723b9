"""A model that may not say a behavior's words: tokens are banned, and of a phrase one token right after another.

A token alone is banned by its logit. Of a phrase ("Hold on") the first token must stay allowed, since other phrases
begin with it: banned is a later token of it where the one before it in the phrase was just read. Of two tokens that is
the phrase and nothing else. Of more it may be part of other phrases ("on" after "Hold" in "Hold on to"), so that pair
of neighbors is taken that stands least often elsewhere in given texts, and how often it does is said.
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
"""A token and the one after it, to how often they stand in given texts without the phrase that they are of."""


def banned_neighbors(onsets: Onsets) -> Neighbors:
    """Of every phrase, the two neighboring tokens that stand least often in the responses outside of the phrase.

    Of several the first.
    """
    found: Neighbors = {}
    tokens, following = onsets.tokens, onsets.next_tokens
    for phrase in (word for word in onsets.words if isinstance(word, tuple)):
        within = _stands(onsets, phrase)
        elsewhere: Neighbors = {}
        for place, pair in enumerate(pairwise(phrase)):
            here = onsets.predicting & (tokens == pair[0]) & (following == pair[1])
            elsewhere.setdefault(pair, int((here & ~within.roll(place, 1)).sum()))
        best = min(elsewhere, key=elsewhere.__getitem__)
        found[best] = min(elsewhere[best], found.get(best, elsewhere[best]))
    return found


def _stands(onsets: Onsets, phrase: tuple[int, ...]) -> Tensor:
    """Where a phrase begins, its first token included."""
    tokens = onsets.tokens
    here = tokens == phrase[0]
    for i, token in enumerate(phrase[1:], start=1):
        here = here & (tokens.roll(-i, 1) == token) & onsets.predicting.roll(1 - i, 1)
        here[:, tokens.shape[1] - i :] = False
    return here


def banned(words: Words, neighbors: Neighbors) -> Variant:
    """The replacement with single tokens banned, and of neighbors (`banned_neighbors`) the second after the first.

    For generating, and for whole passes. In the block, InterventionError is raised where logits are formed of other
    places than were read: there nothing tells which token stands before.
    """
    single = [word for word in words if isinstance(word, int)]

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        device = pair.model.W_E.device
        pairs = torch.tensor(list(neighbors), dtype=torch.long, device=device).reshape(-1, 2)
        alone = torch.tensor(single, dtype=torch.long, device=device)
        seconds = torch.nn.functional.one_hot(pairs[:, 1], pair.model.cfg.d_vocab).float()
        read: list[Tensor] = []

        def look(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[:] = [next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))]

        def ban(module: object, inputs: object, logits: Tensor) -> Tensor:
            logits = logits.index_fill(-1, alone, -torch.inf)
            return _without_seconds(logits, read[0], pairs[:, 0], seconds) if len(pairs) else logits

        handles = [pair.model.embed.register_forward_pre_hook(look, with_kwargs=True)]
        handles.append(pair.model.unembed.register_forward_hook(ban))
        try:
            with pair.routed("replacement") as model:
                yield model
        finally:
            for handle in handles:
                handle.remove()

    return Variant("words banned", entered)


def _without_seconds(logits: Tensor, read: Tensor, first: Tensor, seconds: Tensor) -> Tensor:
    """Logits of the last places that were read, without the second token of each pair where the first was read."""
    n = logits.shape[1]
    if logits.shape[0] != read.shape[0] or n > read.shape[1]:
        raise InterventionError(
            f"A phrase is banned in passes over whole texts; here tokens of shape {tuple(read.shape)} were read and "
            f"logits of {tuple(logits.shape[:2])} places are formed."
        )
    after = (read[:, -n:, None] == first).float()
    return logits.masked_fill(after @ seconds > 0, -torch.inf)
