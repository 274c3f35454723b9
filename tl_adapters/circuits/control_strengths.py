"""Baselines as strong as they can be: set on the select split to do at the onsets what the circuit does.

A baseline that breaks the model, or that does less than the circuit, says nothing about the circuit. So each has one
size that is searched (a coefficient, nats of a bias, a number of neurons or features), and settings among
which the one is taken that does it with the least harm elsewhere:

* *effect*: how far the mean probability of the words at the onsets (`Moments.moment`) falls;
* *harm*: mean KL(replacement || condition) away from the onsets and what follows them (`circuit_trials.away`).

Steering, logit bias and neurons are set to the circuit's own effect. Other features are taken in an order (matched
random sets, or the most active others) and enlarged to the circuit's summed write norm at the onsets, and, another
time, to its harm elsewhere. Where a size cannot reach its goal the nearest is taken, and the record says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.controls import Shares, by_size, first_of, neuron_effects, removed, size_of_norm
from tl_adapters.circuits.measurements import away, kl_from_replacement
from tl_adapters.circuits.onsets import BehaviorError, Onsets, log_odds
from tl_adapters.circuits.steering import shifted_logits, steered, without_neurons
from tl_adapters.interventions.variants import Variant, on_route, without
from tl_adapters.models.paired_model import PairedModel

TRIED_DOCUMENTS = 60
"""Documents of the select split on which everything here is set."""
SAME_EFFECT, SAME_HARM = 0.02, 0.05
"""An effect or a harm is reached within these shares of the circuit's."""
TRIES = 12
"""Sizes that are tried of one setting, at most: some double until the goal is passed, the others close in on it."""
MOST_COEFFICIENT, MOST_NATS, MOST_TIMES = 32.0, 64.0, 2.0
"""Largest sizes tried: of steering, of a logit bias, and of a set of all features (2 turns their activations over)."""


@dataclass(frozen=True)
class Measured:
    """What a condition does to the texts."""

    p_onset: float
    """Mean probability of the words at the onsets."""
    kl: float
    """Harm elsewhere, in nats per token."""


@dataclass(frozen=True)
class Setting:
    """A condition with its size set."""

    variant: Variant
    """What is entered."""
    chosen: str
    """Which setting it is, in words."""
    size: float
    """Coefficient, nats, neurons or features."""
    unit: str
    """What the size is measured in."""
    measured: Measured
    """On the select split."""
    reached: bool
    """Its goal is reached within the tolerance; of the circuit and of sets of its size there is no goal."""
    shares: Shares | None = None
    """Of a set of features, what is taken of each."""

    def record(self, plain: Measured) -> dict[str, Any]:
        """As results.json holds it; ``plain`` is the unchanged replacement."""
        return {
            "setting": self.chosen,
            "size": self.size,
            "unit": self.unit,
            "p_onset_before": plain.p_onset,
            "p_onset": self.measured.p_onset,
            "kl_elsewhere": self.measured.kl,
            "reached": self.reached,
        }


class Texts:
    """Texts of the select split on which conditions are set, with what the replacement says there.

    Args:
        pair: with adapters on every layer.
        moments: of the select split.
        documents: so many that have an onset are read.

    Raises BehaviourError where there is no onset, or no other position.
    """

    @torch.no_grad()
    def __init__(self, pair: PairedModel, onsets: Onsets, documents: int = TRIED_DOCUMENTS) -> None:
        if not bool(onsets.onset.any()):
            raise BehaviorError("There is no onset in these texts, so there is no effect that a baseline could have.")
        self.pair, self.onsets = pair, onsets.with_onsets(documents)
        self.batches = [batch.to(pair.model.W_E.device) for _, batch in self.onsets.batches()]
        if not any(bool(away(batch).any()) for batch in self.batches):
            raise BehaviorError("Every position of these responses is an onset or follows one; give longer texts.")
        with pair.routed("replacement"):
            self.embedded = [pair.embed(batch.tokens) for batch in self.batches]
            self.final = [pair.run_blocks(resid, 0, pair.n_layers) for resid in self.embedded]
        self.plain = self.measure(on_route("replacement"), self.final, pair.n_layers)

    @torch.no_grad()
    def measure(
        self, variant: Variant, streams: Sequence[Float[Tensor, "batch pos d_model"]] | None = None, start: int = 0
    ) -> Measured:
        """Effect and harm of a condition.

        Args:
            variant: the condition.
            streams: where it changes nothing before block ``start``, the replacement's residual stream there, of every
                batch; None runs the whole.
            start: the first block that is run.
        """
        pair, device = self.pair, self.pair.model.W_E.device
        said, harm = (torch.zeros((), device=device) for _ in range(2))
        for number, batch in enumerate(self.batches):
            with variant.entered(pair):
                resid = pair.embed(batch.tokens)  # asked in any case: a variant may look at the tokens
                resid = pair.run_blocks(resid if streams is None else streams[number], start, pair.n_layers)
                odds = log_odds(pair, resid, batch, batch.onset, pair.rows_at_once)
                said += odds.sigmoid().float().sum()
            at = away(batch)
            harm += kl_from_replacement(pair, variant, self.final[number][at], resid[at]).sum()
        onsets, others = (sum(int(places(b).sum()) for b in self.batches) for places in (lambda b: b.onset, away))
        return Measured(float(said) / onsets, float(harm) / others)


def size_for(
    measure: Callable[[float], Measured],
    value: Callable[[Measured], float],
    goal: float,
    first: float,
    most: float,
    tolerance: float,
    hopeless: Callable[[Measured], bool] = lambda measured: False,
) -> tuple[float, Measured, bool]:
    """The size whose value is nearest to a goal, what it does, and whether that is within the tolerance.

    From ``first`` on sizes double until the value has reached the goal (or ``most`` is passed); then what is between is
    divided where a straight line has the goal, or in halves.

    Args:
        measure: of a size above 0.
        value: of what was measured; it grows with the size.
        goal: of the value, above 0.
        first, most: sizes.
        tolerance: of the value; the search ends within it.
        hopeless: of what was measured below the goal: is it of no use to go on?
    """
    low, high, size = (0.0, -goal), (math.inf, math.inf), min(first, most)  # sizes and how far off they are
    best: tuple[float, float, Measured] | None = None
    sides = list[bool]()
    for _ in range(TRIES):
        found = measure(size)
        off = value(found) - goal
        if not (math.isfinite(off) and math.isfinite(found.kl)):  # it breaks the model: too much
            off = math.inf
        elif best is None or abs(off) < best[0]:
            best = (abs(off), size, found)
        if abs(off) <= tolerance or (off < 0 and (size >= most or hopeless(found))):
            break
        low, high = ((size, off), high) if off < 0 else (low, (size, off))
        sides.append(off < 0)
        size = min(2 * size, most) if math.isinf(high[0]) else _between(low, high, sides)
    if best is None:
        return 0.0, Measured(math.nan, math.inf), False
    return best[1], best[2], best[0] <= tolerance


def _between(low: tuple[float, float], high: tuple[float, float], sides: Sequence[bool]) -> float:
    """Where a straight line from one to the other has the goal; the middle, where that came out on one side twice."""
    part = 0.5
    if math.isfinite(high[1]) and sides[-2:] not in ([True, True], [False, False]):
        part = min(0.9, max(0.1, -low[1] / (high[1] - low[1])))
    return low[0] + part * (high[0] - low[0])


class _Effect:
    """Sizes that do at the onsets what the circuit does; the least harmful so far is kept."""

    def __init__(self, texts: Texts, goal: Measured) -> None:
        self.texts = texts
        self.wanted = texts.plain.p_onset - goal.p_onset
        self.best: Setting | None = None

    def try_one(
        self, make: Callable[[float], Variant], chosen: str, unit: str, first: float, most: float, **given: Any
    ) -> None:
        """One setting, whose size is found; ``given`` goes to `Texts.measure`."""
        if self.wanted <= 0:  # the circuit does not lower the word, so doing nothing does as much
            if self.best is None:
                self.best = Setting(on_route("replacement"), "not used", 0.0, unit, self.texts.plain, True)
            return
        best = self.best
        size, found, reached = size_for(
            lambda size: self.texts.measure(make(size), **given),
            self._effect,
            self.wanted,
            first,
            most,
            SAME_EFFECT * self.wanted,
            lambda measured: best is not None and best.reached and measured.kl >= best.measured.kl,
        )
        setting = Setting(make(size), chosen, size, unit, found, reached)
        if size > 0 and (best is None or self._order(setting) < self._order(best)):
            self.best = setting

    def _effect(self, measured: Measured) -> float:
        return self.texts.plain.p_onset - measured.p_onset

    def _order(self, setting: Setting) -> tuple[bool, float, float]:
        """Those that do it first, by harm; then the nearest."""
        short = 0.0 if setting.reached else abs(self._effect(setting.measured) - self.wanted)
        return not setting.reached, short, setting.measured.kl

    def taken(self, unit: str) -> Setting:
        """The best; where every size breaks the model, none."""
        nothing = Setting(on_route("replacement"), "no size leaves the model whole", 0.0, unit, self.texts.plain, False)
        return nothing if self.best is None else self.best


@torch.no_grad()
def tuned_steering(texts: Texts, goal: Measured) -> Setting:
    """Difference of means (onsets less matched control positions), subtracted where that does it at the least harm.

    The layer and the positions (all, or those where the word may come) are chosen. Without control positions the onsets
    are compared with all other positions of the response.

    Args:
        texts: of the select split.
        goal: what the circuit does.
    """
    pair, search = texts.pair, _Effect(texts, goal)
    control = any(bool(batch.control.any()) for batch in texts.batches)
    marked = {int(token) for b in texts.batches for token in b.tokens[b.onset].tolist()}
    ended = {word[-1] if isinstance(word, tuple) else word for word in texts.onsets.words}
    marks = sorted(marked - ended)
    before = texts.embedded
    for layer in range(pair.n_layers):
        with pair.routed("replacement"):
            streams = [pair.run_blocks(resid, layer, layer + 1) for resid in before]
        here = torch.cat([s[b.onset] for s, b in zip(streams, texts.batches, strict=True)]).float().mean(0)
        there = [s[b.control if control else away(b)] for s, b in zip(streams, texts.batches, strict=True)]
        direction = here - torch.cat(there).float().mean(0)
        for after, where in ((marks, "where the word may come"), (None, "everywhere")):
            if after is not None and not after:  # every onset comes after a word of the behavior, so no token marks it
                continue
            search.try_one(
                lambda size, layer=layer, after=after, by=direction: steered(layer, by, size, after),  # type: ignore[misc]
                f"after layer {layer}, {where}",
                "times the difference of means",
                1.0,
                MOST_COEFFICIENT,
                streams=before,
                start=layer,
            )
        before = streams
    return search.taken("times the difference of means")


def tuned_logit_bias(texts: Texts, goal: Measured) -> Setting:
    """The words' logits lowered by so much that they come as seldom as without the circuit."""
    search, words = _Effect(texts, goal), texts.onsets.words
    search.try_one(
        lambda size: shifted_logits(words, -size), "everywhere", "nats", 1.0, MOST_NATS,
        streams=texts.final, start=texts.pair.n_layers,
    )  # fmt: skip
    return search.taken("nats")


def tuned_neurons(texts: Texts, goal: Measured) -> Setting:
    """Neurons of the base's MLPs off or held at their mean, as many as it takes, in the better of two orders.

    By effect on the margin, or by effect over what they write elsewhere (KL grows with its square), so that much is
    bought with little harm.
    """
    found = neuron_effects(texts.pair, texts.onsets)
    search = _Effect(texts, goal)
    for held, effect, written, how in (
        (None, found.off, found.written_off, "off"),
        (found.mean, found.at_mean, found.written_at_mean, "held at their mean"),
    ):
        orders = {"by effect": effect, "by effect over what they write elsewhere": effect / written.clamp(min=1e-12)}
        for ranked, scores in orders.items():
            order = by_size(scores)
            helping = int((effect > 0).sum())
            if not helping:
                continue

            def make(size: float, order: Sequence[tuple[int, int]] = order, held: Tensor | None = held) -> Variant:
                n = math.ceil(size)
                return without_neurons(order[:n], held, 1 - (n - size))

            search.try_one(make, f"{how}, {ranked}", "neurons", min(64.0, helping), float(helping))
    return search.taken("neurons")


def of_equal_norm(
    texts: Texts, order: Sequence[FeatureId], norms: Float[Tensor, "n_layers n_features"], goal: float
) -> Setting:
    """The first features of an order whose summed write norm at the onsets is the circuit's.

    Args:
        texts: of the select split.
        order: of features outside the circuit.
        norms: of every feature, mean activation at the onsets times the norm of its decoder row.
        goal: the circuit's sum.
    """
    size = size_of_norm(order, norms, goal)
    return _set(texts, order, size or 0.0, size is not None)


def of_equal_harm(texts: Texts, order: Sequence[FeatureId], goal: Measured, first: float) -> Setting:
    """The first features of an order without which the harm elsewhere is the circuit's.

    Args:
        texts: of the select split.
        order: of features outside the circuit.
        goal: what the circuit does.
        first: the size that is tried first.
    """
    if goal.kl <= 0 or not order:
        return _set(texts, order, 0.0, goal.kl <= 0)
    size, _, reached = size_for(
        lambda size: texts.measure(removed(first_of(order, size))),
        lambda measured: measured.kl,
        goal.kl,
        first,
        MOST_TIMES * len(order),
        SAME_HARM * goal.kl,
    )
    return _set(texts, order, size, reached)


def _set(texts: Texts, order: Sequence[FeatureId], size: float, reached: bool) -> Setting:
    shares = first_of(order, size)
    if not shares:
        return Setting(on_route("replacement"), "no features", 0.0, "features", texts.plain, reached, {})
    chosen = f"{len(shares)} features"
    if size > len(order):
        chosen = f"all {len(order)} features, {size / len(order):.2f} times"
    variant = removed(shares)
    return Setting(variant, chosen, size, "features", texts.measure(variant), reached, shares)


def set_controls(
    texts: Texts,
    circuit: Sequence[FeatureId],
    orders: Mapping[str, Sequence[FeatureId]],
    norms: Float[Tensor, "n_layers n_features"],
) -> dict[str, Setting]:
    """The circuit and everything it is held against, by name: what they are, and what they do to the select texts.

    Args:
        texts: of the select split.
        circuit: its features.
        orders: by name ("random", "others"), features outside the circuit in the order in which they join a set.
        norms: of every feature, mean activation at the onsets times the norm of its decoder row.

    Of each order there are three sets: NAME of the circuit's size, NAME_scaled of its write norm at the onsets, and
    NAME_equal_harm. "logit_bias", "steering" and "neurons" have the circuit's effect.
    """
    goal = texts.measure(without(circuit))
    found = {"circuit": Setting(without(circuit), f"{len(circuit)} features", len(circuit), "features", goal, True)}
    written = float(sum(norms[f] for f in circuit))
    for name, order in orders.items():
        size = min(len(circuit), len(order))
        found[name] = _set(texts, order, size, size == len(circuit))
        found[f"{name}_scaled"] = of_equal_norm(texts, order, norms, written)
        found[f"{name}_equal_harm"] = of_equal_harm(texts, order, goal, len(circuit))
    found["logit_bias"] = tuned_logit_bias(texts, goal)
    found["steering"] = tuned_steering(texts, goal)
    found["neurons"] = tuned_neurons(texts, goal)
    return found
