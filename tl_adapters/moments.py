"""Where a target does what is studied: moments in its own text, boundaries where it might have and did not.

A *moment* is a position whose next token begins the behaviour ("Wait"). Whatever token stands before a moment marks a
place where the behaviour may come; a *boundary* is such a place in the response where it did not, so moments and
boundaries differ in what the model decided and not in where they stand. What *follows* is the text from the word to
the next boundary: a circuit that says "Wait" and cannot go on would break the answer.

The *log-odds* of the words, log p(words) - log p(all other tokens), is the margin that everything here is measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.data import Trace, collate, rows_by_length
from tl_adapters.errors import UserError
from tl_adapters.paired import PairedModel
from tl_adapters.vocabulary import hesitation_tokens

FOLLOWS = 24
"""Tokens of what follows a word that are looked at, at most."""


class BehaviourError(UserError, ValueError):
    """A behaviour that cannot be studied on this pair or these texts."""


@dataclass(frozen=True)
class Behaviour:
    """What is studied: words that are said, or places that a function finds in a trace."""

    name: str = "hesitation"
    """What results call it."""
    words: tuple[str, ...] = ("Wait",)
    """Words, each in every spelling that is one token (`vocabulary.spellings`); unused where ``find`` is given."""
    find: Callable[[Trace], Sequence[int]] | None = None
    """Of a trace, the positions of tokens that begin the behaviour; the tokens found there are its words."""

    def tokens(self, pair: PairedModel, traces: Sequence[Trace]) -> dict[str, int]:
        """Text to id of every token that begins it. Raises BehaviourError where there is none."""
        tokenizer = pair.model.tokenizer
        if self.find is None:
            found = hesitation_tokens(tokenizer, self.words)
        else:
            ids = {trace.tokens[place] for trace in traces for place in self.find(trace)}
            found = {tokenizer.decode([token]): token for token in sorted(ids)}
        if not found:
            raise BehaviourError(
                f"Nothing begins the behaviour {self.name!r}: none of {', '.join(self.words)} is one token of this "
                "model, or the function found no place; give other words= or another function."
            )
        return found


@dataclass(frozen=True)
class Moments:
    """Texts of one list with the places of a behaviour in them. Rows are documents, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    predicting: Bool[Tensor, "batch pos"]
    """The next token is of the response."""
    moment: Bool[Tensor, "batch pos"]
    """The next token begins the behaviour."""
    boundary: Bool[Tensor, "batch pos"]
    """The behaviour might begin next and does not."""
    follows: Bool[Tensor, "batch pos"]
    """The next token goes on with what the behaviour began."""
    words: tuple[int, ...]
    """Tokens that begin the behaviour."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def elsewhere(self) -> Bool[Tensor, "batch pos"]:
        """Every other place of the response."""
        return self.predicting & ~self.moment & ~self.boundary & ~self.follows

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, as results.json holds it."""
        return {"documents": len(self), "moments": int(self.moment.sum()), "boundaries": int(self.boundary.sum())}

    def rows(self, index: Tensor | Sequence[int]) -> Moments:
        """Some of the documents, no wider than the longest of them."""
        index = torch.as_tensor(index)
        used = (self.tokens[index] != 0) | self.predicting[index]
        width = int(used.any(0).nonzero().max()) + 1 if bool(used.any()) else 1
        return self._of(lambda places: places[index, :width])

    def with_moments(self, n: int | None = None) -> Moments:
        """The first ``n`` documents that have a moment (all of them, if None), in their order."""
        return self.rows(self.moment.any(1).nonzero()[:n, 0])

    def batches(self, tokens_per_batch: int = 4096) -> Iterator[tuple[list[int], Moments]]:
        """All documents once, similar lengths together, with their numbers."""
        lengths = ((self.tokens != 0) | self.predicting).long()
        ends = (lengths * torch.arange(1, lengths.shape[1] + 1)).amax(1).tolist()
        for rows in rows_by_length([Trace((1,) * max(1, end), 0) for end in ends], tokens_per_batch):
            yield rows, self.rows(rows)

    def to(self, device: torch.device | str) -> Moments:
        """The same on another device."""
        return self._of(lambda places: places.to(device))

    def _of(self, change: Callable[[Tensor], Tensor]) -> Moments:
        places = [change(t) for t in (self.tokens, self.predicting, self.moment, self.boundary, self.follows)]
        return Moments(places[0], places[1], places[2], places[3], places[4], self.words)


def find_moments(
    pair: PairedModel,
    traces: Sequence[Trace],
    behaviour: Behaviour | None = None,
    words: Sequence[int] | None = None,
) -> Moments:
    """Moments, matched boundaries and what follows, in texts that the target wrote.

    Args:
        pair: whose tokenizer knows the words.
        traces: the target's own responses (`benchmarks.traces_of`); none of the prompt counts.
        behaviour: hesitation by default.
        words: tokens that begin it, where other texts have told; None asks these.

    Raises BehaviourError where no token begins the behaviour. A target that never does it has no moments.
    """
    behaviour = behaviour or Behaviour()
    words = tuple(behaviour.tokens(pair, traces).values()) if words is None else tuple(words)
    batch = collate(traces)
    predicting, coming = batch.predicting_response, torch.zeros_like(batch.tokens)
    coming[:, :-1] = batch.tokens[:, 1:]
    if behaviour.find is None:
        moment = predicting & torch.isin(coming, torch.tensor(words))
    else:
        moment = torch.zeros_like(predicting)
        for row, trace in enumerate(traces):
            moment[row, [place - 1 for place in behaviour.find(trace) if place >= trace.prompt_length]] = True
        moment &= predicting
    # A word right after a word ("Wait wait") is a moment, and makes no mark of the word: what it says would be cut off.
    marks = batch.tokens[moment & ~torch.isin(batch.tokens, torch.tensor(words))].unique()
    may_come = predicting & (torch.isin(batch.tokens, marks) | moment)
    boundary = may_come & ~moment & ~torch.isin(coming, torch.tensor(words))
    return Moments(batch.tokens, predicting, moment, boundary, _following(moment, may_come, predicting), words)


def _following(moment: Tensor, may_come: Tensor, predicting: Tensor) -> Tensor:
    """From each word to the next place where one may come, `FOLLOWS` tokens at most."""
    follows, left = torch.zeros_like(moment), torch.zeros(len(moment), dtype=torch.long)
    for place in range(moment.shape[1]):
        left = torch.where(may_come[:, place], torch.zeros_like(left), left)
        follows[:, place] = (left > 0) & predicting[:, place]
        left = torch.where(moment[:, place], torch.full_like(left, FOLLOWS), (left - 1).clamp(min=0))
    return follows


def log_odds(logits: Float[Tensor, "*batch d_vocab"], words: Sequence[int]) -> Float[Tensor, "*batch"]:
    """log p(words) - log p(all other tokens), in nats."""
    said = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    said[list(words)] = True
    inside, outside = logits.masked_fill(~said, -torch.inf), logits.masked_fill(said, -torch.inf)
    return inside.logsumexp(-1) - outside.logsumexp(-1)


def final_residual(pair: PairedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last block, on the present routes and under the present interventions."""
    return pair.run_blocks(pair.embed(tokens), 0, pair.n_layers)


def margins(pair: PairedModel, moments: Moments, at: Bool[Tensor, "batch pos"]) -> Float[Tensor, "n"]:
    """Log-odds of the words at the chosen places, on the present routes."""
    return log_odds(pair.unembed(final_residual(pair, moments.tokens)[at]), moments.words)
