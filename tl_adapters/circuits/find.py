"""From a target's own text to its circuit: moments, search, roles, edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_adapters.adapters.l0 import active_counts
from tl_adapters.circuits.circuit import Circuit
from tl_adapters.circuits.onsets import Onsets, find_onsets
from tl_adapters.circuits.roles import Sorted, circuit_edges, sort_features
from tl_adapters.circuits.search import Search, SearchOptions, search_circuit
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.behaviors import Behavior, BehaviorError
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel, adapters_in_float32

FEWEST_ONSETS = 20
"""With fewer moments on the select problems there is no behaviour to find a circuit of."""


@dataclass(frozen=True)
class Found:
    """A circuit with what it was found in."""

    circuit: Circuit
    """Features and roles; empty where there was nothing to find."""
    onsets: Onsets
    """Of the select problems."""
    alive: Bool[Tensor, "n_layers n_features"]
    """Features that fired often enough to be asked."""
    firings: Float[Tensor, "n_layers n_features"]
    """Summed activation in decoder-norm units over the select texts."""
    l0: float
    """Active features per token and layer."""
    search: Search | None
    """How the search went; None where there was nothing to search."""
    roles: Sorted | None
    """Everything that was sorted."""


@adapters_in_float32
def find_circuit(
    pair: PairedModel,
    traces: Sequence[Trace],
    behaviour: Behavior | None = None,
    *,
    split: str = "select",
    options: SearchOptions | None = None,
    progress: bool = True,
) -> Found:
    """Moments, search and roles, in texts that the target wrote.

    Args:
        pair: with adapters on every layer.
        traces: the target's own responses (`benchmarks.traces_of`), of problems that nothing is reported on.
        behaviour: hesitation by default.
        split: of the problems, recorded in the circuit.
        options: of the search.
        progress: show a bar.

    A target with fewer than `FEWEST_ONSETS` moments has an empty circuit, whether words or a function say so. Raises
    BehaviourError where there are no answers, for words that the tokenizer cannot write, and for adapters that are dead
    where there is something to find.
    """
    behaviour, options = behaviour or Behavior(), options or SearchOptions()
    adapters = pair.installed_adapters()
    words = behaviour.tokens(pair, traces)
    onsets = find_onsets(pair, traces, behaviour, tuple(words.values()))
    fired, activation, l0 = _activity(pair, onsets)
    alive = fired >= ALIVE_FIRINGS * min(1.0, int(onsets.predicting.sum()) / 100_000)
    alive &= fired > 0
    search = roles = None
    if int(onsets.onset.sum()) >= FEWEST_ONSETS:
        if not bool(alive.any()):
            raise BehaviorError("No feature of these adapters fires on the target's text; train them first.")
        search = search_circuit(pair, onsets, alive, options, progress)
        roles = sort_features(pair, onsets, search.order, alive)
    circuit = Circuit(
        behaviour=behaviour.name,
        words=tuple(words),
        phrases=tuple(ids if isinstance(ids, tuple) else (ids,) for ids in words.values()),
        function=behaviour.function,
        features=() if roles is None else roles.features,
        strength=options.strength,
        split=split,
        fingerprints={**pair.fingerprints, **adapters.fingerprints},
        n_features=adapters.n_features,
        n_layers=pair.n_layers,
        threshold=0.0 if roles is None else roles.threshold,
        edges=() if roles is None else circuit_edges(pair, onsets, roles.features),
    )
    return Found(circuit, onsets, alive, activation, l0, search, roles)


@torch.no_grad()
def _activity(pair: PairedModel, onsets: Onsets) -> tuple[Tensor, Tensor, float]:
    """Firings and summed activation (in decoder-norm units) of every feature over a text, and the mean L0."""
    adapters = pair.installed_adapters()
    device = pair.model.W_E.device
    fired = torch.zeros(pair.n_layers, adapters.n_features, device=device)
    activation, n, active = torch.zeros_like(fired), 0, torch.zeros((), dtype=torch.long, device=device)
    norms = torch.stack([adapter.W_dec.detach().float().norm(dim=-1).cpu() for adapter in adapters])
    for _, batch in onsets.batches():
        batch = batch.to(device)
        real = batch.predicting
        with pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
            pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
        n += int(real.sum())
        for layer in range(pair.n_layers):
            active += active_counts(acts[layer], real).sum()
            here = acts[layer][real].float()
            fired[layer] += (here > 0).sum(0)
            activation[layer] += here.sum(0)
    fired, activation = fired.cpu(), activation.cpu()
    return fired, activation * norms, float(active) / max(1, n * pair.n_layers)
