"""What a circuit of hesitation is asked for, and whether this one does it: bars set before anything was measured.

A criterion that claims that nothing happens (no change of accuracy, no effect of random features, the word not said)
is about the whole 95 % interval, not the point estimate, and needs enough problems to be able to fail: at least so
many that a change in the share of them that the bar allows would not go unseen (`intervals.unseen`), and so many that
the interval, at its present width, would fit. With fewer it is neither reached nor missed, unless the interval lies
wholly outside the bar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tl_adapters.circuits.onsets import Onsets
from tl_adapters.utils.measurement import Estimate, Measurement
from tl_adapters.utils.share_intervals import TAIL_PROBABILITY, mcnemar, newcombe

SHARE, CUT, SHORTER = 0.03, 0.95, 0.2
"""Of the alive features; of the hesitation rate gone without it; of the length gone without it."""
SAME_ACCURACY, SAME_HYBRID_ACCURACY = 0.03, 0.05
"""Changes of accuracy that count as none: of the replacement where the target makes no slip, of the hybrid."""
RANDOM_CUT = 0.05
"""Share of the hesitation rate that may be gone without a matched random set."""
KEPT, FALSE = 0.8, 0.05
"""In the hybrid with it, P(word) at the target's moments as a share of the target's; P(word) where it says none."""
REACHED = {True: "reached", False: "missed", None: "not known"}
"""`Criterion`'s "reached" in words."""
Criterion = dict[str, Any]
"""name, value, bar in words, reached (None: too few problems, or nothing to measure), n and needs (problems there are,
and that it takes; None where no number of them matters)."""


def criteria(block: Mapping[str, Any], texts: Onsets) -> list[Criterion]:
    """The bars, measured.

    Args:
        block: of one analysis, with the parts "circuit", "necessity", "sufficiency" and "probabilities".
        texts: over which the probabilities were read.
    """
    return [*_of_its_absence(block), *_of_its_presence(block, texts), *_of_correction(block.get("injected") or {})]


def _asked(name: str, value: float | None, bar: str, reached: bool | None) -> Criterion:
    reached = None if reached is None or value is None else bool(reached)
    return {"name": name, "value": value, "bar": bar, "reached": reached, "n": None, "needs": None}


def _close(name: str, figure: Measurement | None, bar: str, bound: float, centre: float = 0.0) -> Criterion:
    """Asked: the figure's whole interval is within ``bound`` of ``centre``."""
    if figure is None or figure.value is None:
        why = "there is nothing to measure it on" if figure is None else figure.reason
        return _asked(name, None, f"{bar}; {why}", None)
    needs, reached, why = problems_needed(figure, bound), None, figure.reason
    if figure.low is not None and figure.high is not None:
        outside = figure.high < centre - bound or figure.low > centre + bound
        inside = centre - bound <= figure.low and figure.high <= centre + bound
        reached = False if outside else inside if figure.n >= needs else None
    if figure.n < needs:
        why = "" if reached is False else "not enough problems"
    said = f"{bar}, with its whole interval; needs n >= {needs:,}; n = {figure.n:,}"
    asked = _asked(name, figure.value, said + (f": {why}" if why else ""), reached)
    return asked | {"n": figure.n, "needs": needs}


def problems_needed(figure: Measurement, bound: float) -> int:
    """How many problems (documents) a claim takes that a figure is within ``bound``.

    The larger of two: so many that what happens in a share ``bound`` of them would be seen (with 97.5 % probability),
    and so many that half the interval's width, which shrinks with the root of n, is no more than ``bound``.
    """
    needs = math.log(TAIL_PROBABILITY) / math.log(1 - bound)
    if figure.low is not None and figure.high is not None:
        needs = max(needs, figure.n * ((figure.high - figure.low) / 2 / bound) ** 2)
    return math.ceil(needs - 1e-9)


def _of_its_absence(block: Mapping[str, Any]) -> list[Criterion]:
    need, share = block["necessity"], block["circuit"]["share_of_alive"]
    both, random = need["circuit"], need["random"]
    rounding = 1 / block["circuit"]["alive"]
    asked = [_asked("circuit, share of the alive features", share, "at most 3 %", share <= SHARE + rounding)]
    asked.append(_close("hesitation gone without it", both.get("hesitation_cut"), "at least 95 %", 1 - CUT, 1.0))
    shorter = both["length_change"].value
    shorter = None if shorter is None else -shorter
    asked.append(_asked("responses shorter without it", shorter, "at least 20 %", (shorter or 0.0) >= SHORTER))
    change = both.get("accuracy_change_without_slip", both["accuracy_change"])
    where = ", where the target makes no slip" if "accuracy_change_without_slip" in both else ""
    name = f"accuracy changed{where} (equivalence: its whole interval)"
    asked.append(_close(name, change, "within 3 points", SAME_ACCURACY))
    if "hesitation_cut" in random:
        gone = random["hesitation_cut"]
        asked.append(_close("hesitation gone without matched random features", gone, "less than 5 %", RANDOM_CUT))
    return asked


def _of_its_presence(block: Mapping[str, Any], texts: Onsets) -> list[Criterion]:
    said, change = block["probabilities"], block["sufficiency"]["circuit"]["accuracy_change"]
    added = said["hybrid + circuit"]
    top, bottom = added["moment"].value, said["target"]["moment"].value
    kept = top / bottom if bottom and top is not None else None
    name = "P(word) at all other places of the response, hybrid + circuit"
    asked = [
        _asked(
            "P(word) at the target's moments, hybrid + circuit over target", kept, "at least 0.8", (kept or 0.0) >= KEPT
        ),
        _close(name, _elsewhere(added, texts), "at most 0.05", FALSE),
    ]
    if "boundary" in added:
        name = "P(word) at matched boundaries, hybrid + circuit (stricter)"
        asked.append(_close(name, added["boundary"], "at most 0.05", FALSE))
    name = "accuracy, hybrid + circuit less hybrid"
    return [*asked, _close(name, change, "within 5 points", SAME_HYBRID_ACCURACY)]


def _of_correction(injected: Mapping[str, Any]) -> list[Criterion]:
    if not injected:
        return []
    asked = []
    for more, less, name in (
        ("replacement", "replacement - circuit", "injected errors corrected: lost without it"),
        ("hybrid + circuit", "hybrid", "injected errors corrected: gained by the hybrid with it"),
    ):
        asked.append(_more(name, injected[more].outcomes, injected[less].outcomes))
    return asked


def correction_beside_others(injected: Mapping[str, Any]) -> list[Criterion]:
    """The hard one: is less corrected without the circuit than without the most active other features?

    Against as many of them, and against as many as harm as much elsewhere.
    """
    return [
        _more(
            f"injected errors corrected: more without the most active others ({which}) than without it",
            injected[f"replacement - {name}"].outcomes,
            injected["replacement - circuit"].outcomes,
        )
        for name, which in (("others", "as many"), ("others_equal_harm", "at equal harm elsewhere"))
        if f"replacement - {name}" in injected
    ]


def _more(name: str, more: str, less: str) -> Criterion:
    """Asked: the first outcomes are more often right than the second, on the same things (Newcombe, McNemar)."""
    pairs = list(zip(more, less, strict=True))
    difference = newcombe(*(pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))))
    p = mcnemar(more, less)
    bar = (
        f"above 0, with its whole interval ({difference.low:.3f} to {difference.high:.3f}) and by an exact test of "
        f"the pairs (p = {p:.2g}, n = {len(pairs):,})"
    )
    clear = difference.low is not None and difference.low > 0 and p < 2 * TAIL_PROBABILITY
    return _asked(name, difference.value, bar, clear) | {"n": len(pairs)}


def _elsewhere(said: Mapping[str, Measurement], texts: Onsets) -> Measurement | None:
    """Over boundaries and all other places together, each by how many there are.

    The interval's ends are put together likewise, as though both parts erred the same way: none is wider.
    """
    parts = [
        (float(positions.sum()), said[key])
        for key, positions in (("boundary", texts.control), ("elsewhere", texts.elsewhere))
        if key in said
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
