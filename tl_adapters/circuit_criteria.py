"""What a circuit of hesitation is asked for, and whether this one does it: bars set before anything was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_adapters.intervals import Figure
from tl_adapters.moments import Moments

SHARE, CUT, SHORTER = 0.03, 0.95, 0.2
"""Of the alive features; of the hesitation rate gone without it; of the length gone without it."""
SAME_ACCURACY, SAME_HYBRID_ACCURACY = 0.03, 0.05
"""Changes of accuracy that count as none: of the replacement where the target makes no slip, of the hybrid."""
RANDOM_CUT = 0.05
"""Share of the hesitation rate that may be gone without a matched random set."""
KEPT, FALSE = 0.8, 0.05
"""In the hybrid with it, P(word) at the target's moments as a share of the target's; P(word) where it says none."""
Criterion = dict[str, Any]
"""name, value, bar in words, reached."""


def criteria(block: Mapping[str, Any], texts: Moments) -> list[Criterion]:
    """The bars, measured.

    Args:
        block: of one analysis, with the parts "circuit", "necessity", "sufficiency" and "probabilities".
        texts: over which the probabilities were read.
    """
    return [*_of_its_absence(block), *_of_its_presence(block, texts), *_of_correction(block.get("injected") or {})]


def _asked(name: str, value: float, bar: str, reached: bool) -> Criterion:
    return {"name": name, "value": value, "bar": bar, "reached": bool(reached)}


def _of_its_absence(block: Mapping[str, Any]) -> list[Criterion]:
    need, share = block["necessity"], block["circuit"]["share_of_alive"]
    both, random = need["both"], need["random"]
    rounding = 1 / block["circuit"]["alive"]
    asked = [_asked("circuit, share of the alive features", share, "at most 3 %", share <= SHARE + rounding)]
    cut = both["hesitation_cut"].value if "hesitation_cut" in both else 0.0
    asked.append(_asked("hesitation gone without it", cut, "at least 95 %", cut >= CUT))
    shorter = -both["length_change"].value
    asked.append(_asked("responses shorter without it", shorter, "at least 20 %", shorter >= SHORTER))
    change = both.get("accuracy_change_without_slip", both["accuracy_change"])
    where = ", where the target makes no slip" if "accuracy_change_without_slip" in both else ""
    name = f"accuracy changed{where} (equivalence: its whole interval)"
    within = change.low >= -SAME_ACCURACY and change.high <= SAME_ACCURACY
    asked.append(_asked(name, change.value, "within 3 points", within))
    if "hesitation_cut" in random:
        gone = random["hesitation_cut"].value
        asked.append(
            _asked("hesitation gone without matched random features", gone, "less than 5 %", abs(gone) < RANDOM_CUT)
        )
    return asked


def _of_its_presence(block: Mapping[str, Any], texts: Moments) -> list[Criterion]:
    said, change = block["probabilities"], block["sufficiency"]["both"]["accuracy_change"]
    added = said["hybrid + both"]
    kept, false = added["moment"].value / said["target"]["moment"].value, _elsewhere(added, texts)
    asked = [
        _asked("P(word) at the target's moments, hybrid + circuit over target", kept, "at least 0.8", kept >= KEPT),
        _asked("P(word) at all other places of the response, hybrid + circuit", false, "at most 0.05", false <= FALSE),
    ]
    if "boundary" in added:
        at = added["boundary"].value
        name = "P(word) at matched boundaries, hybrid + circuit (stricter)"
        asked.append(_asked(name, at, "at most 0.05", at <= FALSE))
    within = abs(change.value) <= SAME_HYBRID_ACCURACY
    return [*asked, _asked("accuracy, hybrid + circuit less hybrid", change.value, "within 5 points", within)]


def _of_correction(injected: Mapping[str, Figure]) -> list[Criterion]:
    if not injected:
        return []
    asked = []
    for more, less, name in (
        ("replacement", "replacement - both", "injected errors corrected: lost without it"),
        ("hybrid + both", "hybrid", "injected errors corrected: gained by the hybrid with it"),
    ):
        difference, clear = injected[more].value - injected[less].value, injected[less].high < injected[more].low
        asked.append(_asked(name, difference, "above 0, intervals apart", clear))
    return asked


def correction_beside_others(more: Mapping[str, Figure]) -> list[Criterion]:
    """The hard one: is correction lost without the circuit, and less of it without the most active other features?

    Args:
        more: by how much more is corrected without other features than without the circuit, paired by wrong step:
            "others", as many of the most active ones, and "others_equal_harm", as many as harm as much elsewhere.
    """
    asked = []
    for name, which in (("others", "as many"), ("others_equal_harm", "at equal harm elsewhere")):
        if (figure := more.get(name)) is not None:
            named = f"injected errors corrected: more without the most active others ({which}) than without it"
            asked.append(_asked(named, figure.value, "above 0, whole paired interval", figure.low > 0))
    return asked


def _elsewhere(said: Mapping[str, Figure], texts: Moments) -> float:
    """Over boundaries and all other places together, each by how many there are."""
    counts = {place: float(getattr(texts, place).sum()) for place in ("boundary", "elsewhere") if place in said}
    return sum(n * said[place].value for place, n in counts.items()) / max(1.0, sum(counts.values()))
