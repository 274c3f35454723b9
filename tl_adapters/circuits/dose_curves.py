"""Behavior left and harm elsewhere over the whole range of an intervention's strength: one curve per intervention.

A single strength can flatter an intervention: a weak one harms little, and a strong one leaves no behavior. So the
circuit and everything it is compared with are measured at several strengths each (`INTERVENTIONS`). At every strength
two things are measured on the report problems, besides the *harm*, KL(replacement || condition) away from the onsets:

* the *behavior left*: the probability of the behavior at the target's onsets, as a share of the replacement's;
* how many *injected errors are corrected*, where the subject has wrong steps to inject.

The strength of the circuit is the share of its features' activations that is removed, up to 1, the whole circuit. The
others are swept around the size that was set on the select split (`control_strengths`): by factors of the size that has
the circuit's effect, or, for other features, of the number that does its harm. A ban of the words is the end of the
curve of the logit bias: its KL is infinite wherever the words are possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl_adapters.circuits.comparisons import DOSE_PROBLEMS, ReportSplit
from tl_adapters.circuits.conditions import FeatureSets
from tl_adapters.circuits.control_strengths import TunedCondition
from tl_adapters.circuits.controls import first_features, removed_in_part
from tl_adapters.circuits.measurements import (
    POSITION_KEYS,
    ReplacementResiduals,
    behavior_left,
    mean_corrected,
    probability_sums,
)
from tl_adapters.interventions.variants import Variant, on_route
from tl_adapters.utils.bootstrap import bootstrap_ratio
from tl_adapters.utils.measurement import Measurement

CURVE_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Strengths of every intervention, as factors of its full strength; the circuit has those up to 1."""
INTERVENTIONS = {
    "circuit": "circuit",
    "random": "random_equal_harm",
    "others": "others_equal_harm",
    "neurons": "neurons",
    "steering": "steering",
    "logit_bias": "logit_bias",
    "low_rank": "low_rank",
}
"""Curve -> the control whose size is its full strength (`control_strengths.set_controls`)."""


@dataclass(frozen=True)
class Dose:
    """One strength of an intervention."""

    factor: float
    """Of the full strength."""
    size: float
    """Share of the activations, number of features, neurons or directions, coefficient, or nats."""
    unit: str
    """Unit of the size."""
    variants: tuple[Variant, ...]
    """The intervention; several where it was drawn several times."""


def dose_curves(
    report: ReportSplit,
    sets: FeatureSets,
    tuned: Mapping[str, TunedCondition],
    factors: Sequence[float] = CURVE_FACTORS,
    n_random: int = 3,
) -> dict[str, Any]:
    """Measure every intervention at several strengths; return the part "dose_curves" of results.json.

    Args:
        report: the report split.
        sets: the circuit and the sets of features that it is compared with.
        tuned: controls whose size was set on the select split.
        factors: strengths, as factors of the full strength of each intervention.
        n_random: matched random sets, over which the mean is taken.

    Returns:
        "unchanged": the replacement itself, with its probability "p_onset" and what it corrects; "curves": name -> the
        points in the order of their strength. An intervention of which no size does anything has no curve.
    """
    pair, texts = report.pair, report.probability_texts
    residuals, nothing = ReplacementResiduals.read(pair, texts), on_route("replacement")
    onset_sums = probability_sums(pair, texts, nothing)[POSITION_KEYS["onset"]]
    injections = report.subject.injections[:DOSE_PROBLEMS]

    def corrections(variants: Sequence[Variant]) -> dict[str, Measurement]:
        if not injections:
            return {}
        return {"corrected": mean_corrected(pair, injections, variants, report.subject, "report")}

    def point(dose: Dose) -> dict[str, Any]:
        left = behavior_left(pair, texts, dose.variants, "report", residuals, onset_sums[0])
        return {"factor": dose.factor, "size": dose.size, "unit": dose.unit, **left, **corrections(dose.variants)}

    curves = {name: [point(d) for d in _doses(name, sets, tuned, factors, n_random)] for name in INTERVENTIONS}
    p_onset = bootstrap_ratio(*onset_sums).measurement(len(texts), "probability of the word", "report")
    return {
        "unchanged": {"p_onset": p_onset, **corrections([nothing])},
        "curves": {name: points for name, points in curves.items() if points},
    }


def _doses(
    name: str, sets: FeatureSets, tuned: Mapping[str, TunedCondition], factors: Sequence[float], n_random: int
) -> Iterator[Dose]:
    """The strengths of one intervention, weakest first; those beyond its largest size are left out."""
    if name == "circuit":
        for share in sorted(factor for factor in factors if factor <= 1):
            removed = removed_in_part(dict.fromkeys(sets.circuit, share))
            yield Dose(share, share, "of every activation", (removed,))
        return
    control = tuned[INTERVENTIONS[name]]
    for factor in sorted(factors):
        size = factor * control.size
        if control.at_size is None or not 0 < size <= max(control.size, control.most):
            continue
        variants: tuple[Variant, ...] = (control.at_size(size),)
        if name == "random":
            variants = tuple(removed_in_part(first_features(order, size)) for order in sets.random_orders[:n_random])
        yield Dose(factor, size, control.unit, variants)
