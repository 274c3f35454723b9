"""Interventions that need no features: shifted logits, a steering vector, ablated neurons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.evaluation.behaviors import Words, first_tokens
from tl_adapters.interventions.feature_edits import InterventionError
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel


def shifted_logits(words: Words | Sequence[int], by: float) -> Variant:
    """The replacement with a constant added to the words' logits; minus infinity bans the words.

    For phrases it is added to the tokens that begin them, whatever follows (`banned_words` bans whole phrases). It is
    added before the soft cap of a model that has one, so banned words then have the lowest possible logit.
    """

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        change = torch.zeros_like(pair.backend.unembedding()[:, 0])
        change[list(first_tokens(words))] = by

        def shift(module: object, inputs: object, logits: Tensor) -> Tensor:
            return logits + change

        handle = pair.model.unembed.register_forward_hook(shift)
        try:
            with pair.routed("replacement") as model:
                yield model
        finally:
            handle.remove()

    return Variant("words banned" if by == -torch.inf else f"words' logits {by:+.1f}", entered)


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
    order = sorted(range(len(neurons)), key=lambda i: neurons[i])  # by layer
    sizes = Counter(neurons[i][0] for i in order)

    def change(acts: Tensor, hook: HookPoint, index: Tensor, keep: Tensor, put: Tensor) -> Tensor:
        return acts.index_copy(-1, index, acts[..., index] * keep + put)

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        like = pair.model.W_E
        which = torch.tensor([neurons[i] for i in order], dtype=torch.long).reshape(-1, 2).to(like.device)
        share = torch.tensor([last if i == len(neurons) - 1 else 1.0 for i in order]).to(like)
        value = torch.zeros_like(share) if values is None else values.to(like)[which[:, 0], which[:, 1]]
        of_layers = zip(
            sizes, *(t.split(list(sizes.values())) for t in (which[:, 1], 1 - share, share * value)), strict=True
        )
        hooks = [
            (f"blocks.{layer}.mlp.hook_post", partial(change, index=index, keep=keep, put=put))
            for layer, index, keep, put in of_layers
        ]
        with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
            yield model

    return Variant(f"without {len(neurons)} neurons" + ("" if values is None else ", held at their mean"), entered)
