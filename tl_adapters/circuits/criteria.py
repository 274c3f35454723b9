"""The criteria of a hesitation circuit: thresholds set before anything was measured, and whether they are reached.

A criterion that claims that nothing happens (no change of accuracy, no effect of random features, the word not said)
concerns the whole 95 % interval and not the point estimate. It also needs enough problems to be able to fail: so many
that a change in as large a share of them as the threshold would be seen (`share_intervals.unseen_share`), and so many
that the interval, at its present width, would fit. With fewer problems it is neither reached nor missed, unless the
interval lies wholly outside the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tl_adapters.circuits.onsets import Onsets
from tl_adapters.utils.measurement import Estimate, Measurement
from tl_adapters.utils.share_intervals import TAIL_PROBABILITY, mcnemar, newcombe

MAX_SHARE_OF_ALIVE, MIN_HESITATION_CUT, MIN_LENGTH_CUT = 0.03, 0.95, 0.2
"""Thresholds as shares: of the alive features; of the hesitation rate and of the length that are gone without it."""
MAX_ACCURACY_CHANGE, MAX_HYBRID_ACCURACY_CHANGE = 0.03, 0.05
"""Changes of accuracy that count as none: of the replacement where the target makes no wrong step, of the hybrid."""
MAX_RANDOM_CUT = 0.05
"""Largest share of the hesitation rate that may be gone without a matched random set."""
MIN_RECOVERED_PROBABILITY, MAX_FALSE_PROBABILITY = 0.8, 0.05
"""In the hybrid with the circuit: P(word) at the onsets as a share of the target's; P(word) at other positions."""
OUTCOME_NAMES = {True: "reached", False: "missed", None: "not known"}
"""A criterion's "reached" -> its name."""
Criterion = dict[str, Any]
"""A criterion as results.json holds it: "name", "value", "bar" (the threshold in words), "reached" (None: too few
problems, or nothing to measure), "n" and "needs" (problems, and how many are needed; None where that does not matter).
"""


def criteria(block: Mapping[str, Any], texts: Onsets) -> list[Criterion]:
    """Compare the measurements of a study with the thresholds.

    Args:
        block: of one study, with the parts "circuit", "necessity", "sufficiency" and "probabilities".
        texts: the texts over which the probabilities were read.
    """
    return [
        *_necessity_criteria(block),
        *_sufficiency_criteria(block, texts),
        *_correction_criteria(block.get("injected") or {}),
    ]


def _criterion(name: str, value: float | None, threshold: str, reached: bool | None) -> Criterion:
    reached = None if reached is None or value is None else bool(reached)
    return {"name": name, "value": value, "bar": threshold, "reached": reached, "n": None, "needs": None}


def _equivalence(name: str, figure: Measurement | None, threshold: str, bound: float, center: float = 0.0) -> Criterion:
    """The criterion that the figure's whole interval is within ``bound`` of ``center``."""
    if figure is None or figure.value is None:
        why = "there is nothing to measure it on" if figure is None else figure.reason
        return _criterion(name, None, f"{threshold}; {why}", None)
    needs, reached, why = problems_needed(figure, bound), None, figure.reason
    if figure.low is not None and figure.high is not None:
        outside = figure.high < center - bound or figure.low > center + bound
        inside = center - bound <= figure.low and figure.high <= center + bound
        reached = False if outside else inside if figure.n >= needs else None
    if figure.n < needs:
        why = "" if reached is False else "not enough problems"
    threshold = f"{threshold}, with its whole interval; needs n >= {needs:,}; n = {figure.n:,}"
    criterion = _criterion(name, figure.value, threshold + (f": {why}" if why else ""), reached)
    return criterion | {"n": figure.n, "needs": needs}


def problems_needed(figure: Measurement, bound: float) -> int:
    """Return how many problems (documents) the claim needs that a figure is within ``bound``.

    It is the larger of two numbers. At the first, an event in a share ``bound`` of the problems would be seen with
    97.5 % probability. At the second, half the interval's width, which shrinks with the root of n, is at most
    ``bound``.
    """
    needs = math.log(TAIL_PROBABILITY) / math.log(1 - bound)
    if figure.low is not None and figure.high is not None:
        needs = max(needs, figure.n * ((figure.high - figure.low) / 2 / bound) ** 2)
    return math.ceil(needs - 1e-9)


def _necessity_criteria(block: Mapping[str, Any]) -> list[Criterion]:
    share, rounding = block["circuit"]["share_of_alive"], 1 / block["circuit"]["alive"]
    circuit, random = block["necessity"]["circuit"], block["necessity"]["random"]
    change = circuit["length_change"].value
    shorter = None if change is None else -change
    without_slip = "accuracy_change_without_slip" in circuit
    where = ", where the target makes no slip" if without_slip else ""
    checked = [
        _criterion(
            "circuit, share of the alive features", share, "at most 3 %", share <= MAX_SHARE_OF_ALIVE + rounding
        ),
        _equivalence(
            "hesitation gone without it",
            circuit.get("hesitation_cut"),
            "at least 95 %",
            1 - MIN_HESITATION_CUT,
            center=1.0,
        ),
        _criterion("responses shorter without it", shorter, "at least 20 %", (shorter or 0.0) >= MIN_LENGTH_CUT),
        _equivalence(
            f"accuracy changed{where} (equivalence: its whole interval)",
            circuit["accuracy_change_without_slip" if without_slip else "accuracy_change"],
            "within 3 points",
            MAX_ACCURACY_CHANGE,
        ),
    ]
    if "hesitation_cut" in random:
        name = "hesitation gone without matched random features"
        checked.append(_equivalence(name, random["hesitation_cut"], "less than 5 %", MAX_RANDOM_CUT))
    return checked


def _sufficiency_criteria(block: Mapping[str, Any], texts: Onsets) -> list[Criterion]:
    inserted, target = block["probabilities"]["hybrid + circuit"], block["probabilities"]["target"]
    p_inserted, p_target = inserted["moment"].value, target["moment"].value
    recovered = p_inserted / p_target if p_target and p_inserted is not None else None
    checked = [
        _criterion(
            "P(word) at the target's onsets, hybrid + circuit over target",
            recovered,
            "at least 0.8",
            (recovered or 0.0) >= MIN_RECOVERED_PROBABILITY,
        ),
        _equivalence(
            "P(word) at all other places of the response, hybrid + circuit",
            _away_from_onsets(inserted, texts),
            "at most 0.05",
            MAX_FALSE_PROBABILITY,
        ),
    ]
    if "boundary" in inserted:
        name = "P(word) at matched control positions, hybrid + circuit (stricter)"
        checked.append(_equivalence(name, inserted["boundary"], "at most 0.05", MAX_FALSE_PROBABILITY))
    change = block["sufficiency"]["circuit"]["accuracy_change"]
    name = "accuracy, hybrid + circuit less hybrid"
    return [*checked, _equivalence(name, change, "within 5 points", MAX_HYBRID_ACCURACY_CHANGE)]


def _correction_criteria(injected: Mapping[str, Any]) -> list[Criterion]:
    if not injected:
        return []
    return [
        _superiority(name, injected[more].outcomes, injected[less].outcomes)
        for more, less, name in (
            ("replacement", "replacement - circuit", "injected errors corrected: lost without it"),
            ("hybrid + circuit", "hybrid", "injected errors corrected: gained by the hybrid with it"),
        )
    ]


def correction_beside_others(injected: Mapping[str, Any]) -> list[Criterion]:
    """Compare corrections without the circuit with corrections without the most active other features.

    The others are as many as the circuit has, and as many as do its harm elsewhere. This is the hardest criterion.
    """
    return [
        _superiority(
            f"injected errors corrected: more without the most active others ({which}) than without it",
            injected[f"replacement - {name}"].outcomes,
            injected["replacement - circuit"].outcomes,
        )
        for name, which in (("others", "as many"), ("others_equal_harm", "at equal harm elsewhere"))
        if f"replacement - {name}" in injected
    ]


def _superiority(name: str, more: str, less: str) -> Criterion:
    """The criterion that the first outcomes are right more often than the second, paired (Newcombe, McNemar)."""
    pairs = list(zip(more, less, strict=True))
    difference = newcombe(*(pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))))
    p = mcnemar(more, less)
    threshold = (
        f"above 0, with its whole interval ({difference.low:.3f} to {difference.high:.3f}) and by an exact test of "
        f"the pairs (p = {p:.2g}, n = {len(pairs):,})"
    )
    clear = difference.low is not None and difference.low > 0 and p < 2 * TAIL_PROBABILITY
    return _criterion(name, difference.value, threshold, clear) | {"n": len(pairs)}


def _away_from_onsets(figures: Mapping[str, Measurement], texts: Onsets) -> Measurement | None:
    """P(word) over control positions and all other positions together, weighted by their numbers.

    The ends of the interval are weighted likewise, as if both parts erred the same way; no interval is wider than that.
    """
    parts = [
        (float(positions.sum()), figures[key])
        for key, positions in (("boundary", texts.control), ("elsewhere", texts.elsewhere))
        if key in figures
    ]
    if not parts:
        return None
    total = sum(n for n, _ in parts)

    def joined(name: str) -> float | None:
        ends = [(n, getattr(figure, name)) for n, figure in parts]
        return None if any(end is None for _, end in ends) else sum(n * end for n, end in ends) / total

    first = parts[0][1]
    reason = next((figure.reason for _, figure in parts if figure.reason), "")
    whole = Estimate(joined("value"), joined("low"), joined("high"), reason=reason)
    return whole.measurement(first.n, first.unit, first.split)
