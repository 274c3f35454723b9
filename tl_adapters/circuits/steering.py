"""Interventions that need no features: shifted logits, banned words, a steering vector, neurons, low rank.

A single token is banned by its logit. The first token of a phrase ("Hold on") must stay allowed, because other phrases
begin with it. So a later token of the phrase is banned where the token before it in the phrase was just read. For two
tokens that bans the phrase and nothing else. For more tokens the pair may occur in other phrases ("on" after "Hold" in
"Hold on to"), so the pair of neighbors is taken that occurs least often elsewhere in given texts, and that number is
recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.circuits.onsets import Onsets
from tl_adapters.evaluation.behaviors import Phrases, first_tokens
from tl_adapters.interventions.feature_edits import InterventionError
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.arguments import token_ids
from tl_adapters.utils.renamed import renamed_arguments

Neighbors = dict[tuple[int, int], int]
"""(token, next token) of a phrase -> how often the pair occurs in given texts outside of the phrase."""


# -- logits -------------------------------------------------------------------------------------------------------


@renamed_arguments(words="phrases")
def shifted_logits(phrases: Phrases | Sequence[int], by: float) -> Variant:
    """The replacement with a constant added to the logits of tokens; minus infinity bans them.

    For phrases it is added to the tokens that begin them, whatever follows (`banned` bans whole phrases). It is
    added before the soft cap of a model that has one, so banned words then have the lowest possible logit.

    Args:
        phrases: ids of tokens, and phrases of tokens, such as `Onsets.phrases`.
        by: the constant.

    Where the variant is entered, it raises PairMismatchError if a layer has no adapter, and ArgumentError for token ids
    outside the model's vocabulary.
    """

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        change = torch.zeros_like(pair.backend.unembedding()[:, 0])
        change[token_ids(first_tokens(phrases), len(change), "phrases")] = by

        def shift(module: object, inputs: object, logits: Tensor) -> Tensor:
            return logits + change

        handle = pair.model.unembed.register_forward_hook(shift)
        try:
            with pair.routed("replacement") as model:
                yield model
        finally:
            handle.remove()

    return Variant("words banned" if by == -torch.inf else f"words' logits {by:+.1f}", entered)


def banned_neighbors(onsets: Onsets) -> Neighbors:
    """Return, for every phrase, the first of its neighboring tokens that occur least often outside of the phrase."""
    rarest: Neighbors = {}
    tokens, following = onsets.tokens, onsets.next_tokens
    for phrase in (phrase for phrase in onsets.phrases if isinstance(phrase, tuple)):
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


def banned(phrases: Phrases, neighbors: Neighbors) -> Variant:
    """The replacement with single tokens banned, and of neighbors (`banned_neighbors`) the second after the first.

    It works in generation and in whole passes. Where logits are formed at other positions than tokens were read,
    InterventionError is raised, because the token before them is not known.
    """
    single = [phrase for phrase in phrases if isinstance(phrase, int)]

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


# -- activations --------------------------------------------------------------------------------------------------


def steered(
    layer: int, direction: Float[Tensor, "d_model"], coefficient: float, after: Sequence[int] | None = None
) -> Variant:
    """The replacement with a direction subtracted from the residual stream after a layer.

    Args:
        layer: the layer after which it is subtracted.
        direction: the direction.
        coefficient: factor of the direction.
        after: ids of the tokens at whose positions it is subtracted; None subtracts it at every position.

    Where ``after`` is given, a pass from a residual stream whose tokens were not embedded raises InterventionError.
    """

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        scaled = (coefficient * direction).to(pair.model.W_E)
        with _tokens_seen(pair, after) as chosen:

            def subtract(resid: Tensor, hook: HookPoint) -> Tensor:
                return resid - scaled if after is None else resid - chosen(resid)[..., None] * scaled

            hooks = [(f"blocks.{layer}.hook_resid_post", subtract)]
            with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
                yield model

    where = "" if after is None else ", where the word may come"
    return Variant(f"steered at layer {layer}, {coefficient:g} times{where}", entered)


@contextmanager
def _tokens_seen(pair: PairedModel, after: Sequence[int] | None) -> Iterator[Any]:
    """Yield a function from a residual stream to 1 where its embedded token is one of ``after``, and 0 elsewhere."""
    if after is None:
        yield None
        return
    wanted = torch.tensor(list(after), dtype=torch.long, device=pair.device)
    seen: list[Tensor] = []

    def remember(module: object, args: tuple[Tensor, ...]) -> None:
        seen[:] = [torch.isin(args[0], wanted)]

    def chosen(resid: Tensor) -> Tensor:
        if not seen or seen[0].shape != resid.shape[:-1]:
            raise InterventionError(
                "Steering at chosen tokens has seen no tokens of this shape. Embed them with PairedModel.embed before "
                "running blocks from a residual stream."
            )
        return seen[0].to(resid.dtype)

    handle = pair.model.embed.register_forward_pre_hook(remember)
    try:
        yield chosen
    finally:
        handle.remove()


def without_neurons(
    neurons: Sequence[tuple[int, int]],
    values: Float[Tensor, "n_layers d_mlp"] | None = None,
    last: float = 1.0,
) -> Variant:
    """The replacement with activations of neurons of the base's MLPs set to zero or to other values.

    Args:
        neurons: layer and index of each neuron.
        values: the values of all neurons; None sets them to zero.
        last: the extent to which the last neuron is changed (0 to 1), so that their number can be set finely.
    """

    def change(acts: Tensor, hook: HookPoint, index: Tensor, keep: Tensor, put: Tensor) -> Tensor:
        return acts.index_copy(-1, index, acts[..., index] * keep + put)

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        like, hooks = pair.model.W_E, []
        held = None if values is None else values.to(like)
        for layer, (index, extent) in _extents_by_layer(neurons, last, like).items():
            put = torch.zeros_like(extent) if held is None else extent * held[layer, index]
            hooks.append((f"blocks.{layer}.mlp.hook_post", partial(change, index=index, keep=1 - extent, put=put)))
        with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
            yield model

    return Variant(f"without {len(neurons)} neurons" + ("" if values is None else ", held at their mean"), entered)


def without_directions(directions: Sequence[tuple[int, Float[Tensor, "d_model"]]], last: float = 1.0) -> Variant:
    """The replacement whose adapters write nothing along some directions of the residual stream (low rank).

    Args:
        directions: of each the layer, and a unit vector; those of one layer are orthonormal.
        last: the extent to which the last direction is removed (0 to 1), so that their number can be set finely.
    """
    places = [(layer, i) for i, (layer, _) in enumerate(directions)]

    def remove(written: Tensor, hook: HookPoint, basis: Tensor, extent: Tensor) -> Tensor:
        return written - (written @ basis.T * extent) @ basis

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        like, hooks = pair.model.W_E, []
        vectors = torch.stack([direction for _, direction in directions]).to(like) if directions else like[:0]
        for layer, (index, extent) in _extents_by_layer(places, last, like).items():
            hook = partial(remove, basis=vectors[index], extent=extent)
            hooks.append((f"blocks.{layer}.mlp.hook_adapter_out", hook))
        with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
            yield model

    return Variant(f"adapters without {len(directions)} directions", entered)


def _extents_by_layer(
    chosen: Sequence[tuple[int, int]], last: float, like: Tensor
) -> dict[int, tuple[Int[Tensor, "n"], Float[Tensor, "n"]]]:
    """Layer -> the indices that are chosen in it, and the extent of each: 1, and ``last`` for the last of all.

    They are copied to the device of ``like`` at once for all layers.
    """
    order = sorted(range(len(chosen)), key=lambda i: chosen[i][0])
    sizes = Counter(chosen[i][0] for i in order)
    index = torch.tensor([chosen[i][1] for i in order], dtype=torch.long).to(like.device)
    extent = torch.tensor([last if i == len(chosen) - 1 else 1.0 for i in order]).to(like)
    parts = (part.split(list(sizes.values())) for part in (index, extent))
    return dict(zip(sizes, zip(*parts, strict=True), strict=True))
