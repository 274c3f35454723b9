"""Onsets of a behavior in the target's own text, matched control positions, and the log-odds of the behavior there.

An *onset* is a position whose next token begins the behavior ("Wait"). Tokens that stand before onsets mark where the
behavior may begin. A *matched control position* has such a token and the behavior does not begin there, so onsets and
controls differ in what the model decided and not in the token they stand on. A position before something else that
begins with the same token ("Hold the", where "Hold on" is studied) is a control position too. The *continuation* is the
text from the onset to the next onset or control position; it starts with a phrase's own later tokens. It is measured
because a circuit that says "Wait" and cannot go on would break the answer.

All effects are measured on the *log-odds* of the behavior, log p - log(1 - p), in nats. For words of one token p is the
probability of these tokens. For phrases it is read along the text in one forward pass:

* at an onset it is the probability of the whole phrase, the product over its tokens;
* where the text has the first tokens of a phrase and then differs from it, p is the probability of the phrase up to and
  with the token at which they differ ("Hold" and "on", where the text says "Hold the");
* where the text does not have the first token of a phrase, p is the probability of that token: an upper bound on the
  phrase's.

So target, hybrid and replacement are compared on the same event at every position. Everything is computed in float32 at
least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from tl_adapters.data.traces import Trace, collate, readable_traces, rows_by_length
from tl_adapters.evaluation.behaviors import Behavior as Behavior
from tl_adapters.evaluation.behaviors import BehaviorError as BehaviorError
from tl_adapters.evaluation.behaviors import GivenBehavior, Phrases, first_tokens
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_model import kept_per_token
from tl_adapters.utils.arguments import choice
from tl_adapters.utils.notebook import ResultRecord
from tl_adapters.utils.precision import at_least_float32
from tl_adapters.utils.renamed import renamed_arguments, renamed_attributes

MAX_CONTINUATION_TOKENS = 24
"""Largest number of tokens of a continuation."""
MOST_KEPT_BYTES = 2 * 10**9
"""Most bytes that a forward pass keeps of its blocks for a gradient; above it, blocks are computed again."""


@renamed_attributes(
    moment="onset",
    boundary="control",
    follows="continuation",
    coming="next_tokens",
    with_moments="with_onsets",
    with_places="with_onsets_and_controls",
    words="phrases",
)
@dataclass(frozen=True)
class Onsets(ResultRecord):
    """Texts with the positions of a behavior in them. Rows are documents, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    predicting: Bool[Tensor, "batch pos"]
    """The next token belongs to the response."""
    onset: Bool[Tensor, "batch pos"]
    """The next token begins the behavior."""
    control: Bool[Tensor, "batch pos"]
    """Matched control positions: the behavior might begin next and does not."""
    continuation: Bool[Tensor, "batch pos"]
    """The next token continues what the behavior began."""
    phrases: Phrases
    """Tokens each of which is the behavior, and phrases (tuples of tokens)."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        n = self.row()
        return f"Onsets: {n['onsets']:,} onsets and {n['controls']:,} matched controls in {n['documents']:,} documents"

    def row(self) -> dict[str, Any]:
        """The numbers of documents, onsets, control positions and continuation tokens."""
        masks = {"onsets": self.onset, "controls": self.control, "continuation tokens": self.continuation}
        return {"documents": len(self), **{name: int(mask.sum()) for name, mask in masks.items()}}

    def to_dict(self) -> dict[str, Any]:
        """`row` as JSON values, without the texts."""
        return self.row()

    @property
    def elsewhere(self) -> Bool[Tensor, "batch pos"]:
        """All other positions of the response."""
        return self.predicting & ~self.onset & ~self.control & ~self.continuation

    @property
    def away_from_onsets(self) -> Bool[Tensor, "batch pos"]:
        """Positions at which a condition should change nothing: the response without onsets and continuations.

        Matched control positions are among them: the behavior may begin there and does not, and that should stay so.
        """
        return self.predicting & ~self.onset & ~self.continuation

    @property
    def next_tokens(self) -> Int[Tensor, "batch pos"]:
        """The next token at every position; undefined at the last one."""
        return self.tokens.roll(-1, dims=1)

    @property
    def controls_beginning_alike(self) -> int:
        """Control positions at which something else comes that begins with a token of the behavior."""
        first = torch.tensor(first_tokens(self.phrases), dtype=torch.long, device=self.tokens.device)
        return int((self.control & torch.isin(self.next_tokens, first)).sum())

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of documents, onsets and control positions, by their keys in results.json."""
        return {"documents": len(self), "moments": int(self.onset.sum()), "boundaries": int(self.control.sum())}

    def rows(self, index: Tensor | Sequence[int]) -> Onsets:
        """Return some of the documents, no wider than the longest of them."""
        index = torch.as_tensor(index)
        used = (self.tokens[index] != 0) | self.predicting[index]
        width = int(used.any(0).nonzero().max()) + 1 if bool(used.any()) else 1
        return self._of(lambda tensor: tensor[index, :width])

    def with_onsets(self, *, n: int | None = None) -> Onsets:
        """Return the first ``n`` documents that have an onset (all of them, if None), in their order.

        This is for measurements at onsets and continuations; `with_onsets_and_controls` keeps controls in proportion.
        """
        return self.rows(self.onset.any(1).nonzero()[:n, 0])

    def with_onsets_and_controls(self, *, n: int | None = None) -> Onsets:
        """Return the first ``n`` documents that have an onset, and as large a part of those that have only controls.

        The latter are taken at even distances, and all documents keep their order. So onsets and control positions stay
        in the proportion in which the texts have them, whether or not the document of a control has an onset.
        """
        has_onset = self.onset.any(1)
        first, others = has_onset.nonzero()[:n, 0], (self.control.any(1) & ~has_onset).nonzero()[:, 0]
        n_others = round(len(others) * len(first) / max(1, int(has_onset.sum())))
        spread = torch.arange(n_others, device=others.device) * len(others) // max(1, n_others)
        return self.rows(torch.cat([first, others[spread]]).sort().values)

    def having(self, kind: str) -> Onsets:
        """Return the documents that have a position of a kind ("onset", "control", "continuation"), in their order.

        Raises ArgumentError for another kind.
        """
        return self.rows(self._positions(kind).any(1).nonzero()[:, 0])

    def cut_after(self, kind: str, *others: str) -> Onsets:
        """Return the documents, each without the text after its last position of these kinds.

        The tokens of a phrase that may begin there stay. A model reads forwards, so at these positions nothing changes.

        Args:
            kind, others: "onset", "control", "continuation".

        Raises ArgumentError for another kind.
        """
        used = torch.stack([self._positions(each) for each in (kind, *others)]).any(0)
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        longest = max((len(phrase) for phrase in self.phrases if isinstance(phrase, tuple)), default=1)
        length = (used * (position + 1)).amax(1, keepdim=True) + longest
        read, predicts = position < length, position < length - 1
        onset, control, continuation = (mask & predicts for mask in (self.onset, self.control, self.continuation))
        tokens, predicting = torch.where(read, self.tokens, 0), self.predicting & predicts
        cut = Onsets(tokens, predicting, onset, control, continuation, self.phrases)
        return cut.rows(torch.arange(len(self), device=self.tokens.device))

    def batches(self, *, tokens_per_batch: int = 4096) -> Iterator[tuple[list[int], Onsets]]:
        """Yield every document once, documents of similar length together, with their row numbers."""
        lengths = ((self.tokens != 0) | self.predicting).long()
        ends = (lengths * torch.arange(1, lengths.shape[1] + 1)).amax(1).tolist()
        for rows in rows_by_length([Trace((1,) * max(1, end), 0) for end in ends], tokens_per_batch):
            yield rows, self.rows(rows)

    def _positions(self, kind: str) -> Bool[Tensor, "batch pos"]:
        choice(kind, ("onset", "control", "continuation"), "kind")
        return getattr(self, kind)

    def to(self, device: torch.device | str) -> Onsets:
        """Return the same on another device."""
        return self._of(lambda tensor: tensor.to(device))

    def _of(self, change: Callable[[Tensor], Tensor]) -> Onsets:
        fields = (self.tokens, self.predicting, self.onset, self.control, self.continuation)
        tokens, predicting, onset, control, continuation = map(change, fields)
        return Onsets(tokens, predicting, onset, control, continuation, self.phrases)


@renamed_arguments(words="phrases")
def find_onsets(
    pair: PairedModel,
    traces: Sequence[Trace],
    behavior: GivenBehavior = None,
    phrases: Phrases | None = None,
) -> Onsets:
    """Find onsets, matched control positions and continuations in texts that the target wrote.

    Args:
        pair: its tokenizer gives the tokens of the words.
        traces: the target's own responses (`generation.responses.traces_of`); the prompt is left out.
        behavior: a behavior, a word or phrase that the target says, or several; None is hesitation (`Behavior.of`).
        phrases: tokens of the behavior, and phrases of tokens, where other texts determined them; None determines them
            from these.

    A target that never shows the behavior has no onsets, whether words or a function define it.

    Raises:
        BehaviorError: there are no texts, the tokenizer can write none of the words, or the function of the behavior
            returns something that is not a position.
        ArgumentError, DataError: ``traces`` holds something else than traces, or one that the model cannot read.
        VocabularyError: words are to be looked up, and there is no tokenizer, or a word has spaces around it.
    """
    behavior = Behavior.of(behavior)
    if not traces:
        raise BehaviorError(
            f"There are no complete answers in which to look for {behavior.name}. Give more problems, or a higher "
            "limit for an answer (max_new_tokens)."
        )
    traces = readable_traces(traces, pair.model.cfg)
    phrases = tuple(behavior.tokens(pair, traces).values()) if phrases is None else tuple(phrases)
    batch = collate(traces)
    predicting = batch.predicting_response
    onset, inside, covered = (torch.zeros_like(predicting) for _ in range(3))
    for row, trace in enumerate(traces):
        for start, stop in behavior.spans(trace, phrases):
            covered[row, start:stop] = True
            inside[row, start : stop - 1] = True  # the next token is a later token of the phrase
            if start:
                onset[row, start - 1] = True
    onset &= predicting
    # A word right after a word ("Wait wait") is an onset. The word is not a mark, for continuations would end at once.
    single = torch.tensor([phrase for phrase in phrases if isinstance(phrase, int)], dtype=torch.long)
    marks = batch.tokens[onset & ~covered & ~torch.isin(batch.tokens, single)].unique()
    inside &= predicting & ~onset
    may_begin = ((predicting & torch.isin(batch.tokens, marks)) | onset) & ~inside
    control = may_begin & ~onset
    continuation = _continuations(onset, may_begin, predicting) | inside
    return Onsets(batch.tokens, predicting, onset, control, continuation, phrases)


def _continuations(onset: Tensor, may_begin: Tensor, predicting: Tensor) -> Tensor:
    """From each onset to the next position where one may be, `MAX_CONTINUATION_TOKENS` tokens at most."""
    continuation, left = torch.zeros_like(onset), torch.zeros(len(onset), dtype=torch.long)
    for position in range(onset.shape[1]):
        left = torch.where(may_begin[:, position], torch.zeros_like(left), left)
        continuation[:, position] = (left > 0) & predicting[:, position]
        left = torch.where(onset[:, position], torch.full_like(left, MAX_CONTINUATION_TOKENS), (left - 1).clamp(min=0))
    return continuation


def final_residual(pair: PairedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """Return the residual stream after the last block, on the present routes and under the present interventions.

    Where a gradient would keep more than `MOST_KEPT_BYTES`, the backward pass computes every block again, so it has to
    run on the same routes and under the same interventions.
    """
    large = (
        torch.is_grad_enabled() and tokens.numel() * pair.n_layers * kept_bytes(pair, tokens.shape[1]) > MOST_KEPT_BYTES
    )
    return pair.run_blocks(pair.embed(tokens), 0, pair.n_layers, recompute=large)


def kept_bytes(pair: PairedModel, n_tokens: int) -> int:
    """Return the bytes that a block keeps of one token, in texts of n_tokens, for a gradient to its adapter's gates."""
    cfg, n_features = pair.model.cfg, 0 if pair.adapters is None else pair.adapters.n_features
    d_attention = cfg.d_head * (cfg.n_heads + 2 * (cfg.n_key_value_heads or cfg.n_heads))
    patterns = cfg.n_heads * n_tokens if (cfg.attn_scores_soft_cap or 0) > 0 else 0
    post_norms = any(hasattr(block, "ln2_post") for block in pair.model.blocks)
    of_model = kept_per_token(cfg.d_model, cfg.d_mlp, d_attention, patterns, post_norms)
    return int(cfg.dtype.itemsize * of_model + 4 * n_features)  # adapters compute in float32


def log_odds(
    pair: PairedModel,
    residual: Float[Tensor, "batch pos d_model"],
    onsets: Onsets,
    at: Bool[Tensor, "batch pos"],
    rows_at_once: int | None = None,
) -> Float[Tensor, "n"]:
    """Return the log-odds of the behavior at the chosen positions, in nats (see the module's text).

    Args:
        pair: its unembedding reads the residual stream, under the present interventions.
        residual: after the last block, over the texts of ``onsets``.
        onsets: the texts, and the tokens of the behavior.
        at: the chosen positions; each predicts a token of the response.
        rows_at_once: rows of logits that are formed at a time; None forms all of them.
    """
    return log_odds_from_logits(lambda row, position: pair.unembed(residual[row, position]), onsets, at, rows_at_once)


def log_odds_from_logits(
    logits_at: Callable[[Tensor, Tensor], Tensor],
    onsets: Onsets,
    at: Bool[Tensor, "batch pos"],
    rows_at_once: int | None = None,
) -> Float[Tensor, "n"]:
    """Return `log_odds`, from logits that a function gives for rows and positions.

    They are computed step by step along the text. With C the tokens that may continue a phrase after the tokens so far,
    and t the next token of the text, p = p(C without t) + p(t) p'. Here p' is 1 if t ends a phrase, and is read at the
    next position otherwise.
    """
    rows, positions = at.nonzero(as_tuple=True)
    nodes, steps = torch.zeros_like(rows), list[_Step]()
    edges = _edges(tuple(onsets.phrases)).to(onsets.tokens.device)
    next_tokens = onsets.next_tokens
    while True:
        if not len(edges):  # every word is one token
            steps.append(_Step(rows, positions, nodes, next_tokens[rows, positions], None))
            break
        match = (edges[:, 0] == nodes[:, None]) & (edges[:, 1] == next_tokens[rows, positions][:, None])
        deeper = (match.any(1) & onsets.predicting[rows, positions]).nonzero()[:, 0]
        steps.append(_Step(rows, positions, nodes, next_tokens[rows, positions], deeper))
        if not len(deeper):
            break
        nodes = edges[match[deeper].long().argmax(1), 2]
        rows, positions = rows[deeper], positions[deeper] + 1
    tables = dict[int, Tensor]()

    def continuing(d_vocab: int) -> Tensor:
        """The table of `_continuing_tokens` on the device: made once, when the width of the logits is known."""
        if d_vocab not in tables:
            tables[d_vocab] = _continuing_tokens(tuple(onsets.phrases), d_vocab).to(onsets.tokens.device)
        return tables[d_vocab]

    odds = None
    for step in reversed(steps):
        odds = step.log_odds(logits_at, continuing, odds, rows_at_once)
    assert odds is not None
    return odds


@dataclass(frozen=True)
class _Step:
    """Positions that are equally deep in a phrase; each is at a node of the tree of all phrases (`_phrase_tree`)."""

    rows: Tensor
    positions: Tensor
    nodes: Tensor
    next_tokens: Tensor
    deeper: Tensor | None
    """Indices of those whose next token leads deeper into a phrase; None where no phrase has two tokens."""

    def log_odds(
        self,
        logits_at: Callable[[Tensor, Tensor], Tensor],
        continuing: Callable[[int], Tensor],
        deeper_odds: Tensor | None,
        rows_at_once: int | None,
    ) -> Tensor:
        """Log-odds at these positions, given those of ``deeper`` at the next position."""
        n = len(self.rows)
        is_deeper = torch.zeros(n, dtype=torch.bool, device=self.rows.device)
        next_odds = None
        if self.deeper is not None and deeper_odds is not None and len(deeper_odds):
            is_deeper = is_deeper.index_fill(0, self.deeper, True)
            next_odds = deeper_odds.new_zeros(n).index_put((self.deeper,), deeper_odds)
        parts = []
        for part in torch.arange(n, device=self.rows.device).split(max(1, rows_at_once or n)):
            logits = at_least_float32(logits_at(self.rows[part], self.positions[part]))
            continues = continuing(logits.shape[-1])[self.nodes[part]]
            inside, outside = logits.masked_fill(~continues, -torch.inf), logits.masked_fill(continues, -torch.inf)
            if next_odds is not None:
                token, deep, odds = self.next_tokens[part, None], is_deeper[part, None], next_odds[part, None]
                chosen = logits.gather(1, token)
                yes = torch.where(deep, chosen + logsigmoid(odds), inside.gather(1, token))
                no = torch.where(deep, chosen + logsigmoid(-odds), outside.gather(1, token))
                inside, outside = inside.scatter(1, token, yes), outside.scatter(1, token, no)
            parts.append(inside.logsumexp(-1) - outside.logsumexp(-1))
        return torch.cat(parts) if parts else logits_at(self.rows, self.positions)[:, 0]


def _phrase_tree(phrases: Phrases) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """All phrases as a tree of their tokens; node 0 is before the first token.

    Returns (node, token) of every token that continues a phrase from a node, and (node, token, next node) of those
    tokens that do not end a phrase. A phrase that extends another is left out.
    """
    continuing, edges, ends = list[tuple[int, int]](), dict[tuple[int, int], int](), set[tuple[int, int]]()
    for phrase in sorted((phrase if isinstance(phrase, tuple) else (phrase,) for phrase in phrases), key=len):
        node = 0
        for depth, token in enumerate(phrase):
            edge = (node, token)
            if edge in ends:
                break
            if edge not in edges:
                continuing.append(edge)
                if depth == len(phrase) - 1:
                    ends.add(edge)
                    break
                edges[edge] = len(edges) + 1
            node = edges[edge]
    return continuing, [(*edge, node) for edge, node in edges.items()]


@lru_cache(maxsize=4)
def _continuing_tokens(phrases: Phrases, d_vocab: int) -> Bool[Tensor, "nodes d_vocab"]:
    """Of every node of the tree of phrases, the tokens that continue a phrase from there."""
    continuing, edges = _phrase_tree(phrases)
    tokens = torch.zeros(len(edges) + 1, d_vocab, dtype=torch.bool)
    for node, token in continuing:
        tokens[node, token] = True
    return tokens


@lru_cache(maxsize=4)
def _edges(phrases: Phrases) -> Int[Tensor, "edges 3"]:
    return torch.tensor(_phrase_tree(phrases)[1], dtype=torch.long).reshape(-1, 3)
