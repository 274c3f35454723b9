"""The role of each feature for a word, by formula: output, template, continuation, suppressor, bystander.

All effects are on the log-odds of the words, in nats, to first order: activation times gradient in the replacement,
summed over every position that reaches an onset and averaged over onsets.

* *direct*: what a feature writes at the onset itself (and at a phrase's later tokens), read by the final norm and the
  unembedding, through no other module;
* *total*: along all paths;
* *through output features*: total, less total with the output features' activations constant;
* *on continuation*: total, but on the log-odds of the tokens that follow the onset.

An effect counts from `MIN_EFFECT_SHARE` of the summed positive effects of its kind, over all alive features. A fixed
threshold in nats would mean little, because the final norm flattens the log-odds where much is written. A feature of
the circuit is

    output        if its direct effect counts
    template      if it does not, and its effect through output features is positive and as large
    continuation  if neither holds, and its effect on the continuation counts
    other         otherwise: the search took it for what it does together with others

(Section 5 of arXiv 2602.20904 assigns roles by inspecting features; here no feature is inspected.) Outside the circuit,
*suppressors* lower the word by at least `MIN_SUPPRESSION_SHARE` of that sum in total, at onsets or control positions.
*Bystanders* fire at onsets at least twice as often as at control positions, with a total effect of less than a tenth of
what counts: they are correlates of hesitation and not causes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import CircuitEdge, CircuitFeature, Role
from tl_adapters.circuits.onsets import Onsets, final_residual, log_odds
from tl_adapters.interventions.feature_edits import gated, indices_by_layer
from tl_adapters.models.paired_model import ACTS_HOOK, PRE_ACTS_HOOK, PairedModel, adapters_in_float32
from tl_adapters.models.routed_model import run_again_in_backward
from tl_adapters.utils.precision import at_least_float32
from tl_adapters.utils.renamed import renamed_attributes

MIN_EFFECT_SHARE = 0.001
"""Share of the summed positive effects of all features from which one effect counts."""
MIN_SUPPRESSION_SHARE = 0.01
"""Share of the same sum by which a suppressor lowers the word, at least."""
MAX_EDGE_TARGETS, EDGE_DOCUMENTS = 12, 40
"""Output features whose incoming edges are measured, and documents on which they are."""


@renamed_attributes(margin="log_odds", mass="activation")
@dataclass(frozen=True)
class Effects:
    """Mean effects of every feature on the log-odds, over positions of one kind."""

    direct: Float[Tensor, "n_layers n_features"]
    """Through no other module, in nats."""
    total: Float[Tensor, "n_layers n_features"]
    """Along all paths, in nats."""
    activation: Float[Tensor, "n_layers n_features"]
    """Mean activation at the positions, in decoder-norm units."""
    rate: Float[Tensor, "n_layers n_features"]
    """Share of the positions at which the feature fires."""
    log_odds: float
    """Mean log-odds of the behavior, in nats."""


@adapters_in_float32
def effects_at(
    pair: PairedModel,
    onsets: Onsets,
    at: str = "onset",
    constant: Sequence[FeatureId] = (),
    tokens_per_batch: int = 4096,
) -> Effects:
    """Measure the effects of every feature at positions of one kind.

    Args:
        pair: with adapters on every layer.
        onsets: the texts.
        at: "onset" or "control".
        constant: features whose activations are held constant.
        tokens_per_batch: in a forward pass.

    Raises InterventionError for features that the adapters do not have.
    """
    adapters = pair.installed_adapters()
    shape, device = (pair.n_layers, adapters.n_features), pair.device
    norms = adapters.decoder_norms()
    direct, total, activation, rate = torch.zeros(4, *shape, device=device)
    odds, n = 0.0, 0
    for _, batch in onsets.having(at).cut_after(at).batches(tokens_per_batch=tokens_per_batch):
        batch = batch.to(device)
        positions = getattr(batch, at)
        gates = torch.ones(shape, device=device, requires_grad=True)
        with torch.enable_grad(), _constant(pair, constant), gated(pair, dict(enumerate(gates))), \
                pair.recorded(ACTS_HOOK) as acts, _recorded_post_norms(pair) as scales:  # fmt: skip
            residual = final_residual(pair, batch.tokens)
            batch_odds = log_odds(pair, residual, batch, positions)
            through, reads = torch.autograd.grad(batch_odds.sum(), [gates, residual])
        total += through.detach()
        odds, n = odds + float(batch_odds.detach().sum()), n + len(batch_odds)
        # Indices once per batch, because a mask makes the device wait at every use.
        read = reads.ne(0).any(-1).nonzero(as_tuple=True)  # the positions, and where phrases that begin there go on
        where = positions.nonzero(as_tuple=True)
        reads = at_least_float32(reads[read])
        for layer in range(pair.n_layers):
            through_norm = reads if layer not in scales else reads / scales[layer].detach()[read].to(reads)
            rows = _into_residual(pair, adapters[layer].W_dec.detach(), layer).to(reads)
            direct[layer] += (acts[layer].detach()[read] * (through_norm @ rows.T)).sum(0)
            fired = acts[layer].detach()[where]
            activation[layer] += fired.sum(0).float() * norms[layer]
            rate[layer] += (fired > 0).sum(0).float()
    n = max(1, n)
    direct, total, activation, rate = ((part / n).cpu() for part in (direct, total, activation, rate))
    return Effects(direct, total, activation, rate, odds / n)


def _into_residual(pair: PairedModel, rows: Tensor, layer: int) -> Tensor:
    """Decoder rows times a post-norm's weight; the norm's scale differs by position (`_recorded_post_norms`)."""
    name = f"blocks.{layer}.ln2_post"
    weight = pair.backend.norm(name) if hasattr(pair.model.blocks[layer], "ln2_post") else None
    return rows if weight is None else rows * weight.to(rows)


@contextmanager
def _recorded_post_norms(pair: PairedModel) -> Iterator[dict[int, Tensor]]:
    """Layer -> the scale by which the norm after the MLP divides, [batch, pos, 1]; empty without post-norms."""
    if not any(hasattr(block, "ln2_post") for block in pair.model.blocks):
        yield {}
        return
    with pair.recorded("ln2_post.hook_scale") as scales:
        yield scales


@adapters_in_float32
def effects_on_continuation(
    pair: PairedModel, onsets: Onsets, tokens_per_batch: int = 4096
) -> Float[Tensor, "n_layers n_features"]:
    """Return the mean total effect of every feature on the log-odds of the tokens of the continuation, in nats."""
    shape, device = (pair.n_layers, pair.installed_adapters().n_features), pair.device
    total, n = torch.zeros(shape), 0
    for _, batch in onsets.with_onsets().cut_after("continuation").batches(tokens_per_batch=tokens_per_batch):
        batch = batch.to(device)
        next_tokens = batch.tokens.roll(-1, dims=1)[batch.continuation]
        gates = torch.ones(shape, device=device, requires_grad=True)
        with torch.enable_grad(), gated(pair, dict(enumerate(gates))):
            residual = final_residual(pair, batch.tokens)[batch.continuation]
            parts = list(zip(*(part.split(pair.rows_at_once) for part in (residual, next_tokens)), strict=True))
            # Of several parts the logits of one at a time are in memory, also in the backward pass.
            summed = partial(run_again_in_backward, _summed_odds) if len(parts) > 1 else _summed_odds
            odds = torch.stack([summed(pair, *part) for part in parts]).sum()
            total += torch.autograd.grad(odds, gates)[0].cpu()
        n += len(next_tokens)
    return total / max(1, n)


def _summed_odds(
    pair: PairedModel, residual: Float[Tensor, "n d_model"], tokens: Int[Tensor, "n"]
) -> Float[Tensor, ""]:
    """The log-odds of tokens against all others, summed."""
    logits = at_least_float32(pair.unembed(residual))
    others = logits.scatter(1, tokens[:, None], -torch.inf).logsumexp(1)
    return (logits.gather(1, tokens[:, None])[:, 0] - others).sum()


@contextmanager
def _constant(pair: PairedModel, features: Sequence[FeatureId]) -> Iterator[None]:
    """Hold chosen activations constant: they keep their values and pass no gradient on."""

    def detach(acts: Tensor, hook: HookPoint, index: Tensor) -> Tensor:
        return acts.index_copy(-1, index, acts[..., index].detach())

    hooks = [
        (f"blocks.{layer}.{ACTS_HOOK}", partial(detach, index=index))
        for layer, index in indices_by_layer(pair, features, pair.device).items()
    ]
    with pair.model.hooks(fwd_hooks=hooks):
        yield


@dataclass(frozen=True)
class FeatureRoles:
    """Features by their role, in the circuit and outside it."""

    features: tuple[CircuitFeature, ...]
    """The circuit's features in the order of the search, then the suppressors, strongest first."""
    templates: tuple[FeatureId, ...]
    """All alive features that are templates by formula, in the circuit or not; largest effect first."""
    bystanders: tuple[FeatureId, ...]
    """Features that fire before the word and do nothing for it, most active first."""
    threshold: float
    """Direct effect, in nats, from which a feature is an output feature."""
    log_odds_gap: float
    """Mean log-odds at the onsets, replacement less hybrid, in nats."""


@adapters_in_float32
def assign_roles(
    pair: PairedModel,
    onsets: Onsets,
    chosen: Sequence[FeatureId],
    alive: Bool[Tensor, "n_layers n_features"],
) -> FeatureRoles:
    """Assign a role to every feature of a circuit, and find suppressors and bystanders outside it.

    Args:
        pair: with adapters on every layer.
        onsets: of the select split.
        chosen: the features that the search found.
        alive: features that are considered at all.
    """
    pair.installed_adapters().require_own(chosen)
    at_onsets, at_controls = effects_at(pair, onsets), effects_at(pair, onsets, "control")
    continuation = effects_on_continuation(pair, onsets)
    threshold, continuation_threshold = (
        MIN_EFFECT_SHARE * float(e[alive].clamp(min=0).sum()) for e in (at_onsets.direct, continuation)
    )
    outputs = [f for f in chosen if float(at_onsets.direct[f]) >= threshold]
    through = at_onsets.total - effects_at(pair, onsets, constant=outputs).total
    for f in outputs:
        through[f] = 0.0  # they are constant themselves, so the difference is not an effect through output features

    def role(f: FeatureId) -> Role:
        if f in outputs:
            return "output"
        if float(through[f]) >= threshold:
            return "template"
        return "continuation" if float(continuation[f]) >= continuation_threshold else "other"

    def record(f: FeatureId, role: Role) -> CircuitFeature:
        effects = (
            at_onsets.direct,
            through,
            at_onsets.total,
            continuation,
            at_onsets.total - at_controls.total,
            at_onsets.activation,
        )
        return CircuitFeature(f, role, *(float(effect[f]) for effect in effects))

    outside = alive.clone()
    for f in chosen:
        outside[f] = False
    against = torch.minimum(at_onsets.total, at_controls.total)
    suppresses = outside & (against <= -threshold * MIN_SUPPRESSION_SHARE / MIN_EFFECT_SHARE)
    suppress = _ids(suppresses.nonzero(), against)
    template = alive & (at_onsets.direct < threshold) & (through >= threshold)
    idle = outside & (at_onsets.total.abs() < threshold / 10) & (at_controls.total.abs() < threshold / 10)
    bystands = idle & (at_onsets.rate > 0.05) & (at_onsets.rate >= 2 * at_controls.rate)
    return FeatureRoles(
        (*(record(f, role(f)) for f in chosen), *(record(f, "suppress") for f in suppress)),
        tuple(_ids(template.nonzero(), -through)),
        tuple(_ids(bystands.nonzero(), -at_onsets.activation)),
        threshold,
        at_onsets.log_odds - _log_odds_in_hybrid(pair, onsets),
    )


def _ids(indices: Tensor, order: Tensor) -> list[FeatureId]:
    """Features by rows of ``indices``, smallest of ``order`` first."""
    return sorted((FeatureId(*row) for row in indices.tolist()), key=lambda f: float(order[f]))


@torch.no_grad()
def _log_odds_in_hybrid(pair: PairedModel, onsets: Onsets) -> float:
    total = 0.0
    for _, batch in onsets.with_onsets().cut_after("onset").batches():
        batch = batch.to(pair.device)
        with pair.routed("hybrid"):
            total += float(log_odds(pair, final_residual(pair, batch.tokens), batch, batch.onset).sum())
    return total / max(1, int(onsets.onset.sum()))


@adapters_in_float32
def circuit_edges(pair: PairedModel, onsets: Onsets, features: Sequence[CircuitFeature]) -> tuple[CircuitEdge, ...]:
    """Measure direct effects on the word, and effects of the other features on the strongest output features.

    An edge between features is the effect on the target feature's pre-activation at the onsets, times the direct effect
    of a unit of that pre-activation on the word. So all edges are in nats of log-odds.
    """
    pair.installed_adapters().require_own(f.id for f in features)
    outputs = sorted((f for f in features if f.role == "output"), key=lambda f: -f.direct)
    edges = [CircuitEdge(f.id, None, f.direct) for f in features if f.role in ("output", "suppress")]
    sources = [f.id for f in features if f.role in ("template", "continuation")]
    texts = onsets.with_onsets(n=EDGE_DOCUMENTS).cut_after("onset")
    targets = [f for f in outputs[:MAX_EDGE_TARGETS] if f.id.layer > 0]
    if not sources or not targets or not len(texts):
        return tuple(edges)
    effects, activations = _effects_on_pre_activations(pair, texts, [f.id for f in targets])
    for f, effect, activation in zip(targets, effects, activations, strict=True):
        if activation > 0:
            per_unit = f.direct / max(activation, 1e-6)
            edges += [CircuitEdge(s, f.id, float(effect[s]) * per_unit) for s in sources if s.layer < f.id.layer]
    return tuple(edges)


def _effects_on_pre_activations(
    pair: PairedModel, onsets: Onsets, targets: Sequence[FeatureId]
) -> tuple[Float[Tensor, "n_targets n_layers n_features"], list[float]]:
    """Effects of all features on the targets' pre-activations where these fire, and the targets' activations.

    Both are means over the onsets. Of a batch the targets alone are kept, and gradients are taken under the gates,
    since blocks may be computed again for them.
    """
    shape, n = (pair.n_layers, pair.installed_adapters().n_features), int(onsets.onset.sum())
    effects, activations = torch.zeros(len(targets), *shape), torch.zeros(len(targets))
    for _, batch in onsets.batches():
        batch = batch.to(pair.device)
        gates = torch.ones(shape, device=pair.device, requires_grad=True)
        with torch.enable_grad(), gated(pair, dict(enumerate(gates))), \
                _recorded_features(pair, PRE_ACTS_HOOK, targets) as pre, \
                _recorded_features(pair, ACTS_HOOK, targets) as acts:  # fmt: skip
            final_residual(pair, batch.tokens)
            reads = [(pre[f] * ((acts[f] > 0) & batch.onset)).sum() for f in targets]
            for i, (f, read) in enumerate(zip(targets, reads, strict=True)):
                activations[i] += acts[f].detach()[batch.onset].sum().cpu()
                effects[i] += torch.autograd.grad(read, gates, retain_graph=f != targets[-1])[0].cpu()
    return effects / n, (activations / n).tolist()


@contextmanager
def _recorded_features(
    pair: PairedModel, point: str, features: Sequence[FeatureId]
) -> Iterator[dict[FeatureId, Float[Tensor, "batch pos"]]]:
    """The values of chosen features at ``blocks.{layer}.{point}`` in the latest forward pass, with their graphs."""
    latest: dict[FeatureId, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint, chosen: Sequence[FeatureId]) -> None:
        latest.update({f: value[..., f.index] for f in chosen})

    layers = {f.layer for f in features}
    chosen = {layer: [f for f in features if f.layer == layer] for layer in layers}
    hooks = [(f"blocks.{layer}.{point}", partial(keep, chosen=chosen[layer])) for layer in layers]
    with pair.model.hooks(fwd_hooks=hooks):
        yield latest
