"""What each feature does for a word, by formula: output, template, continuation, suppressor, bystander.

All effects are on the margin (log-odds of the words), in nats, first order: activation times gradient in the real,
nonlinear replacement, summed over every position that reaches a moment and averaged over moments.

* *direct*: what a feature writes at the moment itself (and at a phrase's later tokens), read by final norm and
  unembedding, nothing in between;
* *total*: along all paths;
* *through output features*: total, less total with the output features' activations held constant;
* *on what follows*: total, but on the log-odds of the tokens that come after the word.

An effect counts from `SHARE` of the summed positive effects of its kind, over all features asked: the final norm makes
the margin flat where much is written, so nats mean little by themselves. A feature of the circuit is

    output        its direct effect counts
    template      it does not, and one through output features is positive and as large
    continuation  neither, and its effect on what follows counts
    other         none of these: the search took it for what it does together with others

(Section 5 of arXiv 2602.20904 sorts by looking at features; here nothing is looked at.) Outside the circuit,
*suppressors* have a total of `SUPPRESSES` of that sum below zero, at moments or at boundaries. *Bystanders* fire at
twice the rate at moments that they have at boundaries, with a total effect of less than a tenth of what counts:
correlates of hesitation, not causes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import CircuitEdge, CircuitFeature, Role
from tl_adapters.circuits.onsets import Onsets, final_residual, log_odds
from tl_adapters.interventions.feature_edits import gated, indices_by_layer
from tl_adapters.models.paired_model import ACTS_HOOK, PRE_ACTS_HOOK, PairedModel, adapters_in_float32
from tl_adapters.utils.precision import at_least_float32

SHARE = 0.001
"""Of the summed positive effects of all features, from which one effect counts."""
SUPPRESSES = 0.01
"""Of the same sum, with the other sign: what a suppressor does at least."""
EDGE_TARGETS, EDGE_DOCUMENTS = 12, 40
"""Output features whose edges are read, and documents they are read on."""


@dataclass(frozen=True)
class Effects:
    """Mean effects of every feature on the margin, over places of one kind."""

    direct: Float[Tensor, "n_layers n_features"]
    """Along no other module, in nats."""
    total: Float[Tensor, "n_layers n_features"]
    """Along all paths."""
    activation: Float[Tensor, "n_layers n_features"]
    """Mean activation at the places, in decoder-norm units."""
    rate: Float[Tensor, "n_layers n_features"]
    """Share of the places where it fires."""
    log_odds: float
    """Mean log-odds of the behavior, in nats."""


@adapters_in_float32
def effects_at(
    pair: PairedModel,
    onsets: Onsets,
    at: str = "onset",
    held: Sequence[FeatureId] = (),
    tokens_per_batch: int = 4096,
) -> Effects:
    """Effects over the places ``at`` ("onset" or "control"), with the activations of ``held`` features constant.

    Raises InterventionError for features that are not there.
    """
    adapters = pair.installed_adapters()
    shape, device = (pair.n_layers, adapters.n_features), pair.model.W_E.device
    norms = torch.stack([adapter.W_dec.detach().float().norm(dim=-1) for adapter in adapters])
    direct, total, activation, rate = torch.zeros(4, *shape, device=device)
    odds, n = 0.0, 0
    for _, batch in onsets.having(at).batches(tokens_per_batch):
        batch = batch.to(device)
        places = getattr(batch, at)
        gates = torch.ones(shape, device=device, requires_grad=True)
        with torch.enable_grad(), _constant(pair, held), gated(pair, dict(enumerate(gates))), \
                pair.recorded(ACTS_HOOK) as acts, _recorded_post_norms(pair) as scales:  # fmt: skip
            residual = final_residual(pair, batch.tokens)
            said = log_odds(pair, residual, batch, places)
            through, reads = torch.autograd.grad(said.sum(), [gates, residual])
        total += through.detach()
        odds, n = odds + float(said.detach().sum()), n + len(said)
        # Indices once per batch, for a mask makes the device wait at every use.
        read = reads.ne(0).any(-1).nonzero(as_tuple=True)  # the places, and where phrases that begin there go on
        where = places.nonzero(as_tuple=True)
        reads = at_least_float32(reads[read])
        for layer in range(pair.n_layers):
            through_norm = reads if layer not in scales else reads / scales[layer].detach()[read].to(reads)
            rows = _into_residual(pair, adapters[layer].W_dec.detach(), layer).to(reads)
            direct[layer] += (acts[layer].detach()[read] * (through_norm @ rows.T)).sum(0)
            here = acts[layer].detach()[where]
            activation[layer] += here.sum(0).float() * norms[layer]
            rate[layer] += (here > 0).sum(0).float()
    n = max(1, n)
    direct, total, activation, rate = ((part / n).cpu() for part in (direct, total, activation, rate))
    return Effects(direct, total, activation, rate, odds / n)


def _into_residual(pair: PairedModel, rows: Tensor, layer: int) -> Tensor:
    """Decoder rows times a post-norm's weight; its scale differs by position (`_recorded_post_norms`)."""
    name = f"blocks.{layer}.ln2_post"
    weight = pair.backend.norm(name) if hasattr(pair.model.blocks[layer], "ln2_post") else None
    return rows if weight is None else rows * weight.to(rows)


@contextmanager
def _recorded_post_norms(pair: PairedModel) -> Iterator[dict[int, Tensor]]:
    """Layer -> what the norm after the MLP divides by, [batch, pos, 1]; empty for a model without post-norms."""
    if not any(hasattr(block, "ln2_post") for block in pair.model.blocks):
        yield {}
        return
    with pair.recorded("ln2_post.hook_scale") as scales:
        yield scales


@adapters_in_float32
def effects_on_what_follows(
    pair: PairedModel, onsets: Onsets, tokens_per_batch: int = 4096
) -> Float[Tensor, "n_layers n_features"]:
    """Mean total effect of every feature on the log-odds of the tokens that come after the word, in nats."""
    shape, device = (pair.n_layers, pair.installed_adapters().n_features), pair.model.W_E.device
    total, n = torch.zeros(shape), 0
    for _, batch in onsets.with_onsets().batches(tokens_per_batch):
        batch = batch.to(device)
        next_tokens = batch.tokens.roll(-1, dims=1)[batch.continuation][:, None]
        gates = torch.ones(shape, device=device, requires_grad=True)
        with torch.enable_grad(), gated(pair, dict(enumerate(gates))):
            logits = at_least_float32(pair.unembed(final_residual(pair, batch.tokens)[batch.continuation]))
            others = logits.scatter(1, next_tokens, -torch.inf).logsumexp(1)
            odds = logits.gather(1, next_tokens)[:, 0] - others
        total += torch.autograd.grad(odds.sum(), gates)[0].cpu()
        n += len(odds)
    return total / max(1, n)


@contextmanager
def _constant(pair: PairedModel, features: Sequence[FeatureId]) -> Iterator[None]:
    """Chosen activations keep their values and pass no gradient on."""

    def detach(acts: Tensor, hook: HookPoint, index: Tensor) -> Tensor:
        return acts.index_copy(-1, index, acts[..., index].detach())

    hooks = [
        (f"blocks.{layer}.{ACTS_HOOK}", partial(detach, index=index))
        for layer, index in indices_by_layer(pair, features, pair.model.W_E.device).items()
    ]
    with pair.model.hooks(fwd_hooks=hooks):
        yield


@dataclass(frozen=True)
class Sorted:
    """Features by what they do."""

    features: tuple[CircuitFeature, ...]
    """The circuit's, in the search's order, then the suppressors, strongest first."""
    templates: tuple[FeatureId, ...]
    """Every feature asked that a template's formula holds of, in the circuit or not; largest effect first."""
    bystanders: tuple[FeatureId, ...]
    """Features that fire before the word and do nothing for it, most active first."""
    threshold: float
    """Direct effect from which a feature is an output feature, in nats."""
    gap: float
    """Mean margin at the moments, replacement less hybrid."""


@adapters_in_float32
def sort_features(
    pair: PairedModel,
    onsets: Onsets,
    chosen: Sequence[FeatureId],
    alive: Bool[Tensor, "n_layers n_features"],
) -> Sorted:
    """Give every feature of a circuit its role, and find suppressors and bystanders outside it.

    Args:
        pair: with adapters on every layer.
        moments: of the select split.
        chosen: what the search found.
        alive: features that are asked at all.
    """
    pair.installed_adapters().require_own(chosen)
    here, elsewhere = effects_at(pair, onsets), effects_at(pair, onsets, "control")
    continuation = effects_on_what_follows(pair, onsets)
    threshold, threshold_follows = (SHARE * float(e[alive].clamp(min=0).sum()) for e in (here.direct, continuation))
    outputs = [f for f in chosen if float(here.direct[f]) >= threshold]
    through = here.total - effects_at(pair, onsets, held=outputs).total
    for f in outputs:
        through[f] = 0.0  # held themselves, their gates pass nothing on: the difference would say nothing

    def role(f: FeatureId) -> Role:
        if f in outputs:
            return "output"
        if float(through[f]) >= threshold:
            return "template"
        return "continuation" if float(continuation[f]) >= threshold_follows else "other"

    def record(f: FeatureId, role: Role) -> CircuitFeature:
        effects = (here.direct, through, here.total, continuation, here.total - elsewhere.total, here.activation)
        return CircuitFeature(f, role, *(float(effect[f]) for effect in effects))

    outside = alive.clone()
    for f in chosen:
        outside[f] = False
    against = torch.minimum(here.total, elsewhere.total)
    against_it = outside & (against <= -threshold * SUPPRESSES / SHARE)
    suppress = _ids(against_it.nonzero(), against)
    template = alive & (here.direct < threshold) & (through >= threshold)
    idle = outside & (here.total.abs() < threshold / 10) & (elsewhere.total.abs() < threshold / 10)
    before = idle & (here.rate > 0.05) & (here.rate >= 2 * elsewhere.rate)
    return Sorted(
        (*(record(f, role(f)) for f in chosen), *(record(f, "suppress") for f in suppress)),
        tuple(_ids(template.nonzero(), -through)),
        tuple(_ids(before.nonzero(), -here.activation)),
        threshold,
        here.log_odds - _log_odds_in_hybrid(pair, onsets),
    )


def _ids(found: Tensor, order: Tensor) -> list[FeatureId]:
    """Smallest of ``order`` first."""
    return sorted((FeatureId(*row) for row in found.tolist()), key=lambda f: float(order[f]))


@torch.no_grad()
def _log_odds_in_hybrid(pair: PairedModel, onsets: Onsets) -> float:
    total = 0.0
    for _, batch in onsets.with_onsets().batches():
        batch = batch.to(pair.model.W_E.device)
        with pair.routed("hybrid"):
            total += float(log_odds(pair, final_residual(pair, batch.tokens), batch, batch.onset).sum())
    return total / max(1, int(onsets.onset.sum()))


@adapters_in_float32
def circuit_edges(pair: PairedModel, onsets: Onsets, features: Sequence[CircuitFeature]) -> tuple[CircuitEdge, ...]:
    """Edges of the drawing: direct effects on the word, and effects of the others on the strongest output features.

    An edge between features is the effect on the target's pre-activation at the moments, times what a unit of that
    pre-activation does directly for the word: so all edges are in nats of the margin.
    """
    pair.installed_adapters().require_own(f.id for f in features)
    outputs = sorted((f for f in features if f.role == "output"), key=lambda f: -f.direct)
    edges = [CircuitEdge(f.id, None, f.direct) for f in features if f.role in ("output", "suppress")]
    sources = [f.id for f in features if f.role in ("template", "continuation")]
    texts = onsets.with_onsets(EDGE_DOCUMENTS)
    if not sources or not len(texts):
        return tuple(edges)
    device = pair.model.W_E.device
    batch = texts.to(device)
    gates = torch.ones(pair.n_layers, pair.installed_adapters().n_features, device=device, requires_grad=True)
    with torch.enable_grad(), gated(pair, dict(enumerate(gates))), pair.recorded(PRE_ACTS_HOOK) as pre, \
            pair.recorded(ACTS_HOOK) as acts:  # fmt: skip
        final_residual(pair, batch.tokens)
    for f in outputs[:EDGE_TARGETS]:
        fires = (acts[f.id.layer][..., f.id.index] > 0) & batch.onset
        mean = acts[f.id.layer].detach()[..., f.id.index][batch.onset].mean()
        if f.id.layer == 0 or not bool(fires.any()):
            continue
        reads = pre[f.id.layer][..., f.id.index][fires].sum() / int(batch.onset.sum())
        (gradient,) = torch.autograd.grad(reads, gates, retain_graph=True)
        weights = (gradient * (f.direct / mean.clamp(min=1e-6))).cpu()
        edges += [CircuitEdge(s, f.id, float(weights[s])) for s in sources if s.layer < f.id.layer]
    return tuple(edges)
