"""From a token the model is about to say back to the features and input tokens that made it: RelP attribution graphs.

1. One forward pass of the replacement; its coefficients are the linear model (`linear`).
2. The targets: the likeliest next tokens, or tokens, differences of tokens, or features that are asked for.
3. Rows of the targets, then of active features, batched by layer; where there are more than ``max_feature_nodes``, the
   features that matter most so far come first, judged anew after every batch.
4. The nodes are the features that have rows and the tokens. What targets owe to other leaves is summed per row and
   reported, as are the constants: with them every row adds up to its target's value.

Method: arXiv 2602.20904 (attribution graphs with RelP, arXiv 2508.21258), ranking as in circuit-tracer.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from tl_adapters.attribution.gradient import GradientModel
from tl_adapters.attribution.graph import AttributionGraph, GraphError, GraphTarget
from tl_adapters.attribution.pruning import influence
from tl_adapters.attribution.relp import LinearizedModel
from tl_adapters.attribution.targets import (
    DifferenceTarget,
    FeatureTarget,
    LogitTarget,
    ResolvedTarget,
    Target,
    absolute_position,
    likeliest_next_tokens,
    prompt_token_ids,
    resolve_target,
    token_label,
)
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.models.paired_model import PairedModel, adapters_in_float32
from tl_adapters.utils.arguments import choice, items
from tl_adapters.utils.finite import finite_blocks
from tl_adapters.utils.results import versions

log = logging.getLogger(__name__)

Linearization = Literal["relp", "frozen_mlp", "gradient"]


@dataclass
class _Edges:
    """What has been attributed so far, sparse; columns are all leaves: active features, errors, tokens."""

    rows: list[Tensor]
    columns: list[Tensor]
    weights: list[Tensor]
    nodes: list[int]
    balance: list[tuple[float, float, float, float]]
    """Per row: value, part from outside the window, constants, the decoder biases among them."""


@adapters_in_float32
def attribute(
    pair: PairedModel,
    prompt: str | Sequence[int] | Tensor,
    targets: Sequence[Target | str | int] | None = None,
    *,
    linearisation: str = "relp",
    position: int = -1,
    mass: float = 0.95,
    max_logits: int = 10,
    max_feature_nodes: int = 5_000,
    exclude_bos: bool = False,
    window: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> AttributionGraph:
    """The attribution graph of one prompt on the pair's replacement route.

    Args:
        pair: with adapters on every layer.
        prompt: text as the model reads it (chat tokens included, nothing is added), or token ids.
        targets: tokens (text or ids), or `LogitTarget`, `DifferenceTarget`, `FeatureTarget`; None takes the likeliest
            next tokens at ``position`` whose probabilities reach ``mass``, at most ``max_logits``.
        linearisation: "relp"; "frozen_mlp" (base MLPs are constants and nodes of their own, circuit-tracer's scheme);
            "gradient" (gradient times activation, which does not add up; to compare).
        position: of targets that name none; negative counts from the end.
        mass, max_logits: see ``targets``.
        max_feature_nodes: features that become nodes at most, those of the largest influence on the targets.
        exclude_bos: features at the first position are no nodes; taken out before anything is ranked.
        window: only the last so many positions are nodes; what comes from before is summed in each row.
        batch_size: targets at a time; memory is this times (positions x d_model + active features).
        progress: show a bar.

    Returns:
        The graph, with the conservation residual of every row in ``graph.balance``.

    Raises:
        GraphError: a target of several tokens, a prompt longer than the context, positions that are not there, a
            prompt on which no feature is active.
        ArgumentError: several prompts at once, ids outside the vocabulary, a text as ``targets``.
        PairMismatchError: adapters missing on some layers.
        NotFiniteError: activations that are NaN or infinite.
    """
    choice(linearisation, get_args(Linearization), "linearisation")
    if targets is not None:
        advice = "give tokens (texts or ids), LogitTarget, DifferenceTarget or FeatureTarget"
        targets = items(targets, (str, int, LogitTarget, DifferenceTarget, FeatureTarget), "targets", advice)
    counts = {
        "max_feature_nodes": max_feature_nodes,
        "batch_size": batch_size,
        "window": 1 if window is None else window,
    }
    if wrong := {name: value for name, value in counts.items() if value < 1}:
        raise GraphError(f"Got {wrong}; at least 1 each.")
    tokens = prompt_token_ids(pair, prompt)
    start = 0 if window is None else max(0, len(tokens) - window)
    if linearisation == "gradient" and start:
        raise GraphError("window= needs linearisation 'relp' or 'frozen_mlp': a gradient knows no window.")
    everywhere = torch.ones(1, len(tokens), dtype=torch.bool, device=pair.model.W_E.device)
    with finite_blocks(pair.model, pair.n_layers, everywhere, [0], "The replacement on this prompt"):
        model: LinearizedModel | GradientModel
        if linearisation == "gradient":
            model = GradientModel(pair, tokens)
        else:
            model = LinearizedModel(pair, tokens, "frozen_mlp" if linearisation == "frozen_mlp" else "relp", start)
    eligible = model.active[:, 1] >= start + (1 if exclude_bos and start == 0 else 0)
    if not bool(eligible.any()):
        raise GraphError(
            "No adapter feature is active on this prompt"
            + (" outside its first position" if exclude_bos else "")
            + ": there is nothing to attribute to. Are these trained adapters, and is the prompt in the chat format?"
        )
    if targets is None:
        targets = likeliest_next_tokens(pair, model, absolute_position(position, len(tokens)), mass, max_logits)
    resolved = [resolve_target(pair, model, target, position) for target in targets]
    if not resolved:
        raise GraphError("targets is empty; name at least one, or leave it out for the likeliest next tokens.")
    if early := [t.about.label for t in resolved if t.position < start]:
        raise GraphError(f"{', '.join(early)}: before the window of the last {window} positions. Widen the window.")
    n_rows = min(max_feature_nodes, int(eligible.sum()))
    if progress:
        log.info("%s", estimate(pair, len(tokens) - start, len(model.active), n_rows + len(resolved), batch_size))
    edges = _Edges([], [], [], [], [])
    first_target = len(model.active) + _n_errors(model) + len(tokens)
    with tqdm(total=n_rows + len(resolved), disable=not progress, unit="target", mininterval=1.0) as bar:
        _attribute_batch(model, resolved, [first_target + i for i in range(len(resolved))], edges, batch_size, bar)
        chosen = _attribute_features(pair, model, resolved, edges, eligible, n_rows, batch_size, bar)
    graph = _assemble(pair, model, resolved, edges, chosen, adds_up=linearisation != "gradient")
    options = {
        "linearisation": linearisation,
        "max_feature_nodes": max_feature_nodes,
        "max_n_logits": max_logits,
        "desired_logit_prob": mass,
        "batch_size": batch_size,
        "exclude_bos": exclude_bos,
        "window": window,
    }
    return replace(graph, about=_origin(pair) | {"active_features": len(model.active)} | options)


def _origin(pair: PairedModel) -> dict[str, Any]:
    """Which models and adapters a graph is of, and what it was made with."""
    return {
        "route": "replacement",
        "base": pair.base_id,
        "target": pair.target_id,
        "fingerprints": _fingerprints(pair),
        "d_vocab": pair.model.cfg.d_vocab,
        "versions": versions(),
    }


def require_same_pair(pair: PairedModel, graph: AttributionGraph) -> None:
    """Raises GraphError where a graph is of other adapters or models than the pair's, by fingerprint."""
    differs = differing(graph.about.get("fingerprints") or {}, _fingerprints(pair))
    if differs:
        raise GraphError(
            f"The graph was made in a pair whose {' and '.join(differs)} are others than here, by fingerprint: its "
            "features mean nothing here. Open the pair it was made in, or attribute the prompt in this one."
        )


def _fingerprints(pair: PairedModel) -> dict[str, str]:
    return {**pair.fingerprints, **pair.installed_adapters().fingerprints}


# -- rows --------------------------------------------------------------------------------------------------------------


def _n_errors(model: LinearizedModel | GradientModel) -> int:
    frozen = isinstance(model, LinearizedModel) and model.linearisation == "frozen_mlp"
    return model.n_layers * model.n_tokens if frozen else 0


def _attribute_batch(
    model: LinearizedModel | GradientModel,
    targets: Sequence[ResolvedTarget],
    nodes: Sequence[int],
    edges: _Edges,
    batch_size: int,
    bar: Any,
) -> None:
    """Add rows of any targets: sorted by layer and position, so that a batch shares its pass and its length."""
    order = sorted(range(len(targets)), key=lambda i: (targets[i].layer, targets[i].position))
    for batch in _batches(order, targets, batch_size):
        chosen = [targets[i] for i in batch]
        device = model.activations.device
        positions = torch.tensor([t.position for t in chosen], device=device)
        rows = model.rows(chosen[0].layer, positions, torch.stack([t.vector for t in chosen]))
        outside, biases, decoder_biases = torch.stack([rows.outside, rows.biases, rows.decoder_biases]).tolist()
        dense = torch.cat([rows.features, *([rows.errors.flatten(1)] if _n_errors(model) else []), rows.tokens], 1)
        where = dense.nonzero()
        edges.rows.append(torch.tensor(batch_nodes := [nodes[i] for i in batch])[where[:, 0].cpu()])
        edges.columns.append(where[:, 1].cpu())
        edges.weights.append(dense[tuple(where.T)].cpu())
        edges.nodes += batch_nodes
        edges.balance += [
            (t.value, before, bias + decoders + t.constant, decoders)
            for t, before, bias, decoders in zip(chosen, outside, biases, decoder_biases, strict=True)
        ]
        bar.update(len(batch))


def _batches(order: Sequence[int], targets: Sequence[ResolvedTarget], size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or targets[i].layer != targets[batch[0]].layer):
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _attribute_features(
    pair: PairedModel,
    model: LinearizedModel | GradientModel,
    resolved: Sequence[ResolvedTarget],
    edges: _Edges,
    eligible: Tensor,
    n_rows: int,
    batch_size: int,
    bar: Any,
) -> Tensor:
    """Add rows of features until ``n_rows`` have theirs; returns which, as a mask over the active ones."""
    done = torch.zeros(len(model.active), dtype=torch.bool)
    eligible, active = eligible.cpu(), _Active(model)
    while (left := n_rows - int(done.sum())) > 0:
        if n_rows == int(eligible.sum()):
            batch = (eligible & ~done).nonzero()[:, 0]  # all of them: no order to find
        else:
            everything = torch.ones(len(model.active), dtype=torch.bool)
            so_far = _assemble(pair, model, resolved, edges, everything)
            score = influence(so_far)[: len(model.active)]
            score[done | ~eligible] = -1.0
            batch = score.topk(min(left, max(batch_size, n_rows // 16))).indices
        targets = [active.target(model, column) for column in batch.tolist()]
        _attribute_batch(model, targets, batch.tolist(), edges, batch_size, bar)
        done[batch] = True
    return done


class _Active:
    """The active features as targets; what is known of all of them is read from the device at once."""

    def __init__(self, model: LinearizedModel | GradientModel) -> None:
        values, constants = [], []
        for layer, (start, stop) in enumerate(itertools.pairwise(model.offsets)):
            _, position, index = model.active[start:stop].T
            values.append(model.pre_activations[layer][position, index])
            constants.append(model.b_enc[layer][index])
        self.places = model.active.tolist()
        self.values, self.constants = torch.stack([torch.cat(values), torch.cat(constants)]).tolist()

    def target(self, model: LinearizedModel | GradientModel, column: int) -> ResolvedTarget:
        """One of them, by its column."""
        layer, position, index = self.places[column]
        vector, about = model.encoders[layer][:, index], GraphTarget("", position, 1.0)
        return ResolvedTarget(layer, position, vector, self.values[column], self.constants[column], about)


# -- the graph ---------------------------------------------------------------------------------------------------------


def _assemble(
    pair: PairedModel,
    model: LinearizedModel | GradientModel,
    resolved: Sequence[ResolvedTarget],
    edges: _Edges,
    chosen: Tensor,
    adds_up: bool = True,
) -> AttributionGraph:
    """Renumber columns to nodes, and sum per row what goes to leaves that are none."""
    n_active, n_errors, n_tokens = len(model.active), _n_errors(model), model.n_tokens
    errors = torch.tensor([[layer, pos] for layer in range(model.n_layers) for pos in range(n_tokens)][:n_errors])
    is_node = torch.ones(n_active + n_errors + n_tokens + len(resolved), dtype=torch.bool)
    is_node[:n_active] = chosen
    numbers = is_node.cumsum(0) - 1
    rows, columns, weights = (torch.cat(parts) for parts in (edges.rows, edges.columns, edges.weights))
    order = torch.tensor(edges.nodes)
    place = torch.zeros(len(is_node), dtype=torch.long)
    place[order] = torch.arange(len(order))
    kept = is_node[columns]
    to_nodes, dropped = (
        torch.zeros(len(order), dtype=weights.dtype).index_add_(0, place[rows[part]], weights[part])
        for part in (kept, ~kept)
    )
    values, outside, constants, decoder_biases = torch.tensor(edges.balance, dtype=weights.dtype).T
    if not adds_up:  # what is left over stands with the constants
        constants = values - to_nodes - dropped
    by_row = torch.argsort(rows[kept], stable=True)
    row_order = torch.argsort(order)
    return AttributionGraph(
        tokens=model.tokens,
        strings=[token_label(pair, token) for token in model.tokens.tolist()],
        n_layers=model.n_layers,
        features=model.active.cpu()[chosen],
        activations=model.activations.cpu()[chosen],
        errors=errors.reshape(-1, 2).long(),
        targets=[target.about for target in resolved],
        edges=torch.stack([numbers[rows[kept]], numbers[columns[kept]]])[:, by_row],
        weights=weights[kept][by_row],
        rows=numbers[order][row_order],
        balance=torch.stack([values, to_nodes, dropped + outside, constants], 1)[row_order],
        decoder_biases=decoder_biases[row_order],
    )


def estimate(pair: PairedModel, n_tokens: int, n_active: int, n_rows: int, batch_size: int) -> str:
    """What the rows will take, in a line: floating-point operations from the shapes, seconds by a short measurement."""
    cfg = pair.model.cfg
    per_position = 6 * cfg.d_model * cfg.d_mlp + 4 * cfg.d_model * cfg.n_heads * cfg.d_head
    attention = 2 * n_tokens * cfg.n_heads * cfg.d_head
    # a target sits, on average, half way down and half way along
    operations = n_rows * cfg.n_layers / 2 * n_tokens / 2 * (2 * per_position + attention)
    size = 4 if cfg.dtype != torch.float64 else 8
    patterns = cfg.n_layers * cfg.n_heads * n_tokens**2
    memory = size * (patterns + batch_size * (3 * n_tokens * cfg.d_mlp + 2 * n_active))
    return (
        f"{n_rows:,} targets, {n_active:,} active features, {n_tokens:,} positions: about "
        f"{_seconds(operations, pair.model.W_E.device):.0f} s and {memory / 1e9:.2g} GB beside the model."
    )


def _seconds(operations: float, device: torch.device) -> float:
    """Time of so many operations on ``device``, judged by a matrix product."""
    side = 512
    a = torch.ones(side, side, device=device)
    (a @ a).sum().item()
    began = time.perf_counter()
    (a @ a @ a @ a).sum().item()
    return operations * (time.perf_counter() - began) / (3 * 2 * side**3) * 2
