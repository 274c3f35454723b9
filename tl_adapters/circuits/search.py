"""A search for the features that make a target say a word, by necessity and sufficiency at once.

`search_circuit` searches over given onsets. `find_circuit` starts from the target's own text: it finds the onsets,
searches, and gives the features their roles and edges.

Every feature has a gate. The circuit S has three objectives, each a number over texts of the select split:

1. *necessity*: softplus(log-odds + 2) at the onsets, in the replacement without S. Without the circuit the word should
   not come; the 2 keeps a gradient until its probability is well below a half;
2. *sufficiency*: cross-entropy of saying the word or not, at onsets and matched control positions, against the target's
   probability, in the hybrid with S added ``strength`` times. The word should come where the target says it, and only
   there;
3. *continuation*: KL(target || hybrid + S) over the continuations. Without it the hybrid says "Wait" and closes its
   thinking: the word comes and the answer breaks.

The log-odds are those of the behavior (`onsets`): for a phrase those of all its tokens, so a feature that raises its
second token counts like one that raises its first. Where another phrase comes that begins with the same token, the
behavior should not come.

The loss is the weighted sum of the three, in nats. Each round scores every alive feature by how much it would lower the
loss *given the features in S*: minus the gradient with respect to its gate. The best ``per_round`` join S, until S has
the given size. So features that copy what is in S already, and have a large effect of their own, are not taken again; a
ranking by effect alone takes all of them.

A large circuit takes no more than ``rounds`` of them, in which blocks of growing size join: of R rounds the first
brings 1 part of 1 + 2 + ... + R, the last R parts. So the cost does not grow with the circuit. There are three methods:

* "greedy": every round reads all texts, forwards and backwards;
* "sampled": the texts are divided into ``parts``, each round reads the next part, and scores are a running mean over
  rounds. A round takes a part of the time, and features still join in many small blocks;
* "graphs": no search. Features are ranked by their summed influence on the word in the attribution graphs of the texts,
  as arXiv 2602.20904 reads its circuit off graphs (section 5). Copies are taken together then.

The order in which features joined is kept: its first n features are the circuit of size n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.l0 import active_counts
from tl_adapters.attribution.summed_influence import summed_influence
from tl_adapters.circuits.circuit import Circuit
from tl_adapters.circuits.onsets import Onsets, final_residual, find_onsets, log_odds
from tl_adapters.circuits.roles import FeatureRoles, assign_roles, circuit_edges
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.behaviors import Behavior, BehaviorError, GivenBehavior
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.interventions.feature_edits import gated
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel, adapters_in_float32
from tl_adapters.training.kl_divergence import kl_from_residual
from tl_adapters.utils.arguments import choice
from tl_adapters.utils.notebook import RecordTable, ResultRecord
from tl_adapters.utils.renamed import renamed_attributes
from tl_adapters.utils.results import plain

if TYPE_CHECKING:
    from pandas import DataFrame

SearchMethod = Literal["greedy", "sampled", "graphs"]
"""How the features of a circuit are chosen."""
KEPT_OF_EARLIER_ROUNDS = 0.6
"""Weight of earlier rounds in the running mean of scores, where a round reads a part of the texts."""


@dataclass(frozen=True)
class SearchOptions:
    """Size and weights of a search.

    Raises ArgumentError for an unknown method, and BehaviorError for a number that is out of range.
    """

    share: float = 0.03
    """Size of the circuit, as a share of the alive features."""
    further: float = 1.5
    """The search continues to this multiple of the size, so that larger circuits can be measured too."""
    per_round: int = 3
    """Features that join in a round; a smaller number is slower and takes fewer copies."""
    rounds: int = 40
    """Most rounds until the circuit has its size."""
    method: SearchMethod = "greedy"
    """How features are chosen: "greedy", "sampled" or "graphs" (see the module's text)."""
    parts: int = 16
    """Parts of the texts, of which a round of the method "sampled" reads one."""
    strength: float = 1.75
    """Factor of the circuit's activations where it is added to the hybrid. It is above 1 because a small part of the
    features that fire in the replacement has the effect of all."""
    necessity: float = 1.0
    """Weight of the objective necessity."""
    sufficiency: float = 0.3
    """Weight of the objective sufficiency."""
    continuation: float = 4.0
    """Weight of the objective continuation. With a quarter of it the hybrid's answers break, on the model organism."""
    documents: int = 120
    """Documents with an onset that are read in a round; those with only control positions are read in proportion."""
    tokens_per_batch: int = 4096
    """Tokens in a forward pass."""

    def __post_init__(self) -> None:
        choice(self.method, get_args(SearchMethod), "method")
        counts = min(self.further, self.per_round, self.rounds, self.parts, self.documents)
        if not 0 < self.share <= 1 or counts < 1 or self.strength <= 0:
            raise BehaviorError(
                f"Got {self}; share is above 0 and at most 1, further, per_round, rounds, parts and documents are "
                "at least 1, and strength is above 0."
            )


@dataclass(frozen=True)
class SearchObjective(ResultRecord):
    """Values of the three objectives, with some features in the circuit."""

    n: int
    """Features in the circuit."""
    necessity: float
    """Mean softplus(log-odds + 2) at the onsets, in the replacement without the circuit."""
    sufficiency: float
    """Cross-entropy of the word in the hybrid with the circuit, in nats per position."""
    continuation: float
    """KL over the continuations, in nats per token."""


@renamed_attributes(aims="objectives")
@dataclass(frozen=True)
class Search(ResultRecord):
    """The result of a search."""

    order: tuple[FeatureId, ...]
    """The circuit: features in the order in which they joined."""
    further: tuple[FeatureId, ...]
    """Features that joined after the circuit had its size."""
    objectives: tuple[SearchObjective, ...]
    """The objectives before every round, on the texts that it reads, and at the end on all texts."""

    def to_pandas(self) -> DataFrame:
        """The objectives as a DataFrame, with a row for each round."""
        return RecordTable(self.objectives).to_pandas()

    def _repr_html_(self) -> str:
        return RecordTable(self.objectives)._repr_html_()


class _Reference:
    """What the target says over a batch: read once, used in every round.

    Of the continuations the final residual stream is kept, not the probabilities, which are some forty times as large.
    """

    @torch.no_grad()
    def __init__(self, pair: PairedModel, batch: Onsets) -> None:
        self.batch = batch.to(pair.device)
        self.positions = self.batch.onset | self.batch.control
        with pair.routed("target"):
            residual = final_residual(pair, self.batch.tokens)
        self.probability = log_odds(pair, residual, self.batch, self.positions).sigmoid()
        self.continuation = residual[self.batch.continuation]


@adapters_in_float32
def search_circuit(
    pair: PairedModel,
    onsets: Onsets,
    alive: Bool[Tensor, "n_layers n_features"],
    options: SearchOptions | None = None,
    *,
    progress: bool = True,
) -> Search:
    """Search the features that make the target say the words (see the module's text).

    Args:
        pair: with adapters on every layer.
        onsets: of the select split.
        alive: features that may be taken.
        options: size and weights.
        progress: show a bar.

    Raises BehaviorError where there is no onset: a target that never shows the behavior has no circuit; and
    PairMismatchError where a layer has no adapter.
    """
    options = options or SearchOptions()
    if not bool(onsets.onset.any()):
        raise BehaviorError("There is no onset in these texts, so there is no circuit to find.")
    texts = onsets.with_onsets_and_controls(n=options.documents).cut_after("onset", "control", "continuation")
    size, size_further = (_size(alive, options.share * times) for times in (1.0, options.further))
    parts = _in_parts(pair, texts, options.parts if options.method == "sampled" else 1, options.tokens_per_batch)
    graphs = options.method == "graphs"
    sizes = [size_further] if graphs else round_sizes(size, size_further, options)
    order, objectives, mean = list[int](), list[SearchObjective](), None
    with (
        _gradients_of_gates_only(pair),
        tqdm(total=size_further, desc="circuit", unit=" features", disable=not progress) as bar,
    ):
        for number, wanted in enumerate(sizes):
            chosen = _chosen(alive, order)
            score, before = _score(pair, parts[number % len(parts)], chosen, options)
            score = _influence_in_graphs(pair, texts) if graphs else score
            mean = score if mean is None or len(parts) == 1 else mean.lerp(score, 1 - KEPT_OF_EARLIER_ROUNDS)
            candidates = (alive & ~chosen).flatten()
            best = mean.flatten().masked_fill(~candidates, -torch.inf).topk(wanted - len(order)).indices.tolist()
            order += best
            objectives.append(before)
            bar.update(len(best))
        everything = [reference for part in parts for reference in part]
        objectives.append(_score(pair, everything, _chosen(alive, order), options, gradient=False)[1])
    n = alive.shape[1]
    features = [FeatureId(i // n, i % n) for i in order]
    return Search(tuple(features[:size]), tuple(features[size:]), tuple(objectives))


def _in_parts(pair: PairedModel, texts: Onsets, n: int, tokens_per_batch: int) -> list[list[_Reference]]:
    """The texts in n parts, each of which has texts from everywhere; fewer parts where there are fewer texts."""
    n = min(n, len(texts))
    parts = [texts.rows(torch.arange(part, len(texts), n)) for part in range(n)]
    return [[_Reference(pair, batch) for _, batch in part.batches(tokens_per_batch=tokens_per_batch)] for part in parts]


def _chosen(alive: Tensor, order: Sequence[int]) -> Bool[Tensor, "n_layers n_features"]:
    chosen = torch.zeros_like(alive)
    chosen.view(-1)[list(order)] = True
    return chosen


def _influence_in_graphs(pair: PairedModel, texts: Onsets) -> Float[Tensor, "n_layers n_features"]:
    """The influence of every feature on the word, summed over the graphs of the first onset of every text."""
    prompts, words = list[list[int]](), list[int]()
    for row in texts.onset.any(1).nonzero()[:, 0].tolist():
        onset = int(texts.onset[row].nonzero()[0])
        prompts.append(texts.tokens[row, : onset + 1].tolist())
        words.append(int(texts.tokens[row, onset + 1]))
    return summed_influence(pair, prompts, words)


def round_sizes(size: int, size_further: int, options: SearchOptions) -> list[int]:
    """The number of features in S after each round; the circuit is whole before more join.

    Args:
        size: features of the circuit.
        size_further: features at which the search ends.
        options: ``per_round`` and ``rounds``.
    """
    n, each = options.rounds, options.per_round
    if size <= n * each:
        return [*range(each, size, each), *range(size, size_further, each), size_further]
    growing = {max(1, round(size * k * (k + 1) / (n * (n + 1)))) for k in range(1, n + 1)}
    last = max(each, size - max(growing - {size}, default=0))  # the rounds after it bring as many as its last one
    return [*sorted(growing), *range(size + last, size_further, last), *([size_further] if size_further > size else [])]


def _size(alive: Tensor, share: float) -> int:
    return min(max(1, round(share * int(alive.sum()))), int(alive.sum()))


def _score(
    pair: PairedModel, references: Sequence[_Reference], chosen: Tensor, options: SearchOptions, gradient: bool = True
) -> tuple[Float[Tensor, "n_layers n_features"], SearchObjective]:
    """By how much each feature would lower the loss (zeros without ``gradient``), and the values of the objectives."""
    counts = [
        max(1, sum(int(positions.sum()) for positions in kind))
        for kind in zip(*((r.batch.onset, r.positions, r.batch.continuation) for r in references), strict=True)
    ]
    weights = (options.necessity, options.sufficiency, options.continuation)
    score, values = torch.zeros(chosen.shape), [0.0, 0.0, 0.0]
    for reference in references:
        joined = chosen.float().to(reference.probability.device).requires_grad_(gradient)
        scales = [weight / n for weight, n in zip(weights, counts, strict=True)]
        with torch.set_grad_enabled(gradient):
            slopes, sums = _gradient_and_sums(pair, reference, joined, options.strength, scales)
        score -= slopes.cpu()
        values = [so_far + float(s.detach()) / n for so_far, n, s in zip(values, counts, sums, strict=True)]
    return score, SearchObjective(int(chosen.sum()), *values)


def _gradient_and_sums(
    pair: PairedModel,
    reference: _Reference,
    joined: Float[Tensor, "n_layers n_features"],
    strength: float,
    scales: Sequence[float],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The gradient of the scaled objectives, and each of them summed over its positions.

    Every feature is in S to the extent of its gate (0 to 1). Gradients are taken under the gates, since blocks may be
    computed again for them, and of one pass after the other, since each keeps its blocks until then.
    """
    batch, (necessary, sufficient, continued) = reference.batch, scales
    with gated(pair, dict(enumerate(1 - joined))):
        odds = log_odds(pair, final_residual(pair, batch.tokens), batch, batch.onset)
        necessity = F.softplus(odds + 2).sum()
        gradient = _gradient(necessary * necessity, joined)
    with gated(pair, dict(enumerate(joined * strength)), decoder_bias=False):
        residual = final_residual(pair, batch.tokens)
        odds = log_odds(pair, residual, batch, reference.positions)
        sufficiency = (F.softplus(odds) - reference.probability * odds).sum()
        continuation = _summed_kl(pair, reference.continuation, residual[batch.continuation])
        gradient = gradient + _gradient(sufficient * sufficiency + continued * continuation, joined)
    return gradient, (necessity, sufficiency, continuation)


def _gradient(loss: Tensor, joined: Tensor) -> Tensor:
    """The gradient of the loss with respect to the gates; zeros where it is not wanted."""
    return torch.autograd.grad(loss, joined)[0] if joined.requires_grad else torch.zeros_like(joined)


def _summed_kl(pair: PairedModel, target: Float[Tensor, "n d_model"], residual: Float[Tensor, "n d_model"]) -> Tensor:
    """KL(target || model) summed over tokens, by chunks of the vocabulary's logits."""
    if not len(target):
        return residual.sum().float()
    everywhere = torch.ones(1, len(target), dtype=torch.bool, device=target.device)
    return len(target) * kl_from_residual(target[None], residual[None], everywhere, pair.unembed, pair.rows_at_once)


@contextmanager
def _gradients_of_gates_only(pair: PairedModel) -> Iterator[Any]:
    """Gates take gradients in this block, and the adapters' parameters none."""
    parameters = [p for p in pair.installed_adapters().parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


FEWEST_ONSETS = 20
"""With fewer onsets on the select problems no circuit is searched."""


@renamed_attributes(moments="onsets")
@dataclass(frozen=True)
class FoundCircuit:
    """A circuit with the texts and the search that it comes from."""

    circuit: Circuit
    """Features and roles; empty where there was nothing to find."""
    onsets: Onsets
    """Of the select problems."""
    alive: Bool[Tensor, "n_layers n_features"]
    """Features that fired often enough to be candidates."""
    firings: Float[Tensor, "n_layers n_features"]
    """Summed activation in decoder-norm units over the select texts."""
    l0: float
    """Active features per token and layer."""
    search: Search | None
    """How the search went; None where there was nothing to search."""
    roles: FeatureRoles | None
    """The roles of all features that have one, in the circuit or not; None where there was nothing to search."""

    @property
    def promoting(self) -> list[FeatureId]:
        """Features of the circuit but the suppressors, in the order in which the search took them."""
        return [f.id for f in self.circuit.features if f.role != "suppress"]

    def ids(self) -> list[FeatureId]:
        """The promoting features, sorted: `pair.ablated(found)` is the replacement without them."""
        return self.circuit.ids()

    def __repr__(self) -> str:
        alive, counts = int(self.alive.sum()), self.onsets.counts
        return (
            f"FoundCircuit: {self.circuit!r}; {len(self.promoting)} promoting features of {alive:,} alive, from "
            f"{counts['moments']} onsets and {counts['boundaries']} matched controls in {counts['documents']} documents"
        )

    def to_dict(self) -> dict[str, Any]:
        """The circuit (`Circuit.to_dict`), and the objectives of the search by the number of features."""
        objectives = () if self.search is None else self.search.objectives
        return {"circuit": self.circuit.to_dict(), "objectives": plain(objectives), "l0": self.l0}

    def to_pandas(self) -> DataFrame:
        """The circuit's features as a DataFrame (`Circuit.to_pandas`)."""
        return self.circuit.to_pandas()

    def _repr_html_(self) -> str:
        return self.circuit._repr_html_()


@adapters_in_float32
def find_circuit(
    pair: PairedModel,
    traces: Sequence[Trace],
    behavior: GivenBehavior = None,
    *,
    split: str = "select",
    options: SearchOptions | None = None,
    progress: bool = True,
) -> FoundCircuit:
    """Find the circuit of a behavior in texts that the target wrote.

    Args:
        pair: with adapters on every layer.
        traces: the target's own responses (`generation.responses.traces_of`), to problems that are not reported on.
        behavior: a behavior, a word or phrase that the target says, or several; None is hesitation (`Behavior.of`).
        split: of the problems, recorded in the circuit.
        options: of the search.
        progress: show a bar.

    A target with fewer than `FEWEST_ONSETS` onsets has an empty circuit, whether words or a function define the
    behavior.

    Raises BehaviorError where there are no answers, for words that the tokenizer cannot write, and for adapters of
    which no feature fires although the behavior occurs; PairMismatchError where a layer has no adapter; and what
    `find_onsets` raises.
    """
    behavior, options = Behavior.of(behavior), options or SearchOptions()
    adapters = pair.installed_adapters()
    words = behavior.tokens(pair, traces)
    onsets = find_onsets(pair, traces, behavior, tuple(words.values()))
    fired, summed, l0 = _activity(pair, onsets)
    alive = fired >= ALIVE_FIRINGS * min(1.0, int(onsets.predicting.sum()) / 100_000)
    alive &= fired > 0
    search = roles = None
    if int(onsets.onset.sum()) >= FEWEST_ONSETS:
        if not bool(alive.any()):
            raise BehaviorError("No feature of these adapters fires on the target's text; train them first.")
        search = search_circuit(pair, onsets, alive, options, progress=progress)
        roles = assign_roles(pair, onsets, search.order, alive)
    circuit = Circuit(
        behavior=behavior.name,
        words=tuple(words),
        phrases=tuple(ids if isinstance(ids, tuple) else (ids,) for ids in words.values()),
        function=behavior.function,
        features=() if roles is None else roles.features,
        strength=options.strength,
        split=split,
        fingerprints={**pair.fingerprints, **adapters.fingerprints},
        n_features=adapters.n_features,
        n_layers=pair.n_layers,
        threshold=0.0 if roles is None else roles.threshold,
        edges=() if roles is None else circuit_edges(pair, onsets, roles.features),
    )
    return FoundCircuit(circuit, onsets, alive, summed, l0, search, roles)


@torch.no_grad()
def _activity(pair: PairedModel, onsets: Onsets) -> tuple[Tensor, Tensor, float]:
    """Firings and summed activation (in decoder-norm units) of every feature over a text, and the mean L0."""
    adapters = pair.installed_adapters()
    device = pair.device
    fired = torch.zeros(pair.n_layers, adapters.n_features, device=device)
    summed, n, active = torch.zeros_like(fired), 0, torch.zeros((), dtype=torch.long, device=device)
    norms = adapters.decoder_norms().cpu()
    for _, batch in onsets.batches():
        batch = batch.to(device)
        real = batch.predicting
        with pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
            pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
        n += int(real.sum())
        for layer in range(pair.n_layers):
            active += active_counts(acts[layer], real).sum()
            activation = acts[layer][real].float()
            fired[layer] += (activation > 0).sum(0)
            summed[layer] += activation.sum(0)
    fired, summed = fired.cpu(), summed.cpu()
    return fired, summed * norms, float(active) / max(1, n * pair.n_layers)
