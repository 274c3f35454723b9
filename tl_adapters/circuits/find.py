"""Find a circuit in the target's own text: its onsets, a search, the roles of features, and edges between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.l0 import active_counts
from tl_adapters.circuits.circuit import Circuit
from tl_adapters.circuits.onsets import Onsets, find_onsets
from tl_adapters.circuits.roles import FeatureRoles, assign_roles, circuit_edges
from tl_adapters.circuits.search import Search, SearchOptions, search_circuit
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.behaviors import Behavior, BehaviorError
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel, adapters_in_float32

FEWEST_ONSETS = 20
"""With fewer onsets on the select problems no circuit is searched."""


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


@adapters_in_float32
def find_circuit(
    pair: PairedModel,
    traces: Sequence[Trace],
    behavior: Behavior | None = None,
    *,
    split: str = "select",
    options: SearchOptions | None = None,
    progress: bool = True,
) -> FoundCircuit:
    """Find the circuit of a behavior in texts that the target wrote.

    Args:
        pair: with adapters on every layer.
        traces: the target's own responses (`generation.responses.traces_of`), to problems that are not reported on.
        behavior: hesitation by default.
        split: of the problems, recorded in the circuit.
        options: of the search.
        progress: show a bar.

    A target with fewer than `FEWEST_ONSETS` onsets has an empty circuit, whether words or a function define the
    behavior.

    Raises BehaviorError where there are no answers, for words that the tokenizer cannot write, and for adapters of
    which no feature fires although the behavior occurs.
    """
    behavior, options = behavior or Behavior(), options or SearchOptions()
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
        search = search_circuit(pair, onsets, alive, options, progress)
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
