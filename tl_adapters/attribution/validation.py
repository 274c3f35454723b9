"""Graphs compared with interventions in the real, nonlinear model, and the difference between replacement and hybrid.

The rows of a graph add up by construction, which does not show that the features with large effects in the graph have
large effects in the model. That is tested by ablating features (or all other features) in the model, with one forward
pass each, and comparing the target's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import LINEARIZATIONS, AttributionGraph, GraphError
from tl_adapters.attribution.provenance import require_same_pair
from tl_adapters.attribution.targets import DifferenceTarget, LogitTarget, unembedding_column
from tl_adapters.data.traces import GivenPrompt
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel, adapters_in_float32
from tl_adapters.utils.bootstrap import bootstrap_ratio
from tl_adapters.utils.measurement import Estimate
from tl_adapters.utils.notebook import ResultRecord, data_frame, tables_view
from tl_adapters.utils.precision import host_float64
from tl_adapters.utils.renamed import renamed_arguments

if TYPE_CHECKING:
    from pandas import DataFrame

CURVE_SIZES = (5, 10, 20, 50, 100)
"""Numbers of features that `compare_linearizations` keeps and removes."""
FEWEST_PROMPTS = 10
"""A mean over fewer prompts has no interval: a bootstrap of so few is too narrow."""


def compare_linearizations(pair: PairedModel, prompt: Sequence[int], target: LogitTarget) -> dict[str, Any]:
    """The total effects of every linearization compared with ablations of every active feature, on one prompt.

    Returns:
        "features": the number of active features; "rank_correlation" with the ablation effects, by linearization; and
        "curve": a `FaithfulnessCurve` by linearization, and for the ranking by the ablation effects themselves
        ("ablation"), which is the best ranking of single features.
    """
    relp, effects, ablation = _effects(pair, prompt, target)
    counts = [n for n in CURVE_SIZES if n < len(relp.features)]
    return {
        "features": len(relp.features),
        "rank_correlation": {name: rank_correlation(effect, ablation) for name, effect in effects.items()},
        "curve": {
            name: asdict(faithfulness_curve(pair, relp, effect, counts))
            for name, effect in {**effects, "ablation": ablation}.items()
        },
    }


def rank_correlations(pair: PairedModel, prompt: Sequence[int], target: LogitTarget) -> dict[str, float | None]:
    """The part "rank_correlation" of `compare_linearizations` alone, which needs no curves."""
    _, effects, ablation = _effects(pair, prompt, target)
    return {name: rank_correlation(effect, ablation) for name, effect in effects.items()}


def mean_over_prompts(values: Sequence[float | None]) -> Estimate:
    """The mean of one value per prompt, with an interval over the prompts; prompts without a value do not count.

    Fewer than `FEWEST_PROMPTS` prompts give a mean without an interval, and the reason.
    """
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if not len(known):
        return Estimate(None, None, None, reason="no prompt has a value")
    estimate = bootstrap_ratio(known, torch.ones_like(known))
    if len(known) >= FEWEST_PROMPTS:
        return estimate
    reason = f"an interval requires {FEWEST_PROMPTS} prompts; there are {len(known)}"
    return Estimate(estimate.value, None, None, reason=reason)


def _effects(
    pair: PairedModel, prompt: Sequence[int], target: LogitTarget
) -> tuple[AttributionGraph, dict[str, Float[Tensor, "n_features"]], Float[Tensor, "n_features"]]:
    """The RelP graph of a prompt, the total effects by linearization, and the effects of ablating every feature.

    All effects are of the features of the RelP graph. A feature whose pre-activation is zero up to rounding may be
    active in one graph and not in another, where its effect is 0.
    """
    graphs = {
        name: attribute(pair, prompt, [target], linearization=name, max_feature_nodes=10**9, progress=False)
        for name in LINEARIZATIONS
    }
    relp = graphs["relp"]
    effects = {name: _effects_of(relp.features, graph) for name, graph in graphs.items()}
    return relp, effects, ablation_effects(pair, relp, torch.arange(len(relp.features)))


def _effects_of(features: Int[Tensor, "n 3"], graph: AttributionGraph) -> Float[Tensor, "n"]:
    known = dict(zip(map(tuple, graph.features.tolist()), total_effects(graph).tolist(), strict=True))
    return torch.tensor([known.get(tuple(feature), 0.0) for feature in features.tolist()], dtype=torch.float64)


@renamed_arguments(target="target_index")
def total_effects(graph: AttributionGraph, target_index: int = 0) -> Float[Tensor, "n_features"]:
    """The decrease of a target's value without each feature, in the linearized replacement model.

    The effect of a feature is its edge into the target plus the effects along all paths through other features. A path
    through feature t contributes the edge into t, divided by t's activation, times the effect of t.

    Args:
        graph: the graph.
        target_index: index of the target in ``graph.targets``.

    Returns:
        The signed effects, in float64.

    Raises GraphError where the graph has no such target.
    """
    _require_target(graph, target_index)
    n = len(graph.features)
    activations = graph.activations.double()
    effect = torch.zeros(graph.n_nodes, dtype=torch.float64)
    targets, sources, weights = graph.edges[0], graph.edges[1], graph.weights.double()
    direct = targets == graph.first_target + target_index
    effect.index_add_(0, sources[direct], weights[direct])
    layers = graph.features[:, 0]
    for layer in range(graph.n_layers - 1, -1, -1):  # features of one layer have no edges between them
        into_layer = (targets < n) & (layers[targets.clamp(max=n - 1)] == layer)
        per_activation = effect[targets[into_layer]] / activations[targets[into_layer]]
        effect.index_add_(0, sources[into_layer], weights[into_layer] * per_activation)
    return effect[:n]


@contextmanager
def _features_removed(
    pair: PairedModel, features: Int[Tensor, "n 3"], kept: Bool[Tensor, "batch n"], n_positions: int
) -> Iterator[None]:
    """The replacement route; sequence b of the batch runs without the features for which ``kept[b]`` is False.

    Args:
        pair: a pair with adapters on every layer.
        features: layer, position and index of the features.
        kept: which features each sequence keeps. Those that are not kept are set to zero; all others are computed.
        n_positions: length of the sequences. It may be shorter than the prompt, and later features are then ignored.
    """
    device, within = pair.device, (features[:, 1] < n_positions).nonzero()[:, 0]
    within = within[features[within, 0].argsort(stable=True)]
    sizes = torch.bincount(features[within, 0], minlength=pair.n_layers).tolist()
    by_layer = features[within].to(device).split(sizes)
    factors = kept[:, within].to(device).split(sizes, 1)

    def zero(acts: Tensor, hook: HookPoint, layer: int) -> Tensor:
        _, position, index = by_layer[layer].T
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
    target_index: int = 0,
    batch_size: int = 64,
) -> Float[Tensor, "runs"]:
    """The value of a logit target in the model, for each row of ``kept``, with the features not kept set to zero.

    Args:
        pair: the pair that the graph was made with.
        graph: its feature nodes are the features.
        kept: which feature nodes each run keeps.
        target_index: index of the target in ``graph.targets``.
        batch_size: number of runs computed together.

    Raises:
        GraphError: the target is a feature, or the graph was made with another pair.
    """
    position, vector = logit_direction(pair, graph, target_index)
    values = []
    for rows in kept.split(batch_size):
        tokens = graph.tokens.to(pair.device)[None, : position + 1].expand(len(rows), -1)
        with _features_removed(pair, graph.features, rows, position + 1):
            residual = pair.run_blocks(pair.embed(tokens), 0, pair.n_layers)[:, position]
        values.append(pair.read_by_unembedding(residual) @ vector)
    return host_float64(torch.cat(values))


@renamed_arguments(features="nodes", target="target_index")
def ablation_effects(
    pair: PairedModel, graph: AttributionGraph, nodes: Int[Tensor, "n"], target_index: int = 0
) -> Float[Tensor, "n"]:
    """The decrease of a logit target's value when feature nodes are ablated in the model, one at a time.

    Args:
        pair: the pair that the graph was made with.
        graph: the graph.
        nodes: node numbers of the features.
        target_index: index of the target in ``graph.targets``.

    Raises:
        GraphError: there is no such target, it is a feature, or the graph was made with another pair.
        PairMismatchError: the pair has no adapters.
    """
    kept = torch.ones(len(nodes) + 1, len(graph.features), dtype=torch.bool)
    kept[torch.arange(len(nodes)) + 1, nodes] = False
    values = values_with_features(pair, graph, kept, target_index)
    return values[0] - values[1:]


def rank_correlation(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> float | None:
    """Spearman's rank correlation, with mean ranks for ties; None if one of the two is constant."""
    ranks = [_ranks(x.double()) for x in (a, b)]
    first, second = (r - r.mean() for r in ranks)
    spread = float(first.norm() * second.norm())
    return float((first * second).sum()) / spread if spread > 0 else None


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]


@dataclass(frozen=True)
class FaithfulnessCurve(ResultRecord):
    """A target's value with the first features of a ranking kept or removed, from 0 (no features) to 1 (all)."""

    n: list[int]
    """Numbers of first features."""
    keeping: list[float]
    """The value for each n when only those features are kept."""
    removing: list[float]
    """The value for each n when those features are removed."""

    def to_pandas(self) -> DataFrame:
        """The curve as a DataFrame, with a row for each n."""
        return data_frame(self.row())


def faithfulness_curve(
    pair: PairedModel,
    graph: AttributionGraph,
    ranking: Float[Tensor, "n_features"],
    n: Sequence[int],
    target_index: int = 0,
) -> FaithfulnessCurve:
    """The target's value with the first n feature nodes kept, and with them removed, for every n.

    A good ranking makes the value rise fast when features are kept and fall fast when they are removed.

    Args:
        pair: the pair that the graph was made with.
        graph: the graph.
        ranking: a score per feature node; the largest comes first.
        n: the numbers of features.
        target_index: index of the target in ``graph.targets``.

    Raises:
        GraphError: the features make no difference to the target, the target is a feature, or the graph was made with
            another pair.
    """
    order = ranking.argsort(descending=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    first = torch.stack([rank < k for k in n])
    everything = torch.ones(1, len(order), dtype=torch.bool)
    values = values_with_features(pair, graph, torch.cat([everything, ~everything, first, ~first]), target_index)
    full, none = values[:2]
    if abs(float(full - none)) < 1e-9:
        raise GraphError("The features of this graph make no difference to the target, so the curve is undefined.")
    shares = ((values[2:] - none) / (full - none)).tolist()
    return FaithfulnessCurve(list(n), shares[: len(n)], shares[len(n) :])


@dataclass(frozen=True)
class DifferenceExplanation:
    """The difference of a target's value between the replacement and the hybrid, in parts."""

    replacement: float
    """Value of the target on the replacement route."""
    hybrid: float
    """Value of the target on the hybrid route."""
    features: float
    """Sum of the features' contributions to the target."""
    decoder_biases: float
    """Contribution of the adapters' b_dec."""
    unexplained: float
    """The rest: changes of patterns, norms and activation slopes, which the linearized model holds constant."""
    graph: AttributionGraph
    """The graph on the replacement route; its feature edges are the explained part."""

    def to_dict(self) -> dict[str, float]:
        """The parts, in the order in which they add up from the hybrid to the replacement."""
        names = ("hybrid", "features", "decoder_biases", "unexplained", "replacement")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.to_dict().items())
        return f"DifferenceExplanation of {self.graph.targets[0].label}: {parts}"

    def _repr_html_(self) -> str:
        rows = [[name.replace("_", " "), f"{value:+.3g}"] for name, value in self.to_dict().items()]
        return tables_view(([f"value of {self.graph.targets[0].label}", ""], rows))


@torch.no_grad()
def explain_difference(
    pair: PairedModel, prompt: GivenPrompt, target: LogitTarget | DifferenceTarget | str | int, **options: object
) -> DifferenceExplanation:
    """Attribute value(replacement) - value(hybrid) of one target to the adapters' features.

    Args:
        pair: a pair with adapters on every layer.
        prompt: as in `attribute`.
        target: a token (text or id) or `LogitTarget`, which is a logit, or a difference of two logits.
        options: keyword arguments of `attribute` except ``window``.

    Raises:
        GraphError: a window is given, since contributions from before it are not those of features only; or the target
            is a feature.
        UserError: whatever else `attribute` raises.
    """
    if options.get("window") is not None:
        raise GraphError(
            "explain_difference takes no window=: contributions from before it are not those of features only."
        )
    graph = attribute(pair, prompt, [target], **options)  # type: ignore[arg-type]
    position, vector = logit_direction(pair, graph, 0)
    with pair.routed("hybrid"):
        tokens = graph.tokens.to(pair.device)[None, : position + 1]
        residual = pair.run_blocks(pair.embed(tokens), 0, pair.n_layers)[:, position]
    hybrid = float(pair.read_by_unembedding(residual)[0] @ vector)
    row = int((graph.rows == graph.first_target).nonzero())
    value = float(graph.balance[row, 0])
    from_features = (graph.edges[0] == graph.first_target) & (graph.edges[1] < len(graph.features))
    features = float(graph.weights[from_features].sum() + graph.balance[row, 2])
    biases = float(graph.decoder_biases[row])
    return DifferenceExplanation(value, hybrid, features, biases, value - hybrid - features - biases, graph)


def logit_direction(
    pair: PairedModel, graph: AttributionGraph, target_index: int
) -> tuple[int, Float[Tensor, "d_model"]]:
    """The position and direction of a logit target. Raises GraphError for a feature, or a graph of another pair."""
    require_same_pair(pair, graph)
    _require_target(graph, target_index)
    about = graph.targets[target_index]
    if about.token is None:
        raise GraphError(
            f"Target {target_index} is {about.label}, not a logit; give the index of a logit or a difference."
        )
    dtype = torch.promote_types(pair.model.W_E.dtype, torch.float32)
    return about.position, unembedding_column(pair, about.token, about.against, dtype)


def _require_target(graph: AttributionGraph, target_index: int) -> None:
    if not 0 <= target_index < len(graph.targets):
        raise GraphError(f"target_index is {target_index}; this graph has the targets 0 to {len(graph.targets) - 1}.")
