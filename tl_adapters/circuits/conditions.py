"""The conditions of a study: named interventions, made from a circuit and from what it is compared with.

A condition is a `Variant` under a name that results.json uses. There are three groups:

* *removals*: the replacement without a set of features (the circuit, a part of it, or other features);
* *baselines*: the replacement under an intervention that needs no features (banned words, a bias on their logits,
  steering, neurons, low rank);
* *insertions*: the hybrid with a set of features added.

Matched random sets stand beside each group; they are drawn several times, so they are kept as sets (`FeatureSets`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.control_strengths import TunedCondition
from tl_adapters.circuits.controls import (
    commonest_alternative,
    inserted_in_part,
    matched_features,
    matched_order,
    most_active_others,
)
from tl_adapters.circuits.roles import effects_at
from tl_adapters.circuits.search import FoundCircuit, SearchOptions, search_circuit
from tl_adapters.circuits.steering import banned, banned_neighbors
from tl_adapters.interventions.variants import Variant, with_only, without
from tl_adapters.models.paired_model import PairedModel

CONTROL_SETS = ("random_scaled", "random_equal_harm", "others", "others_scaled", "others_equal_harm")
"""Sets of other features that are removed, beside matched random sets of the circuit's size."""
TUNED_BASELINES = ("logit_bias", "steering", "neurons", "low_rank")
"""Baselines whose strength is set to the circuit's own effect."""


@dataclass(frozen=True)
class FeatureSets:
    """The circuit and the sets of features that it is compared with."""

    circuit: tuple[FeatureId, ...]
    """Promoting features, in the order in which the search took them."""
    output: tuple[FeatureId, ...]
    """Those of the circuit that raise the word directly."""
    template: tuple[FeatureId, ...]
    """Those of the circuit that raise it through output features."""
    random: tuple[tuple[FeatureId, ...], ...]
    """Matched random sets: equal in size and layer, and as near in activation as there are features."""
    others: tuple[FeatureId, ...]
    """As many of the most active other features."""
    orders: Mapping[str, Sequence[FeatureId]]
    """"random" and "others": the order in which features join a control set that is enlarged."""
    random_orders: tuple[tuple[FeatureId, ...], ...]
    """That order for each of the matched random sets."""
    write_norms: Float[Tensor, "n_layers n_features"]
    """Of every feature its mean activation at the onsets, times the norm of its decoder row."""
    activation_shares: Mapping[str, float]
    """Share of the summed activation at onsets and matched controls in "circuit", "random" and "others"."""

    @property
    def parts(self) -> dict[str, tuple[FeatureId, ...]]:
        """The circuit and its two largest roles, by the names that conditions have."""
        return {"output": self.output, "template": self.template, "circuit": self.circuit}


def choose_feature_sets(pair: PairedModel, found: FoundCircuit, n_random: int, seed: int) -> FeatureSets:
    """Choose the control sets of a circuit on the select split.

    Args:
        pair: with adapters on every layer.
        found: the circuit with the texts it was found in.
        n_random: matched random sets.
        seed: of their draws.
    """
    circuit = found.promoting
    at_onsets, at_controls = (effects_at(pair, found.onsets, at) for at in ("onset", "control"))
    activation = at_onsets.activation + at_controls.activation
    generator = torch.Generator().manual_seed(seed)
    random = [matched_features(circuit, activation, found.alive, generator) for _ in range(n_random)]
    every_other = most_active_others(circuit, activation, found.alive, activation.numel())
    others = every_other[: len(circuit)]
    random_orders = [matched_order(circuit, first, activation, found.alive, generator) for first in random]

    def summed(features: Sequence[FeatureId]) -> float:
        return float(sum(activation[f] for f in features))

    total = float(activation.sum())
    return FeatureSets(
        circuit=tuple(circuit),
        output=tuple(found.circuit.ids("output")),
        template=tuple(found.circuit.ids("template")),
        random=tuple(map(tuple, random)),
        others=tuple(others),
        orders={"random": random_orders[0], "others": every_other},
        random_orders=tuple(map(tuple, random_orders)),
        write_norms=at_onsets.activation,
        activation_shares={
            "circuit": summed(circuit) / total,
            "random": sum(map(summed, random)) / n_random / total,
            "others": summed(others) / total,
        },
    )


@dataclass(frozen=True)
class Conditions:
    """Named interventions of one study."""

    removals: Mapping[str, Variant]
    """The replacement without sets of features."""
    baselines: Mapping[str, Variant]
    """The replacement under interventions that need no features."""
    insertions: Mapping[str, Variant]
    """The hybrid with sets of features added."""
    banned_elsewhere: int | None
    """How often the select texts hold, outside of the banned phrases, the tokens that "ban" bans; None without phrases.
    """

    @property
    def circuit_insertions(self) -> list[str]:
        """The names under which the circuit itself is inserted: "circuit_at_strength" only where that is not 1."""
        return [name for name in ("circuit", "circuit_at_strength") if name in self.insertions]


def make_conditions(
    pair: PairedModel,
    found: FoundCircuit,
    sets: FeatureSets,
    tuned: Mapping[str, TunedCondition],
    options: SearchOptions,
    progress: bool,
) -> Conditions:
    """Name the interventions of a study.

    Args:
        pair: with adapters on every layer.
        found: the circuit with the texts it was found in.
        sets: the circuit and its control sets.
        tuned: controls whose strength was set on the select split (`control_strengths.set_controls`).
        options: of the search, which is run again for the token that most often comes at the matched controls.
        progress: show a bar.
    """
    other_circuit = _circuit_of_other_token(pair, found, options, progress)
    neighbors = banned_neighbors(found.onsets)
    strength, stronger = found.circuit.strength, {}
    if strength != 1:
        compared = {"circuit": sets.circuit, "random": sets.random[0], "others": sets.others}
        stronger = {f"{name}_at_strength": with_only(features, strength) for name, features in compared.items()}
    return Conditions(
        removals={
            **{name: without(features) for name, features in sets.parts.items()},
            **{name: tuned[name].variant for name in CONTROL_SETS},
            **({} if other_circuit is None else {"other_tokens": without(other_circuit)}),
        },
        baselines={
            "ban": banned(found.onsets.phrases, neighbors),
            **{name: tuned[name].variant for name in TUNED_BASELINES},
        },
        insertions={
            **{name: with_only(features) for name, features in sets.parts.items()},
            "others": with_only(sets.others),
            **{name: inserted_in_part(tuned[name].shares or {}) for name in ("random_scaled", "others_scaled")},
            **stronger,
        },
        banned_elsewhere=sum(neighbors.values()) if neighbors else None,
    )


def _circuit_of_other_token(
    pair: PairedModel, found: FoundCircuit, options: SearchOptions, progress: bool
) -> tuple[FeatureId, ...] | None:
    """The features that the same search finds for the token that most often comes at the matched controls.

    None where there is no such token.
    """
    onsets = found.onsets
    token = commonest_alternative(onsets)
    if token is None:
        return None
    following = torch.zeros_like(onsets.tokens)
    following[:, :-1] = onsets.tokens[:, 1:]
    begins = onsets.control & (following == token)
    swapped = replace(onsets, onset=begins, control=(onsets.control & ~begins) | onsets.onset, phrases=(token,))
    coarser = replace(options, documents=max(1, options.documents // 2), per_round=2 * options.per_round)
    return search_circuit(pair, swapped, found.alive, coarser, progress=progress).order
