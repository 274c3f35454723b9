"""Attribution graphs: from a token that the model is about to generate back to features and input tokens.

1. One forward pass on the replacement route gives the coefficients of the linearized replacement model (`relp`).
2. The targets are resolved: the likeliest next tokens, or the tokens, differences of tokens or features that are given.
3. The rows of the targets are computed, then those of active features, in batches. If there are more
   active features than ``max_feature_nodes``, the features with the largest influence on the targets come first, and
   influence is computed again after every batch (`rows`).
4. The nodes are the tokens and the features that have rows. Contributions from outside the graph (from other features,
   or from before the window) are summed per row, and so are the constants: with them every row adds up to the value of
   its target.

The method is that of arXiv 2602.20904 (attribution graphs with RelP, arXiv 2508.21258), the ranking circuit-tracer's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from tl_adapters.attribution.gradient import GradientModel, PromptModel
from tl_adapters.attribution.graph import LINEARIZATIONS, AttributionGraph, GraphError
from tl_adapters.attribution.provenance import provenance
from tl_adapters.attribution.relp import HIDDEN_AT_ONCE, KEPT_BYTES, LinearizedModel, large_coefficient_bytes
from tl_adapters.attribution.rows import GraphRows
from tl_adapters.attribution.targets import (
    DifferenceTarget,
    FeatureTarget,
    LogitTarget,
    ResolvedTarget,
    Target,
    absolute_position,
    cut_before,
    likeliest_next_tokens,
    resolve_target,
    token_label,
)
from tl_adapters.data.traces import GivenPrompt, Trace, prompt_token_ids
from tl_adapters.models.finite_activations import finite_blocks
from tl_adapters.models.paired_model import PairedModel, adapters_in_float32
from tl_adapters.utils.arguments import choice, items
from tl_adapters.utils.devices import seconds_of, seconds_to_write
from tl_adapters.utils.renamed import renamed_arguments

MOST_ROWS = 64
"""Most rows of a graph that are computed together, unless another number is given."""
GRADIENT_NUMBERS = 2**29
"""Most numbers of one gradient of all rows that are computed together (2 GB in float32)."""
PATTERN_PASSES = 15
"""What forming an attention pattern costs, in passes that write as many bytes (benchmarks/planner.py)."""
log = logging.getLogger(__name__)


@renamed_arguments(linearisation="linearization", mass="desired_logit_prob")
@adapters_in_float32
def attribute(
    pair: PairedModel,
    prompt: GivenPrompt,
    targets: Sequence[Target | str | int] | None = None,
    *,
    at: str | None = None,
    linearization: str = "relp",
    position: int = -1,
    desired_logit_prob: float = 0.95,
    max_logits: int = 10,
    max_feature_nodes: int = 5_000,
    exclude_bos: bool = False,
    window: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> AttributionGraph:
    """The attribution graph of one prompt on the pair's replacement route.

    Args:
        pair: a pair with adapters on every layer.
        prompt: the text as the model reads it (with chat tokens; nothing is added), token ids, or a document. The graph
            of a document that is not to be republished has no text of its tokens.
        targets: tokens (text or ids), or `LogitTarget`, `DifferenceTarget`, `FeatureTarget`. None selects the likeliest
            next tokens at ``position``, at most ``max_logits``, until they have ``desired_logit_prob`` together.
        at: a word in any spelling that is one token. The prompt ends before the first place that says it (in the
            response, of a document), and that token is the target unless ``targets`` are given.
        linearization: "relp"; "frozen_mlp" (base MLPs are constants and error nodes, circuit-tracer's scheme); or
            "gradient" (gradient times activation, for comparison: its rows do not add up to the target's value).
        position: the position of targets that do not have their own; a negative one counts from the end.
        desired_logit_prob, max_logits: see ``targets``.
        max_feature_nodes: the largest number of feature nodes; those with the most influence on the targets are kept.
        exclude_bos: leave features at the first position out of the graph, before anything is ranked.
        window: only the last ``window`` positions have nodes. Contributions from before them are summed in each row.
        batch_size: rows computed together; memory grows with batch_size x (positions x d_model + active features). None
            is 64, or fewer for a long prompt of a large model (`default_batch_size`).
        progress: show a progress bar.

    Returns:
        The graph. Its ``balance`` has the parts of every row and ``residual`` the conservation residual.

    Raises:
        GraphError: a target is not a single token, the prompt is longer than the context, a position is outside the
            prompt, no feature is active on the prompt, or the prompt does not say ``at``.
        ArgumentError: several prompts, token ids outside the vocabulary, or a plain text as ``targets``.
        PairMismatchError, VocabularyError: a layer has no adapter; ``at`` or a target is not a single token.
        NotFiniteError: activations are NaN or infinite.
    """
    trace = prompt if isinstance(prompt, Trace) else None
    tokens = prompt_token_ids(pair.model, prompt, GraphError)
    if at is not None:
        tokens, said = cut_before(pair, tokens, at, 0 if trace is None else trace.prompt_length)
        targets = [said] if targets is None else targets
    batch_size = default_batch_size(pair, len(tokens)) if batch_size is None else batch_size
    given = (linearization, position, desired_logit_prob, max_logits, max_feature_nodes, exclude_bos, window)
    options = _Options(*given, batch_size)
    if targets is not None:
        advice = "give tokens (texts or ids), LogitTarget, DifferenceTarget or FeatureTarget"
        targets = items(targets, (str, int, LogitTarget, DifferenceTarget, FeatureTarget), "targets", advice)
    graph = _attribute(pair, tokens, targets, options, progress)
    return graph if trace is None or trace.republish else graph.without_text()


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of `attribute`. Raises ArgumentError or GraphError for values out of range."""

    linearization: str
    position: int
    desired_logit_prob: float
    max_logits: int
    max_feature_nodes: int
    exclude_bos: bool
    window: int | None
    batch_size: int

    def __post_init__(self) -> None:
        choice(self.linearization, LINEARIZATIONS, "linearization")
        counts = {
            "max_feature_nodes": self.max_feature_nodes,
            "batch_size": self.batch_size,
            "window": 1 if self.window is None else self.window,
        }
        if too_small := {name: value for name, value in counts.items() if value < 1}:
            raise GraphError(f"Got {too_small}; give at least 1 for each.")

    def record(self) -> dict[str, Any]:
        """The options under their published names, for `AttributionGraph.about`."""
        return {
            "linearisation": self.linearization,
            "max_feature_nodes": self.max_feature_nodes,
            "max_n_logits": self.max_logits,
            "desired_logit_prob": self.desired_logit_prob,
            "batch_size": self.batch_size,
            "exclude_bos": self.exclude_bos,
            "window": self.window,
        }


def _attribute(
    pair: PairedModel,
    tokens: Int[Tensor, "pos"],
    targets: Sequence[Target | str | int] | None,
    options: _Options,
    progress: bool,
) -> AttributionGraph:
    """`attribute` with checked arguments."""
    start = 0 if options.window is None else max(0, len(tokens) - options.window)
    model = _prompt_model(pair, tokens, options.linearization, start)
    eligible = _eligible_features(model, start, options.exclude_bos)
    if targets is None:
        position = absolute_position(options.position, len(tokens))
        targets = likeliest_next_tokens(pair, model, position, options.desired_logit_prob, options.max_logits)
    resolved = [resolve_target(pair, model, target, options.position) for target in targets]
    _check_targets(resolved, start, options.window)
    n_rows = min(options.max_feature_nodes, int(eligible.sum()))
    if progress:
        # Which features get rows is found last, so each counts as one of the mean layer.
        mean_layer = float(model.active[eligible, 0].double().mean())
        layers = [*(target.layer for target in resolved), *[mean_layer] * n_rows]
        seconds = estimated_seconds(pair, len(tokens), len(tokens) - start, layers, options.batch_size)
        memory = estimated_memory(pair, len(tokens), len(model.active), options.batch_size, len(layers))
        log.info(
            "%s targets, %s active features, %s tokens: about %.0f s and %.2g GB beside the model.",
            *(f"{n:,}" for n in (len(layers), len(model.active), len(tokens))), seconds, memory / 1e9,
        )  # fmt: skip
    strings = [token_label(pair, token) for token in model.tokens.tolist()]
    with tqdm(total=n_rows + len(resolved), disable=not progress, unit="target", mininterval=1.0) as bar:
        rows = GraphRows(model, resolved, strings, options.batch_size, bar)
        graph = rows.graph(rows.add_features(eligible, n_rows))
    return replace(graph, about=provenance(pair) | {"active_features": len(model.active)} | options.record())


def _prompt_model(pair: PairedModel, tokens: Int[Tensor, "pos"], linearization: str, start: int) -> PromptModel:
    """The model that computes the rows, from one forward pass. Raises GraphError and NotFiniteError."""
    if linearization == "gradient" and start:
        raise GraphError("window= needs linearization 'relp' or 'frozen_mlp'; gradients have no window.")
    all_positions = torch.ones(1, len(tokens), dtype=torch.bool, device=pair.device)
    with finite_blocks(pair.model, pair.n_layers, all_positions, [0], "The replacement on this prompt"):
        if linearization == "gradient":
            return GradientModel(pair, tokens)
        return LinearizedModel(pair, tokens, cast("Literal['relp', 'frozen_mlp']", linearization), start)


def _eligible_features(model: PromptModel, start: int, exclude_bos: bool) -> Bool[Tensor, "n_active"]:
    """A mask of the active features that may become nodes. Raises GraphError if there are none."""
    eligible: Tensor = model.active[:, 1] >= start + (1 if exclude_bos and start == 0 else 0)
    if not bool(eligible.any()):
        raise GraphError(
            "No adapter feature is active on this prompt"
            + (" outside its first position" if exclude_bos else "")
            + ", so there is nothing to attribute to. Check that the adapters are trained and that the prompt is in "
            "the chat format."
        )
    return eligible


def _check_targets(targets: Sequence[ResolvedTarget], start: int, window: int | None) -> None:
    """Raises GraphError if there are no targets, or some stand before the window."""
    if not targets:
        raise GraphError("targets is empty; give at least one, or leave it out for the likeliest next tokens.")
    if early := [target.about.label for target in targets if target.position < start]:
        raise GraphError(
            f"The targets {', '.join(early)} are before the window of the last {window} positions; widen the window."
        )


def default_batch_size(pair: PairedModel, n_tokens: int) -> int:
    """Rows computed together: 64, or so many that a gradient of all of them has `GRADIENT_NUMBERS` numbers."""
    return max(1, min(MOST_ROWS, GRADIENT_NUMBERS // (n_tokens * pair.model.cfg.d_model)))


def estimated_memory(pair: PairedModel, n_tokens: int, n_active: int, batch_size: int, n_rows: int) -> int:
    """Bytes that a graph takes at most on the pair's device, beside the model and its adapters in float32.

    Args:
        pair: the pair.
        n_tokens: tokens of the prompt.
        n_active: active features on it.
        batch_size: rows computed together.
        n_rows: rows of the graph.
    """
    cfg, adapters = pair.model.cfg, pair.installed_adapters()
    width = torch.promote_types(cfg.dtype, torch.float32).itemsize
    large = large_coefficient_bytes(pair, n_tokens)
    # Beyond what is kept, one layer's at a time: recorded, cast, and its factors.
    large = large if large <= KEPT_BYTES else 2 * large // cfg.n_layers
    by_token = n_tokens * (adapters.n_features + 3 * cfg.d_model) * cfg.n_layers
    by_feature = n_active * cfg.d_model
    hidden = 2 * min(HIDDEN_AT_ONCE, batch_size * n_tokens * cfg.d_mlp)
    gradients = batch_size * (4 * n_tokens * cfg.d_model + 2 * n_active)
    # Edges, with a column of 4 bytes, are in the host's memory. A row has them from half of the layers, at half of the
    # positions.
    edges = (4 + width) * n_rows * n_active // 4 if pair.device.type == "cpu" else 0
    return int(large + width * (by_token + by_feature + hidden + gradients) + edges)


def estimated_seconds(
    pair: PairedModel, n_tokens: int, n_positions: int, layers: Sequence[float], batch_size: int
) -> float:
    """The seconds that a graph takes: products by the speed of a measured one, attention patterns by that of memory.

    Args:
        pair: the pair.
        n_tokens: tokens of the prompt.
        n_positions: positions of the prompt that have nodes.
        layers: the layer of each target of a row, of features and of the graph's own targets (n_layers for logits).
        batch_size: rows computed together.
    """
    cfg = pair.model.cfg
    mlp = 6 * cfg.d_model * cfg.d_mlp
    heads = cfg.n_heads + (cfg.n_key_value_heads or cfg.n_heads)
    attention = 2 * cfg.d_head * (cfg.d_model * heads + cfg.n_heads * n_tokens)
    above = sum(min(layer + 1, cfg.n_layers) for layer in layers)  # a feature is read after its layer's attention
    operations = n_positions * (sum(layers) * mlp + above * attention)
    n_patterns: float = cfg.n_layers
    if large_coefficient_bytes(pair, n_tokens) > KEPT_BYTES:
        # Every batch then forms the patterns of all layers that it passes.
        n_patterns = sum(min(layer + 1, cfg.n_layers) for layer in sorted(layers, reverse=True)[::batch_size])
    width = torch.promote_types(cfg.dtype, torch.float32).itemsize
    patterns = width * n_patterns * cfg.n_heads * n_tokens**2
    return seconds_of(operations, pair.device) + seconds_to_write(PATTERN_PASSES * patterns, pair.device)
