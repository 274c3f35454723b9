"""The hesitation circuit: found, split, and tested by intervention (section 5 of arXiv 2602.20904).

1. the target answers the select problems; moments, matched boundaries and what follows are found in its text (moments);
2. features are searched that are necessary and sufficient for the word at once (circuit_search);
3. each gets its role by formula (circuit_roles): output, template, continuation, suppressor;
4. on the report problems, which nothing was chosen on: what the model does without the circuit (necessity), what the
   hybrid does with it (sufficiency), what the target does with it negated (transfer), whether template works through
   output (mediation), whether wrong steps written into its answer are still corrected (circuit_trials);
5. beside every claim its control (circuit_controls): matched random and most active other features (equal in size, in
   write norm at the moments, in harm elsewhere), banning the word, the circuit of another token; and a bias on the
   word, steering and neurons, each set on the select split to the circuit's own effect (circuit_tuning).

The circuit is put in at strength 1: that is what is claimed. Where it was searched at another strength, the same at
that strength stands beside it.

Choosing features by the word's logit and then testing that logit would be circular. So nothing is chosen on what is
reported, and the main test is one that no logit was looked at for: the correction of injected wrong steps.

`find_circuit` is steps 1 to 3, `analyze_behavior` all of them, `analyze_hesitation` the named case.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.banned_words import banned, banned_neighbors
from tl_adapters.circuits.circuit import ROLES, Circuit
from tl_adapters.circuits.control_strengths import Setting, Texts, set_controls
from tl_adapters.circuits.controls import (
    commonest_alternative,
    further_matched,
    matched_features,
    most_active_others,
    put_in,
)
from tl_adapters.circuits.criteria import CUT, REACHED, correction_beside_others, criteria
from tl_adapters.circuits.find import Found, find_circuit
from tl_adapters.circuits.measurements import (
    Unchanged,
    answers,
    corrected,
    corrected_more,
    mean_probabilities,
    mediation,
    probabilities,
    record,
)
from tl_adapters.circuits.onsets import find_onsets
from tl_adapters.circuits.results_block import HESITATION_SCHEMA_VERSION
from tl_adapters.circuits.roles import effects_at
from tl_adapters.circuits.search import SearchOptions, search_circuit
from tl_adapters.circuits.subject import Subject, kinds_at
from tl_adapters.data.hesitation_words import HESITATION_ONSET
from tl_adapters.data.words import word_tokens
from tl_adapters.evaluation.behaviors import Behavior, BehaviorError, Find
from tl_adapters.evaluation.response_metrics import rate
from tl_adapters.generation.responses import Response, respond, traces_of
from tl_adapters.interventions.feature_edits import only
from tl_adapters.interventions.variants import Variant, on_route, with_negated, without
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.html import escape, table
from tl_adapters.utils.measurement import Estimate, Measurement, OutcomesMeasurement

log = logging.getLogger(__name__)

PROBABILITY_DOCUMENTS = 400
"""Report documents over which probabilities are read: they vary less than answers do."""
CONTROLS = ("random_scaled", "random_equal_harm", "others", "others_scaled", "others_equal_harm")
"""Sets of other features that are taken out, beside random ones of equal size, of which there are several draws."""
BASELINES = ("logit_bias", "steering", "neurons")
"""What is set to the circuit's own effect."""
MEDIATION_DOCUMENTS = 200
"""Documents with a moment on which mediation is tested: patterns of every layer are held."""
DOSE_PROBLEMS = 300
"""Report problems that are answered at every dose."""
DOSES = (4, 8, 16, 24, 32, 48, 72, 80, 96, 128)


@dataclass(frozen=True)
class StudyOptions:
    """How much is measured."""

    search: SearchOptions = field(default_factory=SearchOptions)
    """Size and weights of the search."""
    draws: int = 3
    """Matched random sets that answer the problems."""
    probability_draws: int = 8
    """Matched random sets whose probabilities are measured."""
    temperature: float = 1.0
    """Of the sampled answers, beside the greedy ones."""
    seed: int = 0
    """Of every draw."""

    def __post_init__(self) -> None:
        if self.draws < 1 or self.probability_draws < 1 or self.temperature <= 0:
            raise BehaviorError(f"Got {self}; draws are at least 1 each, and the temperature is above 0.")


@dataclass
class BehaviorStudy:
    """What an analysis found; in a notebook its main table."""

    found: Found
    """The circuit, and what it was found in."""
    block: dict[str, Any]
    """As results.json holds it, under "hesitation"."""
    examples: list[dict[str, Any]]
    """Answers side by side."""

    @property
    def circuit(self) -> Circuit:
        """The features, with their roles."""
        return self.found.circuit

    def _repr_html_(self) -> str:
        rows = [
            [escape(c["name"]), f"{c['value']:.3g}" if c["value"] is not None else "", escape(c["bar"]),
             REACHED[c["reached"]]]
            for c in self.block.get("criteria", [])
        ]  # fmt: skip
        return table(["asked", "measured", "to be", ""], rows) + self.circuit._repr_html_()


def analyze_hesitation(
    pair: PairedModel, subject: Subject, options: StudyOptions | None = None, *, progress: bool = True
) -> BehaviorStudy:
    """`analyze_behavior` of the word "Wait"."""
    return analyze_behavior(pair, subject, options=options, progress=progress)


def analyze_behavior(
    pair: PairedModel,
    subject: Subject,
    words: Sequence[str] = (HESITATION_ONSET,),
    find: Find | None = None,
    *,
    name: str = "hesitation",
    options: StudyOptions | None = None,
    seeds: tuple[int, ...] = (0,),
    progress: bool = True,
) -> BehaviorStudy:
    """Find the circuit of a behaviour, split it, and test it by intervention (see the module's text).

    Args:
        pair: with adapters on every layer.
        subject: problems to choose on and to report on, with what can be checked about answers (`subjects`).
        words: words or phrases that are said; their rate is how often answers say them, whole and in any case.
        find: instead of words, of a trace the positions of tokens that begin the behaviour, or (start, stop) of its
            tokens. Its rate is how often the function finds something in an answer, also in one cut at the limit. With
            positions alone probabilities are those of the tokens that begin it, with (start, stop) of the whole.
        name: what results call it.
        options: how much is measured.
        seeds: of the adapters, recorded with every figure.
        progress: show bars.

    A target that never does it has an empty study: no moments, no circuit, nothing tried. Raises BehaviourError, and
    what generating raises.
    """
    options = options or StudyOptions()
    behaviour = replace(Behavior.of(words), name=name, find=find)
    study = _Study(pair, subject, behaviour, options, progress)
    block = study.run()
    return BehaviorStudy(study.found, _with_seeds(block, seeds), study.examples)


def _with_seeds(value: Any, seeds: tuple[int, ...]) -> Any:
    if isinstance(value, Measurement):
        return replace(value, seeds=seeds)
    if isinstance(value, dict):
        return {key: _with_seeds(item, seeds) for key, item in value.items()}
    return [_with_seeds(item, seeds) for item in value] if isinstance(value, list) else value


class _Study:
    """One analysis: what is known so far, and its parts in the order in which they run."""

    def __init__(
        self, pair: PairedModel, subject: Subject, behaviour: Behavior, options: StudyOptions, progress: bool
    ) -> None:
        self.pair, self.subject, self.behaviour, self.options = pair, subject, behaviour, options
        self.progress = progress
        self.examples: list[dict[str, Any]] = []
        with pair.routed("target"):
            how: dict[str, Any] = {"max_new_tokens": subject.max_new_tokens, "temperature": subject.temperature}
            said = respond(pair.model, subject.select, **how)
            self.target = respond(pair.model, subject.report, **how)
        tokenizer = pair.model.tokenizer
        self.found = find_circuit(
            pair, traces_of(said, tokenizer), behaviour, options=options.search, progress=progress
        )
        self.onsets = find_onsets(pair, traces_of(self.target, tokenizer), behaviour, self.found.onsets.words)
        self.some = self.onsets.rows(range(min(PROBABILITY_DOCUMENTS, len(self.onsets))))
        self.slips = (
            None
            if subject.slipped is None
            else [subject.slipped(p, r) for p, r in zip(subject.report, self.target, strict=True)]
        )
        circuit = self.found.circuit
        self.order = [f.id for f in circuit.features if f.role != "suppress"]
        self.sets: dict[str, list[FeatureId]] = {
            "output": circuit.ids("output"),
            "template": circuit.ids("template"),
            "circuit": list(self.order),
        }

    def run(self) -> dict[str, Any]:
        """The block."""
        circuit = self.found.circuit
        block: dict[str, Any] = {
            "schema_version": HESITATION_SCHEMA_VERSION,
            "behaviour": self.behaviour.name,
            "words": list(circuit.words),
            "moments": {"select": self.found.onsets.counts, "report": self.onsets.counts},
            "circuit": self.size(),
            **self.told(),
        }
        counts = block["moments"]
        if not self.order or not counts["report"]["moments"]:
            log.info("%s: nothing to try; moments are %s", self.behaviour.name, counts)
            return block
        self.random = self.random_sets()
        block["circuit"]["share_of_mass"] = self.masses
        block["controls"] = self.set_controls()
        parts: dict[str, Callable[[], Any]] = {
            "probabilities": self.probabilities,
            "other_words": self.other_words,
            "necessity": self.necessity,
            "sufficiency": self.sufficiency,
            "transfer": self.transfer,
            "injected": self.injected,
            "injected_more": lambda: self.corrected_more,
            "mediation": self.mediation,
            "dose": self.dose,
            "kinds": lambda: self.kinds,
            "sampled": self.sampled,
            "suppressors": self.suppressors,
            "bystanders": self.bystanders,
        }
        for name, measure in parts.items():
            log.info("%s: %s ...", self.behaviour.name, name)
            if found := measure():
                block[name] = found
        reached = [d["n"] for d in block["dose"] if (d["hesitation_cut"] or 0.0) >= CUT]
        block["smallest"] = {"n": min(reached, default=None), "cut": CUT}
        block["criteria"] = [*criteria(block, self.some), *correction_beside_others(block.get("injected", {}))]
        return block

    def told(self) -> dict[str, Any]:
        """What is to be known of a behaviour that is not said by single tokens; nothing of one that is."""
        words, find = self.found.onsets.words, self.behaviour.find
        phrases = any(isinstance(word, tuple) for word in words)
        found: dict[str, Any] = {} if find is None else {"function": self.behaviour.function}
        if phrases or find is not None:
            found["measured"] = "the whole phrase" if phrases else "the token that begins it"
            found["begins_alike"] = {"select": self.found.onsets.shared, "report": self.onsets.shared}
        return found

    # -- size -----------------------------------------------------------------------------------------------------

    def size(self) -> dict[str, Any]:
        """How large the circuit is, in every sense in which it might look small."""
        found, circuit = self.found, self.found.circuit
        layers, index = (torch.tensor([f[i] for f in self.order], dtype=torch.long) for i in (0, 1))
        n, alive = len(self.order), int(found.alive.sum())
        return {
            "n": n,
            **{role: len(circuit.ids(role)) for role in ROLES},
            "alive": alive,
            "share_of_alive": n / max(1, alive),
            "share_of_all": n / found.alive.numel(),
            "share_of_activation": float(found.firings[layers, index].sum()) / max(1e-9, float(found.firings.sum())),
            "times_l0": n / max(1e-9, found.l0 * self.pair.n_layers),
            "distinct_directions": circuit.distinct_directions(self.pair.installed_adapters()),
            "strength": circuit.strength,
            "threshold": circuit.threshold,
            "by_layer": torch.bincount(layers, minlength=self.pair.n_layers).tolist(),
        }

    # -- arms -----------------------------------------------------------------------------------------------------

    def random_sets(self) -> list[list[FeatureId]]:
        """Matched random sets: equal in size and layer, and as near in mass as there are features."""
        here, there = (effects_at(self.pair, self.found.onsets, at) for at in ("onset", "control"))
        activation = here.activation + there.activation
        generator = torch.Generator().manual_seed(self.options.seed)
        n = max(self.options.draws, self.options.probability_draws)
        sets = [matched_features(self.order, activation, self.found.alive, generator) for _ in range(n)]
        everything = most_active_others(self.order, activation, self.found.alive, activation.numel())
        self.others = everything[: len(self.order)]
        self.written = here.activation
        self.orders = {
            "random": further_matched(self.order, sets[0], activation, self.found.alive, generator),
            "others": everything,
        }
        held = lambda features: float(sum(activation[f] for f in features))  # noqa: E731
        self.masses = {
            "circuit": held(self.order) / float(activation.sum()),
            "random": sum(map(held, sets)) / n / float(activation.sum()),
            "others": held(self.others) / float(activation.sum()),
        }
        return sets

    def set_controls(self) -> dict[str, Any]:
        """What the circuit is held against, made on the select split (`circuit_tuning.set_controls`)."""
        texts = Texts(self.pair, self.found.onsets)
        self.settings: dict[str, Setting] = set_controls(texts, self.order, self.orders, self.written)
        strength = self.found.circuit.strength
        self.stronger = {} if strength == 1 else {"circuit_at_strength": self.added(self.order, strength)}
        other = self._other_circuit()
        self.removals: dict[str, Variant] = {
            **{name: without(features) for name, features in self.sets.items()},
            **{name: self.settings[name].variant for name in CONTROLS},
            **({} if other is None else {"other_tokens": other}),
        }
        self.baselines: dict[str, Variant] = {
            "ban": self.ban(),
            **{name: self.settings[name].variant for name in BASELINES},
        }
        self.insertions: dict[str, Variant] = {
            **{name: self.added(features) for name, features in self.sets.items()},
            "others": self.added(self.others),
            **{name: put_in(self.settings[name].shares or {}) for name in ("random_scaled", "others_scaled")},
            **self.stronger,
        }
        if self.stronger:
            for name, features in (("random", self.random[0]), ("others", self.others)):
                self.insertions[f"{name}_at_strength"] = self.added(features, strength)
        whole = sum(float(self.written[f]) for f in self.order)
        found = {name: setting.record(texts.plain) for name, setting in self.settings.items()}
        for name, setting in self.settings.items():
            shares = dict.fromkeys(self.order, 1.0) if name == "circuit" else setting.shares
            if shares is not None and whole > 0:
                written = sum(float(self.written[f]) * share for f, share in shares.items())
                found[name]["write_norm"] = written / whole
        return found

    def added(self, features: Sequence[FeatureId], strength: float = 1.0, bias: bool = False) -> Variant:
        """The hybrid with features added."""
        entered = lambda pair: only(pair, features, "replacement", strength, decoder_bias=bias)  # noqa: E731
        return Variant(f"hybrid + {len(features)} features", entered)

    def probabilities(self) -> dict[str, dict[str, Measurement]]:
        """Of the word over the target's own text, and the harm elsewhere, by arm."""
        unchanged = Unchanged(self.pair, self.some)
        measure = partial(probabilities, self.pair, self.some, split="report", unchanged=unchanged)
        arms = {name: on_route(name) for name in ("target", "replacement", "hybrid")}
        arms |= {f"replacement - {name}": variant for name, variant in self.removals.items()}
        arms |= {f"replacement, {name}": self.baselines[name] for name in BASELINES}  # of a ban 0, and KL is infinite
        arms |= {f"hybrid + {name}": variant for name, variant in self.insertions.items()}
        found = {name: measure(variant=variant) for name, variant in arms.items()}
        sets = self.random[: self.options.probability_draws]
        for name, make in (("replacement - random", without), ("hybrid + random", self.added)):
            found[name] = mean_probabilities(self.pair, self.some, [make(f) for f in sets], "report", unchanged)
        return found

    def other_words(self) -> dict[str, dict[str, Measurement]]:
        """Probability, at the same places, of words that nothing was chosen on."""
        if not self.subject.held_out:
            return {}
        found = word_tokens(self.pair.model.tokenizer, self.subject.held_out)
        if not (tokens := tuple(word for word in found.values() if word not in self.some.words)):
            return {}
        texts = replace(self.some, words=tokens)
        arms = {
            "target": on_route("target"),
            "replacement": on_route("replacement"),
            "replacement - circuit": without(self.order),
            "words banned": self.baselines["ban"],
            "hybrid": on_route("hybrid"),
            "hybrid + circuit": self.added(self.order),
            **{f"hybrid + {name}": variant for name, variant in self.stronger.items()},
        }
        if any(isinstance(word, tuple) for word in self.found.onsets.words):
            del arms["words banned"]  # a phrase is banned within itself, so nothing changes where it begins
        return {name: probabilities(self.pair, texts, variant, "report") for name, variant in arms.items()}

    def _arm(self, baseline: Sequence[Response] | None, variant: Variant, opened: bool = False) -> dict[str, Any]:
        said = answers(self.pair, self.subject, variant, opened=opened)
        self.latest = said
        return self._record(said, said if baseline is None else baseline)

    def _record(self, said: Sequence[Response], baseline: Sequence[Response], of_sets: bool = False) -> dict[str, Any]:
        signs = {name: sum(r.matches(pattern) for r in said) for name, pattern in self.subject.signs.items()}
        return record(said, baseline, self.behaviour, "report", self.slips, signs, of_sets)

    def ban(self) -> Variant:
        """The words banned; of a phrase, one token after another, where that takes least of other text with it."""
        onsets = self.found.onsets
        return banned(onsets.words, banned_neighbors(onsets))

    def necessity(self) -> dict[str, Any]:
        """The replacement without sets of features, and its rivals."""
        plain = answers(self.pair, self.subject, on_route("replacement"))
        self.plain, self.kinds = plain, {"target": self._kinds(self.target), "none": self._kinds(plain)}
        found = {"none": self._record(plain, plain)}
        for name, features in self.sets.items():
            found[name] = self._arm(plain, without(features))
        self.removed = self.latest
        self.kinds["circuit"] = self._kinds(self.removed)
        found["random"] = self._random(plain, without)
        bias_only = Variant("decoder biases only", lambda pair: only(pair, [], "replacement", decoder_bias=True))
        found["bias_only"] = self._arm(plain, bias_only, opened=True)
        rivals = {name: v for name, v in {**self.removals, **self.baselines}.items() if name not in self.sets}
        found |= {name: self._arm(plain, variant) for name, variant in rivals.items()}
        if neighbors := banned_neighbors(self.found.onsets):
            found["ban"]["banned_elsewhere"] = sum(neighbors.values())
        return found

    def _other_circuit(self) -> Variant | None:
        """The same search for the token that most often comes at the boundaries instead of the word."""
        token = commonest_alternative(self.found.onsets)
        if token is None:
            return None
        next_tokens = torch.zeros_like(self.found.onsets.tokens)
        next_tokens[:, :-1] = self.found.onsets.tokens[:, 1:]
        onsets = self.found.onsets
        says = onsets.control & (next_tokens == token)
        swapped = replace(onsets, onset=says, control=(onsets.control & ~says) | onsets.onset, words=(token,))
        given = self.options.search  # a control need not be searched as finely
        options = replace(given, documents=max(1, given.documents // 2), per_round=2 * given.per_round)
        return without(search_circuit(self.pair, swapped, self.found.alive, options, self.progress).order)

    def _random(
        self, baseline: Sequence[Response], make: Callable[[list[FeatureId]], Variant], opened: bool = False
    ) -> dict[str, Any]:
        """The mean over matched random sets: the intervals are over problems and over the choice of sets."""
        draws = [
            answers(self.pair, self.subject, make(features), opened=opened)
            for features in self.random[: self.options.draws]
        ]
        pooled = [r for said in draws for r in said]
        n = len(draws)
        found = self._record(pooled, list(baseline), of_sets=True)
        each = [self._record(said, baseline).get("hesitation_cut") for said in draws]
        cuts = [abs(cut.value) for cut in each if cut is not None and cut.value is not None]
        found["draws"] = n
        found["smallest_cut"], found["largest_cut"] = min(cuts, default=None), max(cuts, default=None)
        return found

    def sufficiency(self) -> dict[str, Any]:
        """The hybrid, thinking opened in the prompt, with sets of features added."""
        opened = answers(self.pair, self.subject, on_route("hybrid"), opened=True)
        self.hybrid = opened
        found = {"none": self._record(opened, opened)}
        self.inserted: dict[str, list[Response]] = {}
        for name, variant in self.insertions.items():
            found[name] = self._arm(opened, variant, opened=True)
            if name in ("circuit", "circuit_at_strength"):
                self.inserted[name] = self.latest
                self.kinds[f"hybrid + {name}"] = self._kinds(self.latest)
        found["random"] = self._random(opened, self.added, opened=True)
        found["b_dec_only"] = self._arm(opened, self.added([], bias=True), opened=True)
        self._show()
        return found

    def transfer(self) -> dict[str, Any]:
        """The real target, and with the circuit negated on its MLPs (scale -0.5)."""
        return {
            "none": self._record(self.target, self.target),
            "negated": self._arm(self.target, with_negated(self.order)),
            "negated_random": self._arm(self.target, with_negated(self.random[0])),
        }

    def injected(self) -> dict[str, OutcomesMeasurement]:
        """Wrong steps written into the model's answer: the test that no logit was looked at for."""
        taken_out = ("circuit", *CONTROLS)
        put_in = ("circuit", *self.stronger, "others")
        arms = {
            "target": on_route("target"),
            "replacement": on_route("replacement"),
            "replacement - random": without(self.random[0]),
            **{f"replacement - {name}": self.removals[name] for name in taken_out},
            "word banned": self.baselines["ban"],
            **{f"replacement, {name}": self.baselines[name] for name in BASELINES},
            "hybrid": on_route("hybrid"),
            "hybrid + random": self.added(self.random[0]),
            **{f"hybrid + {name}": self.insertions[name] for name in put_in},
        }
        self.corrected_more: dict[str, Measurement] = {}
        if not (injections := self.subject.injections):
            return {}
        found = {
            name: corrected(self.pair, injections, variant, self.subject, "report") for name, variant in arms.items()
        }
        circuit = found["replacement - circuit"]
        self.corrected_more = {
            name: corrected_more(found[f"replacement - {name}"], circuit) for name in ("random", *CONTROLS)
        }
        return found

    def dose(self) -> list[dict[str, Any]]:
        """Hesitation by number of features, in the order in which the search took them, beyond the circuit too."""
        found, few = [], replace(self.subject, report=self.subject.report[:DOSE_PROBLEMS])
        search = self.found.search
        order = self.order + list(search.further if search else ())
        for n in sorted({*(d for d in DOSES if d < len(order)), len(self.order), len(order)}):
            features = order[:n]
            told = answers(self.pair, few, without(features))
            arm = record(told, self.plain[: len(told)], self.behaviour, "report")
            said = [
                probabilities(self.pair, self.some, variant, "report")["moment"].value
                for variant in (without(features), self.added(features))
            ]
            interval = Estimate(arm["hesitation_per_1k"], **arm["ci"]["hesitation_per_1k"])
            rate_ = interval.measurement(arm["n"], "per 1,000 response tokens", "report")
            cut = arm["hesitation_cut"].value if "hesitation_cut" in arm else 0.0
            found.append(
                {"n": n, "hesitation_per_1k": rate_, "hesitation_cut": cut, "p_moment": said[0], "p_inserted": said[1]}
            )
        return found

    def sampled(self) -> dict[str, Any]:
        """Answers drawn at a temperature, not the likeliest ones."""
        found = {}
        for name, variant in (("none", on_route("replacement")), ("circuit", without(self.order))):
            said = answers(
                self.pair, self.subject, variant, temperature=self.options.temperature, seed=self.options.seed
            )
            found[name] = rate(said, "report", self.behaviour)
        return found

    def mediation(self) -> dict[str, Any]:
        """Does template work through output? All that are template by formula, on documents that have a moment."""
        roles = self.found.roles
        assert roles is not None
        found: dict[str, Any] = {"n": len(roles.templates)}
        if roles.templates:
            texts = self.onsets.with_onsets(MEDIATION_DOCUMENTS)
            found |= mediation(self.pair, texts, roles.templates, self.sets["output"], "report")
        return found

    def suppressors(self) -> dict[str, Any]:
        """Features that hold the word down: with them gone it should come more often."""
        suppress = self.found.circuit.ids("suppress")
        found: dict[str, Any] = {"n": len(suppress), "ids": [f"{f.layer}.{f.index}" for f in suppress]}
        if suppress:
            for when, variant in (("before", on_route("replacement")), ("after", without(suppress))):
                said = probabilities(self.pair, self.some, variant, "report")
                found |= {f"p_{place}_{when}": said[place] for place in ("moment", "boundary") if place in said}
        return found

    def bystanders(self) -> dict[str, Any]:
        """Features that fire before the word and should do nothing for it; as many are removed as the circuit has."""
        roles = self.found.roles
        assert roles is not None
        tested = list(roles.bystanders[: len(self.order)])
        found: dict[str, Any] = {"n": len(roles.bystanders), "ids": [f"{f.layer}.{f.index}" for f in tested]}
        if tested:
            for when, variant in (("before", on_route("replacement")), ("after", without(tested))):
                found[f"p_{when}"] = probabilities(self.pair, self.some, variant, "report")["moment"]
        return found

    def _kinds(self, said: Sequence[Response]) -> dict[str, int]:
        count = Counter(kind for r in said for kind in kinds_at(r.text, self._places(r)))
        return {kind: count[kind] for kind in ("correction", "re-check", "restart")}

    def _places(self, response: Response) -> list[tuple[int, int]]:
        """Where an answer's text shows the behaviour."""
        return self.behaviour.places(response, self.pair.model.tokenizer)

    def _show(self) -> None:
        order = sorted(range(len(self.plain)), key=lambda i: -min(2, self.behaviour.count(self.plain[i])))
        strength = self.found.circuit.strength
        arms = {
            "replacement": self.plain,
            "without the circuit": self.removed,
            "hybrid, thinking opened": self.hybrid,
            "with the circuit": self.inserted["circuit"],
        }
        if self.stronger:
            arms[f"with the circuit, at strength {strength:g}"] = self.inserted["circuit_at_strength"]
        for i in order[:4]:
            shown = {name: said[i] for name, said in arms.items()}
            example: dict[str, Any] = {"question": self.subject.report[i].question}
            example |= {name: response.text for name, response in shown.items()}
            if self.behaviour.find is not None:  # words are found again in the text, what a function found is not
                example["places"] = {name: self._places(response) for name, response in shown.items()}
            self.examples.append(example)
