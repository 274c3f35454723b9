"""What the conditions of a study do, compared on the report problems: each function makes one part of results.json.

Every function takes what it reads as arguments: the report split (`ReportSplit`), the conditions and feature sets
(`conditions`), and, where one part needs another, the answers that the other one returns (`AnsweredConditions`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.conditions import CONTROL_SETS, TUNED_BASELINES, Conditions, FeatureSets
from tl_adapters.circuits.measurements import (
    ReplacementResiduals,
    answers,
    corrected,
    corrected_more,
    mean_probabilities,
    mediation,
    probabilities,
    record,
)
from tl_adapters.circuits.onsets import Onsets, find_onsets
from tl_adapters.circuits.subject import Subject, kinds_at
from tl_adapters.data.words import word_tokens
from tl_adapters.evaluation.behaviors import Behavior, Phrases
from tl_adapters.evaluation.response_metrics import measure_responses
from tl_adapters.generation.responses import Response, traces_of
from tl_adapters.interventions.variants import (
    FeatureFactors,
    Variant,
    multiplied,
    on_route,
    with_negated,
    with_only,
    without,
)
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.measurement import Estimate, Measurement, OutcomesMeasurement

PROBABILITY_DOCUMENTS = 400
"""Report documents over which probabilities are read: they vary less than answers do."""
MEDIATION_DOCUMENTS = 200
"""Documents with an onset on which mediation is measured: attention patterns of every layer are held in memory."""
DOSE_PROBLEMS = 300
"""Report problems that are answered at every dose."""
DOSES = (4, 8, 16, 24, 32, 48, 72, 80, 96, 128)
"""Numbers of features that are removed and inserted, beside the size of the circuit."""
EXAMPLE_PROBLEMS = 4
"""Problems whose answers are shown side by side."""
BIAS_ONLY = multiplied("decoder biases only", FeatureFactors("replacement", others=0.0))
"""The hybrid with the decoder biases of the adapters and none of their features."""


@dataclass(frozen=True)
class ReportSplit:
    """The problems that nothing was chosen on, with the target's answers to them."""

    pair: PairedModel
    """With adapters on every layer."""
    subject: Subject
    """The problems, and what can be checked in an answer."""
    behavior: Behavior
    """What is counted in answers."""
    answers: list[Response]
    """The target's."""
    onsets: Onsets
    """In the target's answers."""
    slips: list[bool] | None
    """Of every problem, whether the target's answer contains a wrong step; None where that is not known."""

    @classmethod
    def of(
        cls, pair: PairedModel, subject: Subject, behavior: Behavior, answers: list[Response], phrases: Phrases
    ) -> ReportSplit:
        """Find the onsets in the target's answers; ``phrases`` are the tokens that the select split gave."""
        slipped = subject.slipped
        return cls(
            pair=pair,
            subject=subject,
            behavior=behavior,
            answers=answers,
            onsets=find_onsets(pair, traces_of(answers, pair.model.tokenizer), behavior, phrases),
            slips=None
            if slipped is None
            else [slipped(problem, answer) for problem, answer in zip(subject.report, answers, strict=True)],
        )

    @property
    def probability_texts(self) -> Onsets:
        """The documents over which probabilities are read."""
        return self.onsets.rows(range(min(PROBABILITY_DOCUMENTS, len(self.onsets))))

    def record(
        self, responses: Sequence[Response], baseline: Sequence[Response], of_sets: bool = False
    ) -> dict[str, Any]:
        """`measurements.record` of answers to the report problems."""
        signs = {name: sum(r.matches(pattern) for r in responses) for name, pattern in self.subject.signs.items()}
        return record(responses, baseline, self.behavior, "report", self.slips, signs, of_sets)

    def text_spans(self, response: Response) -> list[tuple[int, int]]:
        """Where an answer's text shows the behavior, as (start, stop) of characters."""
        return self.behavior.text_spans(response, self.pair.model.tokenizer)


@dataclass(frozen=True)
class AnsweredConditions:
    """Records of answers by condition, and the answers of those conditions that other parts read."""

    records: dict[str, dict[str, Any]]
    """As results.json holds them."""
    responses: dict[str, list[Response]]
    """Of "none", where nothing is changed, and of the conditions with the circuit itself."""


# -- over given text ----------------------------------------------------------------------------------------------


def probabilities_by_condition(
    report: ReportSplit, conditions: Conditions, sets: FeatureSets, n_random: int
) -> dict[str, dict[str, Measurement]]:
    """Probability of the behavior over the target's own text, and the harm elsewhere; of ``n_random`` sets the mean."""
    pair, texts = report.pair, report.probability_texts
    residuals = ReplacementResiduals.read(pair, texts)
    variants = {name: on_route(name) for name in ("target", "replacement", "hybrid")}
    variants |= {f"replacement - {name}": variant for name, variant in conditions.removals.items()}
    # A ban is left out: its probability is 0 and its KL infinite.
    variants |= {f"replacement, {name}": conditions.baselines[name] for name in TUNED_BASELINES}
    variants |= {f"hybrid + {name}": variant for name, variant in conditions.insertions.items()}
    figures = {name: probabilities(pair, texts, variant, "report", residuals) for name, variant in variants.items()}
    for name, make in (("replacement - random", without), ("hybrid + random", with_only)):
        drawn = [make(features) for features in sets.random[:n_random]]
        figures[name] = mean_probabilities(pair, texts, drawn, "report", residuals)
    return figures


def probabilities_of_other_words(
    report: ReportSplit, conditions: Conditions, sets: FeatureSets
) -> dict[str, dict[str, Measurement]]:
    """Probability, at the same positions, of words of the behavior on which nothing was chosen."""
    texts = report.probability_texts
    if not report.subject.held_out:
        return {}
    tokens = word_tokens(report.pair.model.tokenizer, report.subject.held_out).values()
    if not (phrases := tuple(phrase for phrase in tokens if phrase not in texts.phrases)):
        return {}
    variants = {
        "target": on_route("target"),
        "replacement": on_route("replacement"),
        "replacement - circuit": without(sets.circuit),
        "words banned": conditions.baselines["ban"],
        "hybrid": on_route("hybrid"),
        **{f"hybrid + {name}": conditions.insertions[name] for name in conditions.circuit_insertions},
    }
    if any(isinstance(phrase, tuple) for phrase in texts.phrases):
        del variants["words banned"]  # a phrase is banned after its first token, so nothing changes at the onsets
    other = replace(texts, phrases=phrases)
    return {name: probabilities(report.pair, other, variant, "report") for name, variant in variants.items()}


def mediation_of_templates(
    report: ReportSplit, templates: Sequence[FeatureId], outputs: Sequence[FeatureId]
) -> dict[str, Any]:
    """How much of the effect of all template features, in the circuit or not, passes through its output features."""
    block: dict[str, Any] = {"n": len(templates)}
    if templates:
        texts = report.onsets.with_onsets(n=MEDIATION_DOCUMENTS)
        block |= mediation(report.pair, texts, templates, outputs, "report")
    return block


def suppressor_probabilities(report: ReportSplit, suppressors: Sequence[FeatureId]) -> dict[str, Any]:
    """Probability of the behavior with and without the features that lower it."""
    block: dict[str, Any] = {"n": len(suppressors), "ids": [f"{f.layer}.{f.index}" for f in suppressors]}
    if suppressors:
        for when, figures in _before_and_after(report, suppressors).items():
            block |= {f"p_{key}_{when}": figures[key] for key in ("moment", "boundary") if key in figures}
    return block


def bystander_probabilities(report: ReportSplit, bystanders: Sequence[FeatureId], n_removed: int) -> dict[str, Any]:
    """Probability of the behavior with and without the ``n_removed`` most active bystanders.

    Bystanders fire before the word and, by formula, do nothing for it; so removing them should change nothing.
    """
    removed = list(bystanders[:n_removed])
    block: dict[str, Any] = {"n": len(bystanders), "ids": [f"{f.layer}.{f.index}" for f in removed]}
    if removed:
        for when, figures in _before_and_after(report, removed).items():
            block[f"p_{when}"] = figures["moment"]
    return block


def _before_and_after(report: ReportSplit, features: Sequence[FeatureId]) -> dict[str, dict[str, Measurement]]:
    variants = {"before": on_route("replacement"), "after": without(features)}
    texts = report.probability_texts
    return {when: probabilities(report.pair, texts, variant, "report") for when, variant in variants.items()}


# -- answers ------------------------------------------------------------------------------------------------------


def necessity(report: ReportSplit, conditions: Conditions, sets: FeatureSets, n_random: int) -> AnsweredConditions:
    """Answers of the replacement without sets of features, and under the baselines."""
    pair, subject = report.pair, report.subject
    unchanged = answers(pair, subject, on_route("replacement"))
    records, responses = {"none": report.record(unchanged, unchanged)}, {"none": unchanged}

    def measure(name: str, variant: Variant, opened: bool = False) -> None:
        answered = answers(pair, subject, variant, opened=opened)
        records[name] = report.record(answered, unchanged)
        if name == "circuit":
            responses[name] = answered

    for name in sets.parts:
        measure(name, conditions.removals[name])
    records["random"] = _random_record(report, unchanged, [without(f) for f in sets.random[:n_random]])
    measure("bias_only", BIAS_ONLY, opened=True)
    for name, variant in {**conditions.removals, **conditions.baselines}.items():
        if name not in sets.parts:
            measure(name, variant)
    if conditions.banned_elsewhere is not None:
        records["ban"]["banned_elsewhere"] = conditions.banned_elsewhere
    return AnsweredConditions(records, responses)


def sufficiency(report: ReportSplit, conditions: Conditions, sets: FeatureSets, n_random: int) -> AnsweredConditions:
    """Answers of the hybrid with sets of features added; its thinking is opened in the prompt."""
    pair, subject = report.pair, report.subject
    unchanged = answers(pair, subject, on_route("hybrid"), opened=True)
    records, responses = {"none": report.record(unchanged, unchanged)}, {"none": unchanged}
    for name, variant in conditions.insertions.items():
        answered = answers(pair, subject, variant, opened=True)
        records[name] = report.record(answered, unchanged)
        if name in conditions.circuit_insertions:
            responses[name] = answered
    inserted = [with_only(features) for features in sets.random[:n_random]]
    records["random"] = _random_record(report, unchanged, inserted, opened=True)
    records["b_dec_only"] = report.record(answers(pair, subject, BIAS_ONLY, opened=True), unchanged)
    return AnsweredConditions(records, responses)


def _random_record(
    report: ReportSplit, unchanged: list[Response], variants: Sequence[Variant], opened: bool = False
) -> dict[str, Any]:
    """The mean over matched random sets; the intervals are over problems and over the choice of sets."""
    draws = [answers(report.pair, report.subject, variant, opened=opened) for variant in variants]
    pooled = [response for answered in draws for response in answered]
    fields = report.record(pooled, list(unchanged), of_sets=True)
    cuts = [report.record(answered, unchanged).get("hesitation_cut") for answered in draws]
    sizes = [abs(cut.value) for cut in cuts if cut is not None and cut.value is not None]
    fields["draws"] = len(draws)
    fields["smallest_cut"], fields["largest_cut"] = min(sizes, default=None), max(sizes, default=None)
    return fields


def transfer(report: ReportSplit, sets: FeatureSets) -> dict[str, Any]:
    """Answers of the target itself, and with features negated on its MLPs (scale -0.5)."""

    def record_of(variant: Variant) -> dict[str, Any]:
        return report.record(answers(report.pair, report.subject, variant), report.answers)

    return {
        "none": report.record(report.answers, report.answers),
        "negated": record_of(with_negated(sets.circuit)),
        "negated_random": record_of(with_negated(sets.random[0])),
    }


def corrections(report: ReportSplit, conditions: Conditions, sets: FeatureSets) -> dict[str, OutcomesMeasurement]:
    """Share of the wrong steps written into the model's answer that it corrects, by condition.

    This is the test for which no logit was read. It is empty where the subject has no wrong steps to write.
    """
    if not (injections := report.subject.injections):
        return {}
    variants = {
        "target": on_route("target"),
        "replacement": on_route("replacement"),
        "replacement - random": without(sets.random[0]),
        **{f"replacement - {name}": conditions.removals[name] for name in ("circuit", *CONTROL_SETS)},
        "word banned": conditions.baselines["ban"],
        **{f"replacement, {name}": conditions.baselines[name] for name in TUNED_BASELINES},
        "hybrid": on_route("hybrid"),
        "hybrid + random": with_only(sets.random[0]),
        **{f"hybrid + {name}": conditions.insertions[name] for name in (*conditions.circuit_insertions, "others")},
    }
    return {
        name: corrected(report.pair, injections, variant, report.subject, "report")
        for name, variant in variants.items()
    }


def corrections_lost_to_circuit(correction: Mapping[str, OutcomesMeasurement]) -> dict[str, Measurement]:
    """By how much more is corrected without other features than without the circuit, by control set."""
    if not correction:
        return {}
    circuit = correction["replacement - circuit"]
    return {name: corrected_more(correction[f"replacement - {name}"], circuit) for name in ("random", *CONTROL_SETS)}


def dose_response(
    report: ReportSplit, order: Sequence[FeatureId], n_circuit: int, unchanged: Sequence[Response]
) -> Any:
    """Hesitation by the number of features that are removed or inserted.

    Args:
        report: the report split.
        order: features in the order in which the search took them, beyond the circuit too.
        n_circuit: size of the circuit, which is one of the doses.
        unchanged: answers of the replacement.
    """
    doses, few = [], replace(report.subject, report=report.subject.report[:DOSE_PROBLEMS])
    for n in sorted({*(dose for dose in DOSES if dose < len(order)), n_circuit, len(order)}):
        features = order[:n]
        answered = answers(report.pair, few, without(features))
        fields = record(answered, unchanged[: len(answered)], report.behavior, "report")
        p_removed, p_inserted = (
            probabilities(report.pair, report.probability_texts, variant, "report")["moment"].value
            for variant in (without(features), with_only(features))
        )
        interval = Estimate(fields["hesitation_per_1k"], **fields["ci"]["hesitation_per_1k"])
        doses.append(
            {
                "n": n,
                "hesitation_per_1k": interval.measurement(fields["n"], "per 1,000 response tokens", "report"),
                "hesitation_cut": fields["hesitation_cut"].value if "hesitation_cut" in fields else 0.0,
                "p_moment": p_removed,
                "p_inserted": p_inserted,
            }
        )
    return doses


def sampled(report: ReportSplit, sets: FeatureSets, temperature: float, seed: int) -> dict[str, Any]:
    """Rates of answers that are drawn at a temperature instead of taking the likeliest tokens."""
    rates = {}
    for name, variant in (("none", on_route("replacement")), ("circuit", without(sets.circuit))):
        answered = answers(report.pair, report.subject, variant, temperature=temperature, seed=seed)
        rates[name] = measure_responses(answered, "report", report.behavior)
    return rates


def kinds_by_condition(
    report: ReportSplit, removed: AnsweredConditions, inserted: AnsweredConditions
) -> dict[str, dict[str, int]]:
    """What the hesitations lead to (`subject.kinds_at`): of the target, and with and without the circuit."""
    responses = {"target": report.answers, **removed.responses}
    responses |= {f"hybrid + {name}": answered for name, answered in inserted.responses.items() if name != "none"}

    def kinds(answered: Sequence[Response]) -> dict[str, int]:
        count = Counter(kind for r in answered for kind in kinds_at(r.text, report.text_spans(r)))
        return {kind: count[kind] for kind in ("correction", "re-check", "restart")}

    return {name: kinds(answered) for name, answered in responses.items()}


def example_answers(
    report: ReportSplit, removed: AnsweredConditions, inserted: AnsweredConditions, strength: float
) -> list[dict[str, Any]]:
    """Answers to a few problems side by side, first those on which the replacement hesitates at least twice.

    Each example has the question, and the text under every condition. Where a function defines the behavior, "places"
    are the (start, stop) of characters to mark; words are found again in the text.
    """
    unchanged, count = removed.responses["none"], report.behavior.count
    responses = {
        "replacement": unchanged,
        "without the circuit": removed.responses["circuit"],
        "hybrid, thinking opened": inserted.responses["none"],
        "with the circuit": inserted.responses["circuit"],
    }
    if "circuit_at_strength" in inserted.responses:
        name = f"with the circuit, at strength {strength:g}"
        responses[name] = inserted.responses["circuit_at_strength"]
    examples = []
    order = sorted(range(len(unchanged)), key=lambda i: -min(2, count(unchanged[i])))
    for i in order[:EXAMPLE_PROBLEMS]:
        example: dict[str, Any] = {"question": report.subject.report[i].question}
        example |= {name: answered[i].text for name, answered in responses.items()}
        if report.behavior.find is not None:
            example["places"] = {name: report.text_spans(answered[i]) for name, answered in responses.items()}
        examples.append(example)
    return examples
