"""The study of a behavior's circuit: found, sorted into roles, tested by intervention (arXiv 2602.20904, section 5).

1. The target answers the select problems. Onsets, matched control positions and continuations are found in its text
   (`onsets`).
2. Features are searched that are necessary and sufficient for the behavior at once (`search`).
3. Each feature gets its role by formula (`roles`): output, template, continuation, suppressor.
4. On the report problems, on which nothing was chosen, it is measured what the model does without the circuit
   (necessity), what the hybrid does with it (sufficiency), what the target does with it negated (transfer), how much of
   the effect of template features passes through output features (mediation), and whether wrong steps written into the
   model's answer are still corrected (`comparisons`).
5. Every claim stands beside its controls (`conditions`): matched random features and the most active other features,
   equal in size, in write norm at the onsets, and in harm elsewhere; banned words; the circuit of another token; and a
   bias on the logits, steering, neurons and low rank, each set on the select split to the circuit's own effect
   (`control_strengths`). Behavior left against harm elsewhere is measured over the whole range of strengths
   (`dose_curves`).

The circuit is inserted at strength 1: that is what is claimed. Where it was searched at another strength, the same is
measured at that strength too.

Choosing features by the logit of a word and then testing that logit would be circular. So nothing is chosen on what is
reported, and the main test reads no logit: it is the correction of injected wrong steps.

`find_circuit` is steps 1 to 3, `analyze_behavior` is all of them, and `analyze_hesitation` is the case of "Wait".
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tl_adapters.circuits.circuit import ROLES, Circuit
from tl_adapters.circuits.comparisons import (
    ReportSplit,
    bystander_probabilities,
    corrections,
    corrections_lost_to_circuit,
    dose_response,
    example_answers,
    kinds_by_condition,
    mediation_of_templates,
    necessity,
    probabilities_by_condition,
    probabilities_of_other_words,
    sampled,
    sufficiency,
    suppressor_probabilities,
    transfer,
)
from tl_adapters.circuits.conditions import choose_feature_sets, make_conditions
from tl_adapters.circuits.control_strengths import TuningTexts, control_records, set_controls
from tl_adapters.circuits.criteria import MIN_HESITATION_CUT, OUTCOME_NAMES, correction_beside_others, criteria
from tl_adapters.circuits.dose_curves import CURVE_FACTORS, dose_curves
from tl_adapters.circuits.results_block import HESITATION_SCHEMA_VERSION
from tl_adapters.circuits.search import FoundCircuit, SearchOptions, find_circuit
from tl_adapters.circuits.subject import Subject
from tl_adapters.evaluation.behaviors import Behavior, BehaviorError, GivenBehavior
from tl_adapters.generation.responses import respond, traces_of
from tl_adapters.interventions.variants import on_route
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.notebook import rows_frame, tables_view
from tl_adapters.utils.renamed import renamed_arguments
from tl_adapters.utils.results import plain

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class StudyOptions:
    """How much a study measures.

    Raises BehaviorError for a number that is out of range.
    """

    search: SearchOptions = field(default_factory=SearchOptions)
    """Size and weights of the search."""
    draws: int = 3
    """Matched random sets under which the problems are answered."""
    curve_factors: tuple[float, ...] = CURVE_FACTORS
    """Strengths at which the dose curves are measured, as factors of the full strength of each intervention."""
    probability_draws: int = 8
    """Matched random sets under which probabilities are measured."""
    temperature: float = 1.0
    """Temperature of the sampled answers, which stand beside the greedy ones."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        if self.draws < 1 or self.probability_draws < 1 or self.temperature <= 0:
            raise BehaviorError(f"Got {self}; draws are at least 1 each, and the temperature is above 0.")
        if not all(math.isfinite(factor) and factor > 0 for factor in self.curve_factors):
            raise BehaviorError(f"Got curve_factors={self.curve_factors}; every strength is a number above 0.")


@dataclass(frozen=True)
class BehaviorStudy:
    """What a study found and measured; in a notebook it shows the criteria and the circuit."""

    found: FoundCircuit
    """The circuit, with the texts and the search that it comes from."""
    block: dict[str, Any]
    """The block "hesitation" of results.json."""
    examples: list[dict[str, Any]]
    """Answers to a few problems under several conditions, side by side."""

    @property
    def circuit(self) -> Circuit:
        """The features, with their roles."""
        return self.found.circuit

    def _criteria(self) -> list[dict[str, Any]]:
        """The criteria, with what came of each in words."""
        names = {"criterion": "name", "measured": "value", "threshold": "bar"}
        return [
            {**{name: c[key] for name, key in names.items()}, "outcome": OUTCOME_NAMES[c["reached"]]}
            for c in self.block.get("criteria", [])
        ]

    def __repr__(self) -> str:
        outcomes = Counter(criterion["outcome"] for criterion in self._criteria())
        counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()) or "nothing measured"
        return f"BehaviorStudy: {self.circuit!r}; criteria: {counts}"

    def to_dict(self) -> dict[str, Any]:
        """The block "hesitation" of results.json, as JSON values."""
        return plain(self.block)

    def to_pandas(self) -> DataFrame:
        """The criteria as a DataFrame: what was measured, the threshold, and what came of it."""
        return rows_frame(self._criteria(), ["criterion", "measured", "threshold", "outcome"])

    def _repr_html_(self) -> str:
        rows = [
            [c["criterion"], f"{c['measured']:.3g}" if c["measured"] is not None else "", c["threshold"], c["outcome"]]
            for c in self._criteria()
        ]
        return tables_view((["criterion", "measured", "threshold", ""], rows)) + self.circuit._repr_html_()


def analyze_hesitation(
    pair: PairedModel, subject: Subject, options: StudyOptions | None = None, *, progress: bool = True
) -> BehaviorStudy:
    """`analyze_behavior` of the word "Wait"; raises what that raises."""
    return analyze_behavior(pair, subject, options=options, progress=progress)


@renamed_arguments(words="behavior")
def analyze_behavior(
    pair: PairedModel,
    subject: Subject,
    behavior: GivenBehavior = None,
    *,
    options: StudyOptions | None = None,
    seeds: tuple[int, ...] = (0,),
    progress: bool = True,
) -> BehaviorStudy:
    """Find the circuit of a behavior, sort it into roles, and test it by intervention (see the module's text).

    Args:
        pair: with adapters on every layer.
        subject: problems to choose on and to report on, with what can be checked in an answer (`subject`).
        behavior: a behavior, a word or phrase, or several; None is hesitation (`Behavior.of`). Of words the rate is how
            often answers contain them, whole and in any case. Of a function (`Behavior.find`) it is how often the
            function finds something in an answer, also in one that was cut at the limit; probabilities are then those
            of the tokens that begin the behavior, and where the function gives (start, stop) those of all its tokens.
        options: how much is measured.
        seeds: of the adapters, recorded with every figure.
        progress: show bars.

    A target that never shows the behavior has an empty study: no onsets, no circuit, no conditions.

    Raises BehaviorError for words that are none, and what `respond` and `find_circuit` raise.
    """
    options = options or StudyOptions()
    behavior = Behavior.of(behavior)
    with subject.engine.entered(pair, on_route("target")) as model:
        select_answers, report_answers = (
            respond(model, problems, max_new_tokens=subject.max_new_tokens, temperature=subject.temperature)
            for problems in (subject.select, subject.report)
        )
    traces = traces_of(select_answers, pair.model.tokenizer)
    found = find_circuit(pair, traces, behavior, options=options.search, progress=progress)
    report = ReportSplit.of(pair, subject, behavior, report_answers, found.onsets.phrases)
    block, examples = _description(pair, found, report), list[dict[str, Any]]()
    if found.promoting and report.onsets.counts["moments"]:
        measured, examples = _measurements(pair, found, report, options, progress)
        block["circuit"]["share_of_mass"] = measured.pop("share_of_mass")
        block |= measured
        block["criteria"] = [
            *criteria(block, report.probability_texts),
            *correction_beside_others(block.get("injected", {})),
        ]
    else:
        log.info("%s: there is nothing to measure; onsets are %s", behavior.name, block["moments"])
    if not subject.republish:
        block["texts_withheld"], examples = True, []
    if facts := subject.engine.facts():
        block["engine"] = facts
    return BehaviorStudy(found, _with_seeds(block, seeds), examples)


def _measurements(
    pair: PairedModel, found: FoundCircuit, report: ReportSplit, options: StudyOptions, progress: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All measurements of a circuit by their keys in results.json, and answers side by side."""

    def measured(part: str, measure: Callable[..., Result], *inputs: Any) -> Result:
        log.info("%s: %s ...", report.behavior.name, part)
        return measure(*inputs)

    assert found.roles is not None
    assert found.search is not None
    n_random = max(options.draws, options.probability_draws)
    sets = choose_feature_sets(pair, found, n_random, options.seed)
    texts = TuningTexts(pair, found.onsets)
    tuned = measured("controls", set_controls, texts, sets.circuit, sets.orders, sets.write_norms)
    conditions = make_conditions(pair, found, sets, tuned, options.search, progress)
    by_condition = measured(
        "probabilities", probabilities_by_condition, report, conditions, sets, options.probability_draws
    )
    removed = measured("necessity", necessity, report, conditions, sets, options.draws)
    inserted = measured("sufficiency", sufficiency, report, conditions, sets, options.draws)
    correction = measured("injected", corrections, report, conditions, sets)
    order = [*sets.circuit, *found.search.further]
    dose = measured("dose", dose_response, report, order, len(sets.circuit), removed.responses["none"])
    reached = [d["n"] for d in dose if (d["hesitation_cut"] or 0.0) >= MIN_HESITATION_CUT]
    parts = {
        "share_of_mass": sets.activation_shares,
        "controls": control_records(tuned, texts.unchanged, sets.circuit, sets.write_norms),
        "probabilities": by_condition,
        "other_words": measured("other_words", probabilities_of_other_words, report, conditions, sets),
        "necessity": removed.records,
        "sufficiency": inserted.records,
        "transfer": measured("transfer", transfer, report, sets),
        "injected": correction,
        "injected_more": corrections_lost_to_circuit(correction),
        "mediation": measured("mediation", mediation_of_templates, report, found.roles.templates, sets.output),
        "dose": dose,
        "dose_curves": measured("dose_curves", dose_curves, report, sets, tuned, options.curve_factors, options.draws),
        "kinds": kinds_by_condition(report, removed, inserted),
        "sampled": measured("sampled", sampled, report, sets, options.temperature, options.seed),
        "suppressors": measured("suppressors", suppressor_probabilities, report, found.circuit.ids("suppress")),
        "bystanders": measured(
            "bystanders", bystander_probabilities, report, found.roles.bystanders, len(sets.circuit)
        ),
        "smallest": {"n": min(reached, default=None), "cut": MIN_HESITATION_CUT},
    }
    examples = example_answers(report, removed, inserted, found.circuit.strength)
    return {key: part for key, part in parts.items() if part}, examples


def _description(pair: PairedModel, found: FoundCircuit, report: ReportSplit) -> dict[str, Any]:
    """The block of a study before anything is measured: the behavior, its onsets, and the size of the circuit."""
    behavior = report.behavior
    block: dict[str, Any] = {
        "schema_version": HESITATION_SCHEMA_VERSION,
        "behaviour": behavior.name,
        "words": list(found.circuit.words),
        "moments": {"select": found.onsets.counts, "report": report.onsets.counts},
        "circuit": _circuit_size(pair, found),
    }
    phrases = any(isinstance(phrase, tuple) for phrase in found.onsets.phrases)
    if behavior.find is not None:
        block["function"] = behavior.function
    if phrases or behavior.find is not None:
        block["measured"] = "the whole phrase" if phrases else "the token that begins it"
        block["begins_alike"] = {
            "select": found.onsets.controls_beginning_alike,
            "report": report.onsets.controls_beginning_alike,
        }
    return block


def _circuit_size(pair: PairedModel, found: FoundCircuit) -> dict[str, Any]:
    """How large the circuit is, in every sense in which it might be called small."""
    circuit, promoting = found.circuit, found.promoting
    layers, index = (torch.tensor([f[i] for f in promoting], dtype=torch.long) for i in (0, 1))
    n, alive = len(promoting), int(found.alive.sum())
    return {
        "n": n,
        **{role: len(circuit.ids(role)) for role in ROLES},
        "alive": alive,
        "share_of_alive": n / max(1, alive),
        "share_of_all": n / found.alive.numel(),
        "share_of_activation": float(found.firings[layers, index].sum()) / max(1e-9, float(found.firings.sum())),
        "times_l0": n / max(1e-9, found.l0 * pair.n_layers),
        "distinct_directions": circuit.distinct_directions(pair.installed_adapters()),
        "strength": circuit.strength,
        "threshold": circuit.threshold,
        "by_layer": torch.bincount(layers, minlength=pair.n_layers).tolist(),
    }


def _with_seeds(value: Any, seeds: tuple[int, ...]) -> Any:
    """The same block with ``seeds`` in every measurement."""
    if isinstance(value, Measurement):
        return replace(value, seeds=seeds)
    if isinstance(value, dict):
        return {key: _with_seeds(item, seeds) for key, item in value.items()}
    return [_with_seeds(item, seeds) for item in value] if isinstance(value, list) else value
