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
    """The replacement with the words' logits changed by so much; minus infinity bans them.

    Of phrases it is the tokens that begin them, whatever comes after these (`banning` bans the phrases).
    The change comes before a soft cap, where the model has one: banned words then have the lowest logit there is.
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
    """The replacement with a direction taken off the residual stream after a layer.

    Args:
        layer: after which.
        direction: what is taken off.
        coefficient: so many times.
        after: token ids at which it is taken off; None takes it off everywhere.

    In the block, InterventionError is raised where the tokens are chosen and none of this shape were embedded.
    """

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        taken = (coefficient * direction).to(pair.model.W_E)
        with _tokens_seen(pair, after) as chosen:

            def take_off(resid: Tensor, hook: HookPoint) -> Tensor:
                return resid - taken if after is None else resid - chosen(resid)[..., None] * taken

            hooks = [(f"blocks.{layer}.hook_resid_post", take_off)]
            with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
                yield model

    where = "" if after is None else ", where the word may come"
    return Variant(f"steered at layer {layer}, {coefficient:g} times{where}", entered)


@contextmanager
def _tokens_seen(pair: PairedModel, after: Sequence[int] | None) -> Iterator[Any]:
    """Of a residual stream, where the token that was embedded for it is one of ``after``: 1, elsewhere 0."""
    if after is None:
        yield None
        return
    wanted = torch.tensor(list(after), dtype=torch.long, device=pair.model.W_E.device)
    seen: list[Tensor] = []

    def look(module: object, args: tuple[Tensor, ...]) -> None:
        seen[:] = [torch.isin(args[0], wanted)]

    def chosen(resid: Tensor) -> Tensor:
        if not seen or seen[0].shape != resid.shape[:-1]:
            raise InterventionError(
                "Steering at chosen tokens has seen no tokens of this shape; embed them (`PairedModel.embed`) before "
                "blocks are run from a residual stream."
            )
        return seen[0].to(resid.dtype)

    handle = pair.model.embed.register_forward_pre_hook(look)
    try:
        yield chosen
    finally:
        handle.remove()


def without_neurons(
    neurons: Sequence[tuple[int, int]],
    held: Float[Tensor, "n_layers d_mlp"] | None = None,
    last: float = 1.0,
) -> Variant:
    """The replacement with neurons of the base's MLPs off.

    Args:
        neurons: layer and index of each.
        held: what the activations become; None is 0.
        last: the share by which the last of them is changed, so that their number can be set finely.
    """
    order = sorted(range(len(neurons)), key=lambda i: neurons[i])  # by layer
    sizes = Counter(neurons[i][0] for i in order)

    def change(acts: Tensor, hook: HookPoint, index: Tensor, kept: Tensor, instead: Tensor) -> Tensor:
        return acts.index_copy(-1, index, acts[..., index] * kept + instead)

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        like = pair.model.W_E
        which = torch.tensor([neurons[i] for i in order], dtype=torch.long).reshape(-1, 2).to(like.device)
        share = torch.tensor([last if i == len(neurons) - 1 else 1.0 for i in order]).to(like)
        value = torch.zeros_like(share) if held is None else held.to(like)[which[:, 0], which[:, 1]]
        of_layers = zip(
            sizes, *(t.split(list(sizes.values())) for t in (which[:, 1], 1 - share, share * value)), strict=True
        )
        hooks = [
            (f"blocks.{layer}.mlp.hook_post", partial(change, index=index, kept=kept, instead=instead))
            for layer, index, kept, instead in of_layers
        ]
        with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
            yield model

    return Variant(f"without {len(neurons)} neurons" + ("" if held is None else ", held at their mean"), entered)
