"""Does a graph say the truth? Held against interventions in the real, nonlinear model; and what diffing adds.

A graph's rows add up by construction. Whether a feature that it calls important is important is another question:
features are really taken away (or all others are), one forward pass each, and the target is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.attribution.attribute import attribute, require_same_pair
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.targets import DifferenceTarget, LogitTarget, unembedding_column
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel, adapters_in_float32
from tl_adapters.utils.precision import host_float64

LINEARIZATIONS = ("relp", "frozen_mlp", "gradient")
CURVE_SIZES = (5, 10, 20, 50, 100)


def compare_linearizations(pair: PairedModel, prompt: Sequence[int], target: LogitTarget) -> dict[str, Any]:
    """Every linearisation's total effects against real ablation of every active feature, on one prompt.

    Returns "rank_correlation" and "curve" (keeping and removing the first n), by linearisation and for the ranking that
    the ablations themselves give, which none can beat on single features.
    """
    graphs = {
        name: attribute(pair, prompt, [target], linearisation=name, max_feature_nodes=10**9, progress=False)
        for name in LINEARIZATIONS
    }
    relp = graphs["relp"]
    real = ablation_effects(pair, relp, torch.arange(len(relp.features)))
    effects = {name: total_effects(graph) for name, graph in graphs.items()}
    counts = [n for n in CURVE_SIZES if n < len(relp.features)]
    return {
        "features": len(relp.features),
        "rank_correlation": {name: rank_correlation(effect, real) for name, effect in effects.items()},
        "curve": {
            name: asdict(faithfulness_curve(pair, relp, effect, counts))
            for name, effect in {**effects, "ablation": real}.items()
        },
    }


def total_effects(graph: AttributionGraph, target: int = 0) -> Float[Tensor, "n_features"]:
    """What a target would lose, in the linear model, without each feature: its edge and all paths through others.

    A path through a feature t multiplies: the edge into t, over t's activation, times what t does. ``target`` counts
    the graph's targets. Signed, in float64.
    """
    n = len(graph.features)
    activations = graph.activations.double()
    effect = torch.zeros(graph.n_nodes, dtype=torch.float64)
    into, source, weight = graph.edges[0], graph.edges[1], graph.weights.double()
    own = into == graph.first_target + target
    effect.index_add_(0, source[own], weight[own])
    layers = graph.features[:, 0]
    for layer in range(graph.n_layers - 1, -1, -1):  # deepest first: features of a layer do not feed one another
        here = (into < n) & (layers[into.clamp(max=n - 1)] == layer)
        through = effect[into[here]] / activations[into[here]]
        effect.index_add_(0, source[here], weight[here] * through)
    return effect[:n]


@contextmanager
def _features_removed(
    pair: PairedModel, features: Int[Tensor, "n 3"], kept: Bool[Tensor, "batch n"], n_positions: int
) -> Iterator[None]:
    """Row b of the batch runs with the features that ``kept[b]`` leaves out set to zero; all others live.

    Args:
        pair, features, kept: see above.
        n_positions: of the passes; a target may stand before the prompt's end, and features after it are left out.
    """
    device, read = pair.model.W_E.device, (features[:, 1] < n_positions).nonzero()[:, 0]
    read = read[features[read, 0].argsort(stable=True)]
    sizes = torch.bincount(features[read, 0], minlength=pair.n_layers).tolist()
    places = features[read].to(device).split(sizes)
    factors = kept[:, read].to(device).split(sizes, 1)

    def zero(acts: Tensor, hook: HookPoint, layer: int) -> Tensor:
        _, position, index = places[layer].T
        acts = acts.clone()
        acts[:, position, index] *= factors[layer].to(acts.dtype)
        return acts

    hooks = [(f"blocks.{layer}.{ACTS_HOOK}", partial(zero, layer=layer)) for layer in range(pair.n_layers)]
    with pair.routed("replacement"), pair.model.hooks(fwd_hooks=hooks):
        yield


@torch.no_grad()
@adapters_in_float32
def values_with_features(
    pair: PairedModel,
    graph: AttributionGraph,
    kept: Bool[Tensor, "runs n_features"],
    target: int = 0,
    batch_size: int = 64,
) -> Float[Tensor, "runs"]:
    """A logit target's value in the real model, once per row of ``kept``: features not kept are set to zero."""
    position, vector = logit_direction(pair, graph, target)
    values = []
    for rows in kept.split(batch_size):
        tokens = graph.tokens.to(pair.model.W_E.device)[None, : position + 1].expand(len(rows), -1)
        with _features_removed(pair, graph.features, rows, position + 1):
            residual = pair.run_blocks(pair.embed(tokens), 0, pair.n_layers)[:, position]
        values.append(pair.read_by_unembedding(residual) @ vector)
    return host_float64(torch.cat(values))


def ablation_effects(
    pair: PairedModel, graph: AttributionGraph, features: Int[Tensor, "n"], target: int = 0
) -> Float[Tensor, "n"]:
    """What a logit target really loses without each of the feature nodes, one at a time."""
    kept = torch.ones(len(features) + 1, len(graph.features), dtype=torch.bool)
    kept[torch.arange(len(features)) + 1, features] = False
    values = values_with_features(pair, graph, kept, target)
    return values[0] - values[1:]


def rank_correlation(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> float | None:
    """Spearman's, with mean ranks for ties; None where one side is constant."""
    ranks = [_ranks(x.double()) for x in (a, b)]
    first, second = (r - r.mean() for r in ranks)
    spread = float(first.norm() * second.norm())
    return float((first * second).sum()) / spread if spread > 0 else None


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]


@dataclass(frozen=True)
class FaithfulnessCurve:
    """A target's value as features go or stay, by a ranking; shares of the way from none of them (0) to all (1)."""

    n: list[int]
    """How many of the ranking's first features."""
    keeping: list[float]
    """Only those kept."""
    removing: list[float]
    """Those taken away."""


def faithfulness_curve(
    pair: PairedModel, graph: AttributionGraph, ranking: Float[Tensor, "n_features"], n: Sequence[int], target: int = 0
) -> FaithfulnessCurve:
    """Keep, and take away, the first n feature nodes by ``ranking`` (largest first), for every n.

    A good ranking rises fast when keeping and falls fast when removing. Raises GraphError where features make no
    difference to the target.
    """
    order = ranking.argsort(descending=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    first = torch.stack([rank < k for k in n])
    everything = torch.ones(1, len(order), dtype=torch.bool)
    values = values_with_features(pair, graph, torch.cat([everything, ~everything, first, ~first]), target)
    full, none = values[:2]
    if abs(float(full - none)) < 1e-9:
        raise GraphError("The features of this graph make no difference to the target; there is no curve.")
    shares = ((values[2:] - none) / (full - none)).tolist()
    return FaithfulnessCurve(list(n), shares[: len(n)], shares[len(n) :])


@dataclass(frozen=True)
class DifferenceExplanation:
    """Why the replacement's logit is not the hybrid's: what only diffing can ask."""

    replacement: float
    """The target's value in the replacement."""
    hybrid: float
    """The same target in the hybrid."""
    features: float
    """What the features' edges into the target add up to."""
    decoder_biases: float
    """What the adapters' b_dec add."""
    unexplained: float
    """The rest: patterns, norms and slopes that the adapters move, which a frozen model holds constant."""
    graph: AttributionGraph
    """The replacement's graph; its feature edges are the explained part."""


@torch.no_grad()
def explain_difference(
    pair: PairedModel, prompt: str | Sequence[int] | Tensor, target: LogitTarget | DifferenceTarget, **options: object
) -> DifferenceExplanation:
    """Attribute value(replacement) - value(hybrid) of one target to the adapters' features.

    Args:
        pair: with adapters on every layer.
        prompt, options: as `attribute`, but for a window: what comes from before it is not the features' alone.
        target: a logit or a difference of logits.

    Raises:
        GraphError: a window, and what `attribute` raises.
    """
    if options.get("window") is not None:
        raise GraphError("A difference takes no window=: what comes from before it is not the features' alone.")
    graph = attribute(pair, prompt, [target], **options)  # type: ignore[arg-type]
    position, vector = logit_direction(pair, graph, 0)
    with pair.routed("hybrid"):
        tokens = graph.tokens.to(pair.model.W_E.device)[None, : position + 1]
        residual = pair.run_blocks(pair.embed(tokens), 0, pair.n_layers)[:, position]
    hybrid = float(pair.read_by_unembedding(residual)[0] @ vector)
    row = int((graph.rows == graph.first_target).nonzero())
    value = float(graph.balance[row, 0])
    from_features = (graph.edges[0] == graph.first_target) & (graph.edges[1] < len(graph.features))
    features = float(graph.weights[from_features].sum() + graph.balance[row, 2])
    biases = float(graph.decoder_biases[row])
    return DifferenceExplanation(value, hybrid, features, biases, value - hybrid - features - biases, graph)


def logit_direction(pair: PairedModel, graph: AttributionGraph, target: int) -> tuple[int, Float[Tensor, "d_model"]]:
    """Position and direction of a graph's logit target. Raises GraphError for a feature, or another pair's graph."""
    require_same_pair(pair, graph)
    about = graph.targets[target]
    if about.token is None:
        raise GraphError(f"Target {target} is {about.label}, no logit.")
    dtype = torch.promote_types(pair.model.W_E.dtype, torch.float32)
    return about.position, unembedding_column(pair, about.token, about.against, dtype)
