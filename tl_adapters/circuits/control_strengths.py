"""Controls of equal strength: each is set on the select split to have the circuit's effect, write norm or harm.

A control that breaks the model, or that does less than the circuit, says nothing about the circuit. So each has one
size that is searched (a coefficient, nats of a bias, a number of neurons, directions or features). Of several ways to
apply it, the one is taken that has the effect with the least harm elsewhere:

* *effect*: how far the mean probability of the words at the onsets falls;
* *harm*: mean KL(replacement || condition) away from the onsets and continuations (`Onsets.away_from_onsets`).

Steering, logit bias, neurons and low rank are set to the circuit's effect. Other features are taken in an order
(matched random sets, or the most active others), as many as have the circuit's summed write norm at the onsets, and,
another time, as many as do its harm elsewhere. Where no size reaches the goal, the nearest is taken, and the record
states that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.controls import (
    Shares,
    WrittenDirection,
    first_features,
    largest_scores,
    neuron_effects,
    removed_in_part,
    size_for_norm,
    written_directions,
)
from tl_adapters.circuits.measurements import kl_from_replacement
from tl_adapters.circuits.onsets import BehaviorError, Onsets, log_odds
from tl_adapters.circuits.steering import shifted_logits, steered, without_directions, without_neurons
from tl_adapters.interventions.variants import Variant, on_route, without
from tl_adapters.models.paired_model import PairedModel

TUNING_DOCUMENTS = 60
"""Documents of the select split on which the sizes are set."""
EFFECT_TOLERANCE, HARM_TOLERANCE = 0.02, 0.05
"""An effect or a harm is reached within these shares of the circuit's."""
MAX_SIZES_TRIED = 12
"""Sizes that are tried of one control: some double until the goal is passed, the others close in on it."""
MAX_COEFFICIENT, MAX_NATS, MAX_FEATURE_FACTOR = 32.0, 64.0, 2.0
"""Largest sizes: of steering, of a logit bias, and of a set of all features (2 inverts their activations)."""


@dataclass(frozen=True)
class ConditionEffect:
    """What a condition does to the select texts."""

    p_onset: float
    """Mean probability of the words at the onsets."""
    kl_elsewhere: float
    """Harm: mean KL(replacement || condition) away from the onsets, in nats per token."""


@dataclass(frozen=True)
class TunedCondition:
    """A condition whose size is set."""

    variant: Variant
    """The intervention."""
    chosen: str
    """Which way to apply it was taken, in words."""
    size: float
    """Coefficient, nats, neurons or features."""
    unit: str
    """Unit of the size."""
    measured: ConditionEffect
    """Its effect and harm on the select split."""
    reached: bool
    """Whether its goal is reached within the tolerance; the circuit and sets of its size have no goal."""
    shares: Shares | None = None
    """For a set of features, the share of each activation that is taken."""
    at_size: Callable[[float], Variant] | None = None
    """The same condition at other sizes; None where it has one size only."""
    most: float = 0.0
    """The largest size that makes a difference."""

    def record(self, unchanged: ConditionEffect) -> dict[str, Any]:
        """The record in results.json; ``unchanged`` is the replacement's effect."""
        return {
            "setting": self.chosen,
            "size": self.size,
            "unit": self.unit,
            "p_onset_before": unchanged.p_onset,
            "p_onset": self.measured.p_onset,
            "kl_elsewhere": self.measured.kl_elsewhere,
            "reached": self.reached,
        }


class TuningTexts:
    """Texts of the select split on which sizes are set, with the replacement's residual streams over them.

    Args:
        pair: with adapters on every layer.
        onsets: of the select split.
        documents: how many documents with an onset are read.

    Raises BehaviorError where there is no onset, or no other position.
    """

    @torch.no_grad()
    def __init__(self, pair: PairedModel, onsets: Onsets, documents: int = TUNING_DOCUMENTS) -> None:
        if not bool(onsets.onset.any()):
            raise BehaviorError("There is no onset in these texts, so there is no effect that a baseline could have.")
        self.pair, self.onsets = pair, onsets.with_onsets(n=documents)
        self.batches = [batch.to(pair.device) for _, batch in self.onsets.batches()]
        if not any(bool(batch.away_from_onsets.any()) for batch in self.batches):
            raise BehaviorError("Every position of these responses is an onset or follows one; give longer texts.")
        with pair.routed("replacement"):
            self.embedded = [pair.embed(batch.tokens) for batch in self.batches]
            self.final = [pair.run_blocks(resid, 0, pair.n_layers) for resid in self.embedded]
        self.unchanged = self.measure(on_route("replacement"), self.final, pair.n_layers)

    @torch.no_grad()
    def measure(
        self, variant: Variant, streams: Sequence[Float[Tensor, "batch pos d_model"]] | None = None, start: int = 0
    ) -> ConditionEffect:
        """Effect and harm of a condition.

        Args:
            variant: the condition.
            streams: where it changes nothing before block ``start``, the replacement's residual stream there, of every
                batch; None runs all blocks.
            start: the first block that is run.
        """
        pair, device = self.pair, self.pair.device
        probability, harm = (torch.zeros((), device=device) for _ in range(2))
        for number, batch in enumerate(self.batches):
            with variant.entered(pair):
                resid = pair.embed(batch.tokens)  # in any case: a variant may look at the tokens
                resid = pair.run_blocks(resid if streams is None else streams[number], start, pair.n_layers)
                odds = log_odds(pair, resid, batch, batch.onset, pair.rows_at_once)
                probability += odds.sigmoid().float().sum()
            at = batch.away_from_onsets
            harm += kl_from_replacement(pair, variant, self.final[number][at], resid[at]).sum()
        n_onsets = sum(int(batch.onset.sum()) for batch in self.batches)
        n_away = sum(int(batch.away_from_onsets.sum()) for batch in self.batches)
        return ConditionEffect(float(probability) / n_onsets, float(harm) / n_away)


def size_for_goal(
    measure: Callable[[float], ConditionEffect],
    value: Callable[[ConditionEffect], float],
    goal: float,
    first: float,
    most: float,
    tolerance: float,
    hopeless: Callable[[ConditionEffect], bool] = lambda measured: False,
) -> tuple[float, ConditionEffect, bool]:
    """Return the size whose value is nearest to a goal, what it does, and whether that is within the tolerance.

    From ``first`` on the sizes double until the value has reached the goal or ``most`` is passed. Then the interval
    between the last two is divided where a straight line crosses the goal, or in halves.

    Args:
        measure: from a size above 0 to its effect.
        value: from an effect to the number that is compared with the goal; it grows with the size.
        goal: of the value, above 0.
        first: the size that is tried first.
        most: the largest size.
        tolerance: of the value; the search ends within it.
        hopeless: whether, given an effect below the goal, larger sizes are of no use.
    """
    low, high, size = (0.0, -goal), (math.inf, math.inf), min(first, most)  # sizes, and value less goal
    best: tuple[float, float, ConditionEffect] | None = None
    sides = list[bool]()
    for _ in range(MAX_SIZES_TRIED):
        effect = measure(size)
        off = value(effect) - goal
        if not (math.isfinite(off) and math.isfinite(effect.kl_elsewhere)):  # it breaks the model: too much
            off = math.inf
        elif best is None or abs(off) < best[0]:
            best = (abs(off), size, effect)
        if abs(off) <= tolerance or (off < 0 and (size >= most or hopeless(effect))):
            break
        low, high = ((size, off), high) if off < 0 else (low, (size, off))
        sides.append(off < 0)
        size = min(2 * size, most) if math.isinf(high[0]) else _size_between(low, high, sides)
    if best is None:
        return 0.0, ConditionEffect(math.nan, math.inf), False
    return best[1], best[2], best[0] <= tolerance


def _size_between(low: tuple[float, float], high: tuple[float, float], sides: Sequence[bool]) -> float:
    """Where a straight line crosses the goal; the middle, where the last two sizes came out on the same side."""
    part = 0.5
    if math.isfinite(high[1]) and sides[-2:] not in ([True, True], [False, False]):
        part = min(0.9, max(0.1, -low[1] / (high[1] - low[1])))
    return low[0] + part * (high[0] - low[0])


# -- baselines of the circuit's effect ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """One way to apply a baseline, whose size is not set yet."""

    make: Callable[[float], Variant]
    """From a size to the condition."""
    chosen: str
    """The way, in words."""
    first: float
    """The size that is tried first."""
    most: float
    """The largest size."""
    streams: Sequence[Tensor] | None = None
    """The replacement's residual streams before block ``start``, for `TuningTexts.measure`."""
    start: int = 0
    """The first block that the condition changes."""


def _least_harmful(
    texts: TuningTexts, goal: ConditionEffect, candidates: Iterable[_Candidate], unit: str
) -> TunedCondition:
    """The candidate that has the circuit's effect with the least harm; else the one that comes nearest to the effect.

    Where every size of every candidate breaks the model, nothing is changed.
    """
    wanted = texts.unchanged.p_onset - goal.p_onset
    best: TunedCondition | None = None

    def effect(measured: ConditionEffect) -> float:
        return texts.unchanged.p_onset - measured.p_onset

    def rank(tuned: TunedCondition) -> tuple[bool, float, float]:
        missing = 0.0 if tuned.reached else abs(effect(tuned.measured) - wanted)
        return not tuned.reached, missing, tuned.measured.kl_elsewhere

    for candidate in candidates:
        if wanted <= 0:  # the circuit does not lower the word, so changing nothing has as much effect
            return TunedCondition(on_route("replacement"), "not used", 0.0, unit, texts.unchanged, True)
        limit = best.measured.kl_elsewhere if best is not None and best.reached else math.inf
        size, measured, reached = size_for_goal(
            lambda size, c=candidate: texts.measure(c.make(size), c.streams, c.start),  # type: ignore[misc]
            effect,
            wanted,
            candidate.first,
            candidate.most,
            EFFECT_TOLERANCE * wanted,
            lambda measured, limit=limit: measured.kl_elsewhere >= limit,  # type: ignore[misc]
        )
        tuned = TunedCondition(
            candidate.make(size), candidate.chosen, size, unit, measured, reached, None, candidate.make, candidate.most
        )
        if size > 0 and (best is None or rank(tuned) < rank(best)):
            best = tuned
    nothing = on_route("replacement")
    return best or TunedCondition(nothing, "no size leaves the model whole", 0.0, unit, texts.unchanged, False)


@torch.no_grad()
def tuned_steering(texts: TuningTexts, goal: ConditionEffect) -> TunedCondition:
    """Subtract a difference of means (onsets less matched control positions) from the residual stream.

    The layer and the positions (all, or those after which the word may come) are chosen by the least harm. Without
    control positions the onsets are compared with all positions away from them.

    Args:
        texts: of the select split.
        goal: what the circuit does.
    """
    return _least_harmful(texts, goal, _steering_candidates(texts), "times the difference of means")


def _steering_candidates(texts: TuningTexts) -> Iterator[_Candidate]:
    pair, batches = texts.pair, texts.batches
    has_controls = any(bool(batch.control.any()) for batch in batches)
    before_onsets = {int(token) for batch in batches for token in batch.tokens[batch.onset].tolist()}
    last_tokens = {phrase[-1] if isinstance(phrase, tuple) else phrase for phrase in texts.onsets.phrases}
    marks = sorted(before_onsets - last_tokens)
    before = texts.embedded
    for layer in range(pair.n_layers):
        with pair.routed("replacement"):
            streams = [pair.run_blocks(resid, layer, layer + 1) for resid in before]
        at_onsets = [s[b.onset] for s, b in zip(streams, batches, strict=True)]
        compared = [s[b.control if has_controls else b.away_from_onsets] for s, b in zip(streams, batches, strict=True)]
        direction = torch.cat(at_onsets).float().mean(0) - torch.cat(compared).float().mean(0)
        for after, where in ((marks, "where the word may come"), (None, "everywhere")):
            if after is not None and not after:  # every onset comes after a word of the behavior, so no token marks it
                continue

            def make(
                size: float, layer: int = layer, after: Sequence[int] | None = after, by: Tensor = direction
            ) -> Variant:
                return steered(layer, by, size, after)

            yield _Candidate(make, f"after layer {layer}, {where}", 1.0, MAX_COEFFICIENT, before, layer)
        before = streams


def tuned_logit_bias(texts: TuningTexts, goal: ConditionEffect) -> TunedCondition:
    """Lower the logits of the words by so much that they are as unlikely as without the circuit."""
    phrases = texts.onsets.phrases
    bias = _Candidate(
        lambda size: shifted_logits(phrases, -size), "everywhere", 1.0, MAX_NATS, texts.final, texts.pair.n_layers
    )
    return _least_harmful(texts, goal, [bias], "nats")


def tuned_neurons(texts: TuningTexts, goal: ConditionEffect) -> TunedCondition:
    """Set neurons of the base's MLPs to zero or to their mean, as many as it takes, in the better of two orders.

    The orders are by effect on the log-odds, and by effect over what the neurons write elsewhere (KL grows with its
    square), so that much effect is had with little harm.
    """
    neurons = neuron_effects(texts.pair, texts.onsets)

    def candidates() -> Iterator[_Candidate]:
        for values, effect, written_elsewhere, change in (
            (None, neurons.off, neurons.written_off, "off"),
            (neurons.mean, neurons.at_mean, neurons.written_at_mean, "held at their mean"),
        ):
            helping = int((effect > 0).sum())
            scores = {
                "by effect": effect,
                "by effect over what they write elsewhere": effect / written_elsewhere.clamp(min=1e-12),
            }
            for ranked, score in scores.items() if helping else ():
                order = largest_scores(score)

                def make(
                    size: float, order: Sequence[tuple[int, int]] = order, values: Tensor | None = values
                ) -> Variant:
                    n = math.ceil(size)
                    return without_neurons(order[:n], values, 1 - (n - size))

                yield _Candidate(make, f"{change}, {ranked}", min(64.0, helping), float(helping))

    return _least_harmful(texts, goal, candidates(), "neurons")


def tuned_low_rank(texts: TuningTexts, goal: ConditionEffect) -> TunedCondition:
    """Remove directions from what the adapters write, as many as it takes, in the better of two orders.

    The orders are by what is written along a direction at the onsets, and by that over what is written along it
    elsewhere (`controls.written_directions`).
    """

    def candidates() -> Iterator[_Candidate]:
        for chosen, directions in written_directions(texts.pair, texts.onsets).items():

            def make(size: float, directions: Sequence[WrittenDirection] = directions) -> Variant:
                n = math.ceil(size)
                return without_directions([(d.layer, d.direction) for d in directions[:n]], 1 - (n - size))

            if directions:
                yield _Candidate(make, chosen, min(4.0, len(directions)), float(len(directions)))

    return _least_harmful(texts, goal, candidates(), "directions")


# -- other features -----------------------------------------------------------------------------------------------


def features_of_equal_norm(
    texts: TuningTexts, order: Sequence[FeatureId], norms: Float[Tensor, "n_layers n_features"], goal: float
) -> TunedCondition:
    """Remove the first features of an order, as many as have the circuit's summed write norm at the onsets.

    Args:
        texts: of the select split.
        order: of features outside the circuit.
        norms: of every feature, mean activation at the onsets times the norm of its decoder row.
        goal: the circuit's sum.
    """
    size = size_for_norm(order, norms, goal)
    return _removed_features(texts, order, size or 0.0, size is not None)


def features_of_equal_harm(
    texts: TuningTexts, order: Sequence[FeatureId], goal: ConditionEffect, first: float
) -> TunedCondition:
    """Remove the first features of an order, as many as do the circuit's harm elsewhere.

    Args:
        texts: of the select split.
        order: of features outside the circuit.
        goal: what the circuit does.
        first: the size that is tried first.
    """
    if goal.kl_elsewhere <= 0 or not order:
        return _removed_features(texts, order, 0.0, goal.kl_elsewhere <= 0)
    size, _, reached = size_for_goal(
        lambda size: texts.measure(removed_in_part(first_features(order, size))),
        lambda measured: measured.kl_elsewhere,
        goal.kl_elsewhere,
        first,
        MAX_FEATURE_FACTOR * len(order),
        HARM_TOLERANCE * goal.kl_elsewhere,
    )
    return _removed_features(texts, order, size, reached)


def _removed_features(texts: TuningTexts, order: Sequence[FeatureId], size: float, reached: bool) -> TunedCondition:
    shares = first_features(order, size)
    if not shares:
        return TunedCondition(on_route("replacement"), "no features", 0.0, "features", texts.unchanged, reached, {})
    chosen = f"{len(shares)} features"
    if size > len(order):
        chosen = f"all {len(order)} features, {size / len(order):.2f} times"

    def at_size(size: float) -> Variant:
        return removed_in_part(first_features(order, size))

    variant = at_size(size)
    measured = texts.measure(variant)
    return TunedCondition(variant, chosen, size, "features", measured, reached, shares, at_size, float(len(order)))


def set_controls(
    texts: TuningTexts,
    circuit: Sequence[FeatureId],
    orders: Mapping[str, Sequence[FeatureId]],
    norms: Float[Tensor, "n_layers n_features"],
) -> dict[str, TunedCondition]:
    """Set the strength of every control of a circuit; return them by name, the circuit itself first.

    Args:
        texts: of the select split.
        circuit: its features.
        orders: by name ("random", "others"), features outside the circuit in the order in which they join a set.
        norms: of every feature, mean activation at the onsets times the norm of its decoder row.

    Of each order there are three sets: NAME of the circuit's size, NAME_scaled of its write norm at the onsets, and
    NAME_equal_harm. "logit_bias", "steering", "neurons" and "low_rank" have the circuit's effect.
    """
    goal, variant = texts.measure(without(circuit)), without(circuit)
    tuned = {"circuit": TunedCondition(variant, f"{len(circuit)} features", len(circuit), "features", goal, True)}
    norm = float(sum(norms[f] for f in circuit))
    for name, order in orders.items():
        size = min(len(circuit), len(order))
        tuned[name] = _removed_features(texts, order, size, size == len(circuit))
        tuned[f"{name}_scaled"] = features_of_equal_norm(texts, order, norms, norm)
        tuned[f"{name}_equal_harm"] = features_of_equal_harm(texts, order, goal, len(circuit))
    tuned["logit_bias"] = tuned_logit_bias(texts, goal)
    tuned["steering"] = tuned_steering(texts, goal)
    tuned["neurons"] = tuned_neurons(texts, goal)
    tuned["low_rank"] = tuned_low_rank(texts, goal)
    return tuned


def control_records(
    tuned: Mapping[str, TunedCondition],
    unchanged: ConditionEffect,
    circuit: Sequence[FeatureId],
    norms: Float[Tensor, "n_layers n_features"],
) -> dict[str, dict[str, Any]]:
    """The records of `set_controls` in results.json.

    A set of features has its write norm at the onsets, as a share of the circuit's.

    Args:
        tuned: the controls.
        unchanged: what the replacement does.
        circuit: its features.
        norms: of every feature, mean activation at the onsets times the norm of its decoder row.
    """
    records = {name: condition.record(unchanged) for name, condition in tuned.items()}
    whole = sum(float(norms[f]) for f in circuit)
    for name, condition in tuned.items():
        shares = dict.fromkeys(circuit, 1.0) if name == "circuit" else condition.shares
        if shares is not None and whole > 0:
            written_elsewhere = sum(float(norms[f]) * share for f, share in shares.items())
            records[name]["write_norm"] = written_elsewhere / whole
    return records
