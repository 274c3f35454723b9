"""The first screen of the report: its question answered in sentences, one prompt answered by every model, and headline
figures with what each means.

All of it is made from the run's own figures. A sentence, a figure or a warning whose measurements the run lacks is left
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl_adapters.data.hesitation_words import HIGHLIGHTED_WORDS
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.utils.html import count, highlight_words, interval_text, percent, three_digits
from tl_adapters.utils.results import Block

PUBLISHED_PROBLEMS, PUBLISHED_TOKENS = 1_000, 100_000
"""Held-out problems, and response tokens, from which on figures are fit to be published."""
MODELS = {
    "base": "the model before reasoning training",
    "target": "the model after it",
    "hybrid": "the target with the base's MLPs",
    "replacement": "the hybrid with the adapters",
}
"""Models whose answers stand side by side, and what each is."""


@dataclass(frozen=True)
class Headline:
    """One headline figure."""

    name: str
    """What was measured."""
    value: str
    """The figure."""
    note: str
    """Its interval or range; "" where there is none."""
    meaning: str
    """A sentence on what it means."""
    warning: str = ""
    """Why it means less than it seems; "" where nothing was measured that says so."""


def answer_sentences(results: Block, circuit: Block) -> list[str]:
    """Return the answer to the question of the report in at most three sentences.

    Args:
        results: the blocks of results.json.
        circuit: the block "hesitation" as `upgraded_block` gives it; empty where no circuit was searched.
    """
    found = (_explained_sentence(results), _features_sentence(results), _circuit_sentence(circuit))
    return [sentence for sentence in found if sentence]


def headlines(results: Block, circuit: Block) -> list[Headline]:
    """Return the headline figures of a run; the arguments are those of `answer_sentences`."""
    found = (
        _explained(results),
        _l0(results),
        _alive(results),
        _recovered(results.get("behaviour") or {}, circuit),
        _behavior_left(circuit),
    )
    return [headline for headline in found if headline is not None]


def size_warning(results: Block) -> str:
    """Return a sentence that says how small the run's samples are, "" where they are as large as a study's."""
    parts = []
    problems = ((results.get("behaviour") or {}).get("target") or {}).get("n")
    if problems is not None and problems < PUBLISHED_PROBLEMS:
        parts.append(f"{count(problems)} problems (published figures: at least {count(PUBLISHED_PROBLEMS)})")
    if faithfulness := results.get("faithfulness"):
        tokens = faithfulness["tokens"]["response"]
        if tokens < PUBLISHED_TOKENS:
            parts.append(f"{count(tokens)} response tokens (at least {count(PUBLISHED_TOKENS)})")
    return f"Intervals are wide, because this run measured {' and '.join(parts)}." if parts else ""


def side_by_side(question: str, texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Return one prompt with the answers of the models that have one, in the order of `MODELS`.

    Args:
        question: the prompt.
        texts: name of a model -> its answer, in which the behavior's words are highlighted.
    """
    answered = ((name, what, texts.get(name)) for name, what in MODELS.items())
    boxes = [
        (name, what, highlight_words(text, HIGHLIGHTED_WORDS)) for name, what, text in answered if text is not None
    ]
    return {"question": question, "boxes": boxes}


def worst_partial(faithfulness: Block) -> Block:
    """Return the largest ratio of a partial replacement's KL to the full one's, as a measurement."""
    ratios = faithfulness["partial_of_full"]
    # Of the first and last layers, the full replacement itself is left out.
    partial = [*ratios["first"][:-1], *ratios["last"][1:], *ratios["only"]]
    return max(partial, key=lambda ratio: -math.inf if ratio["value"] is None else ratio["value"])


def behavior_words(circuit: Block) -> str:
    """Return the words of a circuit as they are called in a sentence, each once whatever its case and spaces."""
    words = {word.strip().casefold(): word.strip() for word in reversed(circuit.get("words") or [])}
    return " or ".join(f"“{word}”" for word in reversed(words.values())) or str(
        circuit.get("behaviour") or "the behavior"
    )


# -- sentences ------------------------------------------------------------------------------------------------------


def _explained_sentence(results: Block) -> str:
    faithfulness = results.get("faithfulness")
    if not faithfulness or faithfulness["kl_of_hybrid"]["value"] is None:
        return ""
    hybrid, replacement = (faithfulness["kl"][name]["value"] for name in ("hybrid", "replacement"))
    kl = (
        f"KL from the target is {three_digits(hybrid)} nats per token with the base's MLPs alone (the hybrid), and "
        f"{three_digits(replacement)} with the adapters beside them (the replacement)"
    )
    explained = _explained_share(faithfulness["kl_of_hybrid"])
    if explained["value"] <= 0:
        return f"The adapters explain nothing of what training changed in the MLPs: {kl}."
    return f"The adapters explain {_with_interval(explained, percent)} of what training changed in the MLPs: {kl}."


def _features_sentence(results: Block) -> str:
    features, l0 = results.get("features") or {}, _layer_l0(results)
    active = f"{sum(l0) / len(l0):.2f} are active per token and layer" if l0 else ""
    if features.get("alive") is None:
        return f"Of their features {active}." if active else ""
    alive = f"They do it with {count(features['alive'])} features that are alive"
    return f"{alive}, of which {active} on average." if active else f"{alive}."


def _circuit_sentence(circuit: Block) -> str:
    if (n := (circuit.get("circuit") or {}).get("n")) is None:
        return ""
    word = behavior_words(circuit)
    if not n:
        return f"No circuit of {word} was found among them."
    made = f"{count(n)} of them are the circuit of {word}"
    full, necessity = _full_strength(circuit), circuit.get("necessity") or {}
    if "circuit" in full:
        left, harm = full["circuit"]["behavior_left"], full["circuit"]["kl_elsewhere"]
        text = f"{made}: without these {_with_interval(left, percent)} of the word's probability is left"
        if "random" in full:
            text += (
                f", and without random features that harm as much {percent(full['random']['behavior_left']['value'])}"
            )
        return f"{text}; the harm elsewhere is a KL of {three_digits(harm['value'])} nats per token."
    if "none" in necessity and "circuit" in necessity:
        rates = [necessity[name] for name in ("none", "circuit", "random") if name in necessity]
        before, after, *random = (f"{rate['hesitation_per_1k']:.1f}" for rate in rates)
        matched = f" ({random[0]} without matched random features)" if random else ""
        accuracies = " to ".join(percent(rate["accuracy"]) for rate in rates[:2])
        text = f"{made}: without these hesitations fall from {before} to {after} per 1,000 tokens{matched}"
        return f"{text}, while accuracy goes from {accuracies}."
    return f"{made}."


# -- headline figures -------------------------------------------------------------------------------------------------


def _explained(results: Block) -> Headline | None:
    faithfulness = results.get("faithfulness")
    if not faithfulness or faithfulness["kl_of_hybrid"]["value"] is None:
        return None
    explained, worst = _explained_share(faithfulness["kl_of_hybrid"]), worst_partial(faithfulness)["value"]
    warning = ""
    if worst is not None and worst > 1:
        warning = (
            f"For the adapters of all layers together: with those of some layers only, KL reaches {worst:.2f} times "
            "that of all."
        )
    return Headline(
        "Difference explained",
        percent(explained["value"]),
        interval_text(explained, percent),
        "Share of the hybrid's KL from the target that is gone with the adapters; 100 % would be the target.",
        warning,
    )


def _l0(results: Block) -> Headline | None:
    if not (l0 := _layer_l0(results)):
        return None
    return Headline(
        "Active features (L0)",
        f"{sum(l0) / len(l0):.2f}",
        f"{min(l0):.2f} to {max(l0):.2f} by layer",
        "Per token and layer: how much there is to read where one token is to be explained.",
    )


def _alive(results: Block) -> Headline | None:
    features = results.get("features") or {}
    if features.get("alive") is None:
        return None
    alive, total, tokens = features["alive"], features["total"], features["tokens"]
    warning = ""
    if 2 * alive < total:
        warning = (
            f"{percent(1 - alive / total)} are not, and explain nothing here; rare ones need more tokens to be seen."
        )
    return Headline(
        "Features alive",
        count(alive),
        f"of {count(total)}",
        f"Active at least {ALIVE_FIRINGS} times on {count(tokens)} tokens.",
        warning,
    )


def _recovered(behavior: Block, circuit: Block) -> Headline | None:
    recovered = (behavior.get("recovered") or {}).get("hybrid")
    if not recovered or recovered["value"] is None:
        return None
    hybrid, target, replacement = (behavior[name]["accuracy"] for name in ("hybrid", "target", "replacement"))
    return Headline(
        "Accuracy recovered",
        percent(recovered["value"]),
        interval_text(recovered, percent),
        f"Of the accuracy that the target has over the hybrid: {percent(hybrid)} hybrid, {percent(replacement)} "
        f"replacement, {percent(target)} target.",
        _recovered_warning(behavior, circuit),
    )


def _recovered_warning(behavior: Block, circuit: Block) -> str:
    """Say how much of the recovered accuracy is the opening of the thinking alone, as far as that was measured.

    In the circuit's study the hybrid's prompts open the thinking (`Subject.prefill`); in the block "behaviour" no
    model's prompt does.
    """
    hybrid, target = behavior["hybrid"], behavior["target"]
    given = ((circuit.get("sufficiency") or {}).get("none") or {}).get("accuracy")
    gain = target["accuracy"] - hybrid["accuracy"]
    if gain <= 0:
        return "The target solves no more than the hybrid, so there is nothing to recover."
    if target["think_opened"] - hybrid["think_opened"] < 0.5:
        return ""
    opens = f"the hybrid opens its thinking in {percent(hybrid['think_opened'])} of its answers"
    if given is None:
        return (
            f"Part of it may be the opening of the thinking: {opens}, the target in {percent(target['think_opened'])}."
        )
    if 2 * (given - hybrid["accuracy"]) < gain:
        return ""
    return f"Mostly the opening of the thinking: {opens}; where <think> is given, it solves {percent(given)} by itself."


def _behavior_left(circuit: Block) -> Headline | None:
    full = _full_strength(circuit)
    if "circuit" not in full or full["circuit"]["behavior_left"]["value"] is None:
        return None
    left, random = full["circuit"]["behavior_left"], (full.get("random") or {}).get("behavior_left") or {}
    beside = ""
    if random.get("value") is not None:
        beside = f" Random features that harm as much leave {_with_interval(random, percent)}."
    return Headline(
        "Behavior without its circuit",
        percent(left["value"]),
        interval_text(left, percent),
        f"Of the probability of {behavior_words(circuit)} where the target says it, without the circuit.{beside}",
        _left_warning(circuit, full["circuit"], left, random),
    )


def _left_warning(circuit: Block, point: Block, left: Block, random: Block) -> str:
    if left.get("high") is not None and random.get("low") is not None and random["low"] <= left["high"]:
        return "The intervals of circuit and random features overlap, so the circuit is not told apart from them."
    unchanged = ((circuit.get("dose_curves") or {}).get("unchanged") or {}).get("corrected") or {}
    corrected = point.get("corrected") or {}
    goes = left["value"] < 0.5 and bool(unchanged.get("value"))
    if goes and corrected.get("value") is not None and 2 * corrected["value"] >= unchanged["value"]:
        return (
            f"The word goes more than the correction does: {percent(corrected['value'])} of injected errors are still "
            f"corrected, of {percent(unchanged['value'])} with the circuit."
        )
    return ""


# -- measurements -----------------------------------------------------------------------------------------------------


def _explained_share(kl_of_hybrid: Block) -> dict[str, Any]:
    """The share of the hybrid's KL that is gone, from the share that is left."""
    gone = {key: None if kl_of_hybrid.get(key) is None else 1 - kl_of_hybrid[key] for key in ("value", "low", "high")}
    return {**kl_of_hybrid, "value": gone["value"], "low": gone["high"], "high": gone["low"]}


def _layer_l0(results: Block) -> Sequence[float]:
    values = [layer["value"] for layer in (results.get("faithfulness") or {}).get("l0", [])]
    return [value for value in values if value is not None]


def _full_strength(circuit: Block) -> dict[str, Block]:
    """The point of each dose curve at the strength of the circuit itself."""
    curves = (circuit.get("dose_curves") or {}).get("curves") or {}
    points = {name: next((p for p in curve or [] if p.get("factor") == 1), None) for name, curve in curves.items()}
    return {name: point for name, point in points.items() if point and point.get("behavior_left")}


def _with_interval(measurement: Block, fmt: Callable[[float], str]) -> str:
    interval = interval_text(measurement, fmt)
    return fmt(measurement["value"]) + (f" ({interval})" if interval else "")
