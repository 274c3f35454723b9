"""Which features make a target say a word: a greedy search that asks for necessity and sufficiency at once.

Every feature has a gate. The circuit S has three aims, each a number over texts of the select split:

1. *necessity*: softplus(margin + 2) at the moments, in the replacement without S. The circuit taken away, the word is
   not to come (the 2 keeps pressing until its probability is well below a half);
2. *sufficiency*: cross-entropy of saying the word or not, at moments and matched boundaries, against the target's
   probability, in the hybrid with S added ``strength`` times. It is to come where the target says it, and only there;
3. *continuation*: KL(target || hybrid + S) over what follows the word. Without it the hybrid says "Wait" and closes its
   thinking: the word comes and the answer breaks.

The margin is the log-odds of the behaviour (`moments`): of a phrase those of all its tokens, so that a feature that
raises its second token counts as one that raises its first. Where another phrase comes that begins alike, it is not to
come.

What is left is their weighted sum, in nats. Each round scores every alive feature by what it would still take off it
*given what is in S*: minus the gradient with respect to its gate. The best ``per_round`` join S, until S is as large as
asked for. So copies of what is in S already, which have a large effect of their own, are not taken again: a ranking by
effect alone takes them all.

The order in which features joined is kept: the first n of it are the circuit of size n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.onsets import Onsets, final_residual, log_odds
from tl_adapters.evaluation.behaviors import BehaviorError
from tl_adapters.interventions.feature_edits import gated
from tl_adapters.models.paired_model import PairedModel, adapters_in_float32
from tl_adapters.utils.precision import at_least_float32


@dataclass(frozen=True)
class SearchOptions:
    """How a circuit is searched."""

    share: float = 0.03
    """Size of the circuit, as a share of the alive features."""
    further: float = 1.5
    """The search goes on to so many times as many features, so that it is seen what a larger circuit would do."""
    per_round: int = 3
    """Features that join in a round; fewer is slower and repeats less."""
    strength: float = 1.75
    """Factor of the circuit's activations where it is added to the hybrid: a small part of what fires there in the
    replacement has to do the work of all."""
    necessity: float = 1.0
    """Weight of the word not coming without the circuit."""
    sufficiency: float = 0.3
    """Weight of the word coming with it, where the target says it and nowhere else."""
    continuation: float = 4.0
    """Weight of what follows the word. With a quarter of it answers of the hybrid break, on the built-in pair."""
    documents: int = 120
    """Documents with a moment that are read in a round; those with boundaries only are read in proportion."""
    tokens_per_batch: int = 4096
    """In a forward pass."""

    def __post_init__(self) -> None:
        counts = min(self.further, self.per_round, self.documents)
        if not 0 < self.share <= 1 or counts < 1 or self.strength <= 0:
            raise BehaviorError(
                f"Got {self}; share is above 0 and at most 1, further, per_round and documents are at least 1, and "
                "strength is above 0."
            )


@dataclass(frozen=True)
class Aims:
    """What is left of the three aims, with some features in the circuit."""

    n: int
    """Features in the circuit."""
    necessity: float
    """Mean softplus(margin + 2) at the moments, in the replacement without the circuit."""
    sufficiency: float
    """Cross-entropy of the word in the hybrid with the circuit, in nats per place."""
    continuation: float
    """KL over what follows the word, in nats per token."""


@dataclass(frozen=True)
class Search:
    """What a search found."""

    order: tuple[FeatureId, ...]
    """The circuit: features in the order in which they joined."""
    further: tuple[FeatureId, ...]
    """Those that would have joined next."""
    aims: tuple[Aims, ...]
    """What was left before every round, and at the end."""


class _Reference:
    """What the target says, and what the hybrid would: read once, asked in every round."""

    @torch.no_grad()
    def __init__(self, pair: PairedModel, batch: Onsets) -> None:
        self.batch = batch.to(pair.model.W_E.device)
        self.places = self.batch.onset | self.batch.control
        with pair.routed("target"):
            residual = final_residual(pair, self.batch.tokens)
        self.said = log_odds(pair, residual, self.batch, self.places).sigmoid()
        self.goes_on = at_least_float32(pair.unembed(residual[self.batch.continuation])).log_softmax(-1)


@adapters_in_float32
def search_circuit(
    pair: PairedModel,
    onsets: Onsets,
    alive: Bool[Tensor, "n_layers n_features"],
    options: SearchOptions | None = None,
    progress: bool = True,
) -> Search:
    """Find the features that say the words (see the module's text).

    Args:
        pair: with adapters on every layer.
        moments: of the select split.
        alive: features that may be taken.
        options: size and weights.
        progress: show a bar.

    Raises BehaviourError where there is no moment: a target that never does it has no circuit.
    """
    options = options or SearchOptions()
    if not bool(onsets.onset.any()):
        raise BehaviorError("There is no moment in these texts, so there is nothing to find a circuit of.")
    texts = onsets.with_onsets_and_controls(options.documents)
    references = [_Reference(pair, batch) for _, batch in texts.batches(options.tokens_per_batch)]
    size, every = (_size(alive, options.share * times) for times in (1.0, options.further))
    chosen, order, aims = torch.zeros_like(alive), list[int](), list[Aims]()
    flat_alive = alive.flatten()
    with _gates_alone(pair), tqdm(total=every, desc="circuit", unit=" features", disable=not progress) as bar:
        while True:
            score, left = _score(pair, references, chosen, options)
            aims.append(left)
            if len(order) == every:
                break
            room = (size if len(order) < size else every) - len(order)  # the circuit is whole before more join
            open_to = flat_alive & ~chosen.flatten()
            best = score.flatten().masked_fill(~open_to, -torch.inf).topk(min(options.per_round, room))
            order += best.indices.tolist()
            chosen.view(-1)[best.indices] = True
            bar.update(len(best.indices))
    n = alive.shape[1]
    found = [FeatureId(i // n, i % n) for i in order]
    return Search(tuple(found[:size]), tuple(found[size:]), tuple(aims))


def _size(alive: Tensor, share: float) -> int:
    return min(max(1, round(share * int(alive.sum()))), int(alive.sum()))


def _score(
    pair: PairedModel, references: Sequence[_Reference], chosen: Tensor, options: SearchOptions
) -> tuple[Float[Tensor, "n_layers n_features"], Aims]:
    """What each feature would still take off the weighted sum, and what is left of every aim."""
    counts = [
        max(1, sum(int(places.sum()) for places in kind))
        for kind in zip(*((r.batch.onset, r.places, r.batch.continuation) for r in references), strict=True)
    ]
    weights = (options.necessity, options.sufficiency, options.continuation)
    score, left = torch.zeros(chosen.shape), [0.0, 0.0, 0.0]
    for reference in references:
        joined = chosen.float().to(reference.said.device).requires_grad_()
        with torch.enable_grad():
            sums = _aims(pair, reference, joined, options.strength)
            weighted = torch.stack([w / n * s for w, n, s in zip(weights, counts, sums, strict=True)]).sum()
            score -= torch.autograd.grad(weighted, joined)[0].cpu()
        left = [so_far + float(s.detach()) / n for so_far, n, s in zip(left, counts, sums, strict=True)]
    return score, Aims(int(chosen.sum()), *left)


def _aims(
    pair: PairedModel, reference: _Reference, joined: Float[Tensor, "n_layers n_features"], strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each aim, summed over its places, with S as far in as ``joined`` says (0 to 1)."""
    batch = reference.batch
    with gated(pair, dict(enumerate(1 - joined))):
        odds = log_odds(pair, final_residual(pair, batch.tokens), batch, batch.onset)
        necessity = F.softplus(odds + 2).sum()
    with gated(pair, dict(enumerate(joined * strength)), decoder_bias=False):
        residual = final_residual(pair, batch.tokens)
        odds = log_odds(pair, residual, batch, reference.places)
        sufficiency = (F.softplus(odds) - reference.said * odds).sum()
        going_on = at_least_float32(pair.unembed(residual[batch.continuation])).log_softmax(-1)
        continuation = (reference.goes_on.exp() * (reference.goes_on - going_on)).sum()
    return necessity, sufficiency, continuation


@contextmanager
def _gates_alone(pair: PairedModel) -> Iterator[Any]:
    """Adapters take no gradient here: only gates do."""
    parameters = [p for p in pair.installed_adapters().parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
