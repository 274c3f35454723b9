"""Where a target does what is studied: moments in its own text, boundaries where it might have and did not.

A *moment* is a position whose next token begins the behaviour ("Wait"). Whatever token stands before a moment marks a
place where the behaviour may come; a *boundary* is such a place in the response where it did not, so moments and
boundaries differ in what the model decided and not in where they stand. A place where something else comes that begins
with the same token ("Hold the", where "Hold on" is studied) is a boundary, too. What *follows* is the text from the
word to the next boundary, a phrase's own later tokens first: a circuit that says "Wait" and cannot go on would break
the answer.

The *log-odds* of the behaviour, log p - log(1 - p), is the margin that everything here is measured on. For words of one
token p is the probability of these tokens. For phrases it is read along the text in the same pass:

* at a moment it is the probability of the whole phrase, the product over its tokens;
* where the text has the first tokens of a phrase and then parts from it, of the phrase up to and with the token at
  which it parts ("Hold" and "on", where the text says "Hold the");
* where the text does not have its first token, of the first token: the most that the phrase's can be.

Target, hybrid and replacement are asked for the same event at every place. Everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from tl_adapters.data.traces import Trace, collate, readable_traces, rows_by_length
from tl_adapters.evaluation.behaviors import Behavior as Behavior
from tl_adapters.evaluation.behaviors import BehaviorError as BehaviorError
from tl_adapters.evaluation.behaviors import Words, first_tokens
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.precision import at_least_float32

FOLLOWS = 24
"""Tokens of what follows a word that are looked at, at most."""


@dataclass(frozen=True)
class Onsets:
    """Texts of one list with the places of a behaviour in them. Rows are documents, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    predicting: Bool[Tensor, "batch pos"]
    """The next token is of the response."""
    onset: Bool[Tensor, "batch pos"]
    """The next token begins the behaviour."""
    control: Bool[Tensor, "batch pos"]
    """The behaviour might begin next and does not."""
    continuation: Bool[Tensor, "batch pos"]
    """The next token goes on with what the behaviour began."""
    words: Words
    """Tokens that are the behaviour, and phrases (tuples of tokens that are it together)."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def elsewhere(self) -> Bool[Tensor, "batch pos"]:
        """Every other place of the response."""
        return self.predicting & ~self.onset & ~self.control & ~self.continuation

    @property
    def next_tokens(self) -> Int[Tensor, "batch pos"]:
        """The next token at every position; at the last one it means nothing."""
        return self.tokens.roll(-1, dims=1)

    @property
    def shared(self) -> int:
        """Boundaries at which something else comes that begins with a token of the behaviour."""
        first = torch.tensor(first_tokens(self.words), dtype=torch.long, device=self.tokens.device)
        return int((self.control & torch.isin(self.next_tokens, first)).sum())

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, as results.json holds it."""
        return {"documents": len(self), "moments": int(self.onset.sum()), "boundaries": int(self.control.sum())}

    def rows(self, index: Tensor | Sequence[int]) -> Onsets:
        """Some of the documents, no wider than the longest of them."""
        index = torch.as_tensor(index)
        used = (self.tokens[index] != 0) | self.predicting[index]
        width = int(used.any(0).nonzero().max()) + 1 if bool(used.any()) else 1
        return self._of(lambda places: places[index, :width])

    def with_onsets(self, n: int | None = None) -> Onsets:
        """The first ``n`` documents that have a moment (all of them, if None), in their order.

        For what is measured at moments and after them alone; where boundaries count, see `with_places`.
        """
        return self.rows(self.onset.any(1).nonzero()[:n, 0])

    def with_onsets_and_controls(self, n: int | None = None) -> Onsets:
        """The first ``n`` documents that have a moment, and of those that have boundaries only as large a part.

        These are taken at even distances; all documents are in their order. So moments and boundaries are there in the
        proportion in which they are in the texts: a boundary counts whether or not its document has a moment.
        """
        here = self.onset.any(1)
        first, others = here.nonzero()[:n, 0], (self.control.any(1) & ~here).nonzero()[:, 0]
        kept = round(len(others) * len(first) / max(1, int(here.sum())))
        spread = torch.arange(kept, device=others.device) * len(others) // max(1, kept)
        return self.rows(torch.cat([first, others[spread]]).sort().values)

    def having(self, kind: str) -> Onsets:
        """All documents that have a place of a kind ("onset", "control", "continuation"), in their order."""
        return self.rows(getattr(self, kind).any(1).nonzero()[:, 0])

    def batches(self, tokens_per_batch: int = 4096) -> Iterator[tuple[list[int], Onsets]]:
        """All documents once, similar lengths together, with their numbers."""
        lengths = ((self.tokens != 0) | self.predicting).long()
        ends = (lengths * torch.arange(1, lengths.shape[1] + 1)).amax(1).tolist()
        for rows in rows_by_length([Trace((1,) * max(1, end), 0) for end in ends], tokens_per_batch):
            yield rows, self.rows(rows)

    def to(self, device: torch.device | str) -> Onsets:
        """The same on another device."""
        return self._of(lambda places: places.to(device))

    def _of(self, change: Callable[[Tensor], Tensor]) -> Onsets:
        places = [change(t) for t in (self.tokens, self.predicting, self.onset, self.control, self.continuation)]
        return Onsets(places[0], places[1], places[2], places[3], places[4], self.words)


def find_onsets(
    pair: PairedModel,
    traces: Sequence[Trace],
    behaviour: Behavior | None = None,
    words: Words | None = None,
) -> Onsets:
    """Moments, matched boundaries and what follows, in texts that the target wrote.

    Args:
        pair: whose tokenizer knows the words.
        traces: the target's own responses (`benchmarks.traces_of`); none of the prompt counts.
        behaviour: hesitation by default.
        words: tokens and phrases that it is, where other texts have told; None asks these.

    Raises BehaviourError where there are no texts, or the tokenizer can write none of the words. A target that never
    does it has no moments, whether words or a function say so.
    """
    behaviour = behaviour or Behavior()
    if not traces:
        raise BehaviorError(
            f"There are no answers to look for {behaviour.name} in: none came to its end. Give more problems, or more "
            "tokens for an answer (max_new_tokens)."
        )
    traces = readable_traces(traces, pair.model.cfg)
    words = tuple(behaviour.tokens(pair, traces).values()) if words is None else tuple(words)
    batch = collate(traces)
    predicting = batch.predicting_response
    onset, inside, said = (torch.zeros_like(predicting) for _ in range(3))
    for row, trace in enumerate(traces):
        for start, stop in behaviour.spans(trace, words):
            said[row, start:stop] = True
            inside[row, start : stop - 1] = True  # the next token is a later one of the phrase
            if start:
                onset[row, start - 1] = True
    onset &= predicting
    # A word right after a word ("Wait wait") is a moment, and makes no mark of the word: what it says would be cut off.
    single = torch.tensor([word for word in words if isinstance(word, int)], dtype=torch.long)
    marks = batch.tokens[onset & ~said & ~torch.isin(batch.tokens, single)].unique()
    inside &= predicting & ~onset
    may_come = ((predicting & torch.isin(batch.tokens, marks)) | onset) & ~inside
    control = may_come & ~onset
    continuation = _following(onset, may_come, predicting) | inside
    return Onsets(batch.tokens, predicting, onset, control, continuation, words)


def _following(onset: Tensor, may_come: Tensor, predicting: Tensor) -> Tensor:
    """From each word to the next place where one may come, `FOLLOWS` tokens at most."""
    continuation, left = torch.zeros_like(onset), torch.zeros(len(onset), dtype=torch.long)
    for place in range(onset.shape[1]):
        left = torch.where(may_come[:, place], torch.zeros_like(left), left)
        continuation[:, place] = (left > 0) & predicting[:, place]
        left = torch.where(onset[:, place], torch.full_like(left, FOLLOWS), (left - 1).clamp(min=0))
    return continuation


def final_residual(pair: PairedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last block, on the present routes and under the present interventions."""
    return pair.run_blocks(pair.embed(tokens), 0, pair.n_layers)


def log_odds(
    pair: PairedModel,
    residual: Float[Tensor, "batch pos d_model"],
    onsets: Onsets,
    at: Bool[Tensor, "batch pos"],
    rows_at_once: int | None = None,
) -> Float[Tensor, "n"]:
    """Log-odds of the behaviour at the chosen places, in nats (see the module's text).

    Args:
        pair: whose unembedding reads the residual stream, under the present interventions.
        residual: after the last block, of the texts of ``moments``.
        moments: the texts, and what the behaviour is in tokens.
        at: the chosen places; each predicts a token of the response.
        rows_at_once: rows of logits that are formed at a time; None is all of them.
    """
    return log_odds_from_logits(lambda rows, places: pair.unembed(residual[rows, places]), onsets, at, rows_at_once)


def log_odds_from_logits(
    logits_at: Callable[[Tensor, Tensor], Tensor],
    onsets: Onsets,
    at: Bool[Tensor, "batch pos"],
    rows_at_once: int | None = None,
) -> Float[Tensor, "n"]:
    """`log_odds`, of logits that a function gives for rows and positions.

    Step by step along the text: with C the tokens that go on from where one is in a phrase and t the token that comes,
    p = p(C without t) + p(t) p', where p' is 1 if t ends a phrase and is read at the next position else.
    """
    rows, places = at.nonzero(as_tuple=True)
    node, steps = torch.zeros_like(rows), list[_Step]()
    edges = _edges(tuple(onsets.words)).to(onsets.tokens.device)
    next_tokens = onsets.next_tokens
    while True:
        if not len(edges):  # every word is one token
            steps.append(_Step(rows, places, node, next_tokens[rows, places], None))
            break
        match = (edges[:, 0] == node[:, None]) & (edges[:, 1] == next_tokens[rows, places][:, None])
        into = (match.any(1) & onsets.predicting[rows, places]).nonzero()[:, 0]
        steps.append(_Step(rows, places, node, next_tokens[rows, places], into))
        if not len(into):
            break
        node = edges[match[into].long().argmax(1), 2]
        rows, places = rows[into], places[into] + 1
    tables = dict[int, Tensor]()

    def said_of(d_vocab: int) -> Tensor:
        """Made on the device once, when the width of the logits is known."""
        if d_vocab not in tables:
            tables[d_vocab] = _said(tuple(onsets.words), d_vocab).to(onsets.tokens.device)
        return tables[d_vocab]

    found = None
    for step in reversed(steps):
        found = step.log_odds(logits_at, said_of, found, rows_at_once)
    assert found is not None
    return found


@dataclass(frozen=True)
class _Step:
    """Places that are equally far in a phrase; each is at a node of the tree of all phrases."""

    rows: Tensor
    places: Tensor
    node: Tensor
    next_tokens: Tensor
    into: Tensor | None
    """Those whose next token leads further into a phrase; None where no phrase has two tokens."""

    def log_odds(
        self,
        logits_at: Callable[[Tensor, Tensor], Tensor],
        said_of: Callable[[int], Tensor],
        further: Tensor | None,
        rows_at_once: int | None,
    ) -> Tensor:
        """Log-odds at these places, given those of ``into`` at the next position."""
        n = len(self.rows)
        goes_on = torch.zeros(n, dtype=torch.bool, device=self.rows.device)
        rest = None
        if self.into is not None and further is not None and len(further):
            goes_on = goes_on.index_fill(0, self.into, True)
            rest = further.new_zeros(n).index_put((self.into,), further)
        found = []
        for part in torch.arange(n, device=self.rows.device).split(max(1, rows_at_once or n)):
            logits = at_least_float32(logits_at(self.rows[part], self.places[part]))
            said = said_of(logits.shape[-1])[self.node[part]]
            inside, outside = logits.masked_fill(~said, -torch.inf), logits.masked_fill(said, -torch.inf)
            if rest is not None:
                token, on, odds = self.next_tokens[part, None], goes_on[part, None], rest[part, None]
                chosen = logits.gather(1, token)
                yes = torch.where(on, chosen + logsigmoid(odds), inside.gather(1, token))
                no = torch.where(on, chosen + logsigmoid(-odds), outside.gather(1, token))
                inside, outside = inside.scatter(1, token, yes), outside.scatter(1, token, no)
            found.append(inside.logsumexp(-1) - outside.logsumexp(-1))
        return torch.cat(found) if found else logits_at(self.rows, self.places)[:, 0]


def _tree(words: Words) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """All phrases as a tree: (node, token) of every token that goes on from a node, and (node, token, node) of those
    that do not end a phrase yet. Node 0 is where nothing has been said; a phrase behind the end of another is left out.
    """
    going, edges, ended = list[tuple[int, int]](), dict[tuple[int, int], int](), set[tuple[int, int]]()
    for phrase in sorted((word if isinstance(word, tuple) else (word,) for word in words), key=len):
        node = 0
        for place, token in enumerate(phrase):
            here = (node, token)
            if here in ended:
                break
            if here not in edges:
                going.append(here)
                if place == len(phrase) - 1:
                    ended.add(here)
                    break
                edges[here] = len(edges) + 1
            node = edges[here]
    return going, [(*here, node) for here, node in edges.items()]


@lru_cache(maxsize=4)
def _said(words: Words, d_vocab: int) -> Bool[Tensor, "nodes d_vocab"]:
    """Of every node, the tokens that go on from there."""
    going, edges = _tree(words)
    said = torch.zeros(len(edges) + 1, d_vocab, dtype=torch.bool)
    for node, token in going:
        said[node, token] = True
    return said


@lru_cache(maxsize=4)
def _edges(words: Words) -> Int[Tensor, "edges 3"]:
    return torch.tensor(_tree(words)[1], dtype=torch.long).reshape(-1, 3)
