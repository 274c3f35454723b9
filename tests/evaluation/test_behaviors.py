"""Behaviors of several tokens, or found by a function: counted, measured, searched, banned and shown as words are."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.log_odds import log_odds_at, word_log_odds
from helpers.pairs import make, state
from helpers.planted_circuits import SMALL, everything, planted, random_onsets
from helpers.random_models import random_batch, random_model, randomise
from helpers.word_tokenizers import word_tokenizer

import tl_adapters.circuits.comparisons as comparisons
from tl_adapters import organism
from tl_adapters.circuits.circuit import Circuit, CircuitError
from tl_adapters.circuits.measurements import mediation, probabilities, record
from tl_adapters.circuits.onsets import Onsets, final_residual, find_onsets, log_odds_from_logits
from tl_adapters.circuits.roles import assign_roles, circuit_edges, effects_at
from tl_adapters.circuits.search import SearchOptions, find_circuit, search_circuit
from tl_adapters.circuits.steering import banned, banned_neighbors
from tl_adapters.circuits.study import BehaviorStudy, StudyOptions, analyze_behavior
from tl_adapters.circuits.subject import Subject, builtin_subject, kinds_at
from tl_adapters.data.traces import Trace
from tl_adapters.data.words import word_pattern, word_tokens
from tl_adapters.evaluation.behaviors import Behavior, BehaviorError, GivenBehavior, counts
from tl_adapters.evaluation.response_metrics import measure_responses
from tl_adapters.evaluation.sampled_responses import ResponseOptions, SampledResponse, sample_responses, score_responses
from tl_adapters.generation.responses import Response, respond, traces_of
from tl_adapters.interventions.feature_edits import InterventionError, ablated, scaled
from tl_adapters.interventions.frozen import frozen
from tl_adapters.interventions.variants import on_route
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.circuit_page import write_circuit_page
from tl_adapters.study.hesitation import hesitation_stage
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.results import plain, read_results

# -- counting, in answers that are written by hand --------------------------------------------------------------------

HOLD, ON, UP, TO, THINK, END = 11, 12, 13, 14, 15, 2
WORDS = {HOLD: "Hold", ON: "on", UP: "up", TO: "to", THINK: "</think>", 7: "so", 8: "it", 9: "is"}


def said(*tokens: int, end: int | None = END, prompt: Sequence[int] = (1, HOLD, ON)) -> Response:
    """An answer word by word; None for its end: cut at the limit. The prompt says the phrase, which must not count."""
    text = " ".join(WORDS[token] for token in tokens)
    return Response(tuple(prompt), tokens, text, end is None, end is not None, end=end)


def row(*phrase: int) -> Callable[[Trace], list[tuple[int, int]]]:
    """Finds a row of tokens wherever it stands, the prompt included."""

    def find(trace: Trace) -> list[tuple[int, int]]:
        n = len(phrase)
        return [(i, i + n) for i in range(len(trace.tokens) - n + 1) if trace.tokens[i : i + n] == phrase]

    return find


HOLD_ON = Behavior("holding", find=row(HOLD, ON))


def test_the_rate_of_a_found_phrase_is_of_what_is_found_and_not_of_its_words() -> None:
    """Half of the phrases gone, and all of what shares a word with them left."""
    before = [said(HOLD, ON, 7, HOLD, UP, 8), said(ON, 7, HOLD, ON, HOLD), said(7, ON, ON, 8)]
    after = [said(HOLD, UP, 7, HOLD, UP, 8), said(ON, 7, HOLD, ON, HOLD), said(7, ON, ON, 8)]
    assert counts(before, HOLD_ON) == [1, 1, 0]
    assert measure_responses(before, "report", HOLD_ON).hesitation_per_1k == pytest.approx(1000 * 2 / 15)
    found = record(after, before, HOLD_ON, "report")
    assert found["hesitation_cut"].value == pytest.approx(0.5)
    by_words = record(after, before, ["hold on"], "report")
    assert by_words["hesitation_cut"].value == pytest.approx(0.5), "words and a function are one case"
    by_string = record(after, before, ["hold"], "report")
    assert by_string["hesitation_cut"].value == 0, "what was counted instead"


def test_an_answer_cut_at_the_limit_counts_and_has_no_end_token() -> None:
    whole, cut = said(7, HOLD, ON), said(7, HOLD, ON, end=None)
    assert counts([whole, cut], HOLD_ON) == [1, 1]
    at_the_end = Behavior("closing", find=lambda t: [len(t.tokens) - 1] if t.tokens[-1] == END else [])
    assert counts([whole, cut], at_the_end) == [1, 0]
    last_words = Behavior("last", find=row(HOLD, ON, END))
    assert counts([whole, cut, said(HOLD, ON, 7)], last_words) == [1, 0, 0]


@pytest.mark.parametrize("phrase", [(ON, THINK, 7), (8, THINK)])
def test_a_phrase_may_cross_the_end_of_thinking(phrase: tuple[int, ...]) -> None:
    sample_responses = said(HOLD, ON, THINK, 7, 8, THINK, 9)
    assert counts([sample_responses, said(ON, 7, THINK)], Behavior("crossing", find=row(*phrase))) == [1, 0]


def test_what_a_function_finds_in_the_prompt_or_twice_counts_not_or_once() -> None:
    twice = Behavior("twice", find=lambda t: [4, (4, 6), 1, 4])
    assert counts([said(7, 8, 9)], twice) == [1]
    for wrong in ([99], [-1], [(5, 5)], [2.5], [(1, 2, 3)], ["so"]):
        with pytest.raises(BehaviorError, match=r"returned .* for a trace of 7 tokens; return positions from 0 to 6"):
            counts([said(7, 8, 9)], Behavior("wrong", find=lambda t, wrong=wrong: wrong))


@pytest.mark.parametrize(
    ("words", "text", "n"),
    [
        (["hold on"], "Hold on. hold\non, HOLD  ON; hold onto, withhold on", 3),
        (["Wait,"], "9.\nWait,3+9. wait,no; Wait no", 2),
        (["+1"], "2+1 and +12 and + 1", 1),
        (["wait, wait", "wait"], "wait, wait", 2),
        (["a b", "b c"], "a b c b c", 2),
        (["let me see"], "Let me see; let me seek; so let me see.", 2),
        (["c++"], "C++ is c++11", 2),
    ],
)
def test_phrases_are_counted_whole_in_any_case_with_any_white_space(
    pair: PairedModel, words: list[str], text: str, n: int
) -> None:
    response = Response((1,), (1,), text, False, True)
    assert response.count(words) == n == counts([response], words)[0]
    places = Behavior.of(words).text_spans(response, pair.model.tokenizer)
    assert len(places) == n
    assert all(word_pattern(words).fullmatch(text[start:stop]) for start, stop in places)


@pytest.mark.parametrize("words", ["", " ", [], [""], ["Wait", " "]])
def test_words_that_are_no_list_of_words_are_refused_wherever_something_is_counted(
    pair: PairedModel, words: Any
) -> None:
    answers = [said(7)]
    for count in (
        lambda: measure_responses(answers, "report", words),
        lambda: score_responses([SampledResponse(0, 0, answers[0])], "report", words),
        lambda: record(answers, answers, words, "report"),
        lambda: analyze_behavior(pair, builtin_subject(1, 1), words),
    ):
        with pytest.raises(BehaviorError, match="give a list of words or phrases"):
            count()


def test_a_benchmark_counts_what_a_function_finds_and_keeps_what_it_needs(tmp_path: Path, pair: PairedModel) -> None:
    problems, sampling = organism.problems("report", 6), ResponseOptions(max_new_tokens=30)
    with pair.routed("target"):
        answers = [sample_responses(pair.model, problems, sampling, tmp_path, {}, progress=False) for _ in range(2)]
    assert answers[0] == answers[1], "read again from the disk, end tokens included"
    responses = [one.response for one in answers[0]]
    assert {r.truncated for r in responses} == {True, False}
    assert all((r.end is None) == r.truncated for r in responses)
    closing = Behavior("closing", find=lambda t: [i for i, x in enumerate(t.tokens) if x == responses_end(responses)])
    found = score_responses(answers[1], "report", closing)
    finished = sum(not r.truncated for r in responses)
    assert found.hesitation_per_1k == pytest.approx(1000 * finished / sum(len(r.tokens) for r in responses))
    assert found.words == ("test_a_benchmark_counts_what_a_function_finds_and_keeps_what_it_needs.<locals>.<lambda>",)


def responses_end(responses: Sequence[Response]) -> int:
    return next(r.end for r in responses if r.end is not None)


def test_kinds_of_hesitation_are_told_at_the_places_that_are_found() -> None:
    text = "7. Wait 8. Wait 9.\n"
    assert kinds_at(text, [(3, 7), (11, 15)]) == ["correction", "correction"]
    assert kinds_at(text, [(11, 15)]) == ["correction"]
    assert kinds_at("7 so 7", [(2, 4)]) == ["re-check"]


# -- phrases in tokens ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    """The built-in pair with random adapters: the target is itself, the others say anything."""
    return randomise(load_organism_pair(), 8)


def ids(pair: PairedModel, text: str) -> tuple[int, ...]:
    return tuple(pair.model.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_word_of_several_tokens_is_a_phrase_in_every_spelling(pair: PairedModel) -> None:
    tokenizer = pair.model.tokenizer
    found = word_tokens(tokenizer, ["Wait,no"])
    assert found == {s: ids(pair, s) for s in ("Wait,no", " Wait,no", "wait,no", "WAIT,NO")}, "' wait,no' holds another"
    assert all(len(phrase) > 2 for phrase in found.values())  # type: ignore[arg-type]
    both, wait = word_tokens(tokenizer, ["Wait", "Wait,no"]), word_tokens(tokenizer, ["Wait"])
    assert set(both) == {*wait, "WAIT,NO"}, "where the others stand, Wait does"
    assert word_tokens(word_tokenizer("hold", "on"), ["Hold on"]) == {"hold on": (1, 2)}
    assert word_tokens(word_tokenizer("on", "Hold"), ["Hold on", "on"]) == {"on": 1}
    assert word_tokens(word_tokenizer("x"), ["hold on"]) == {}, "what is unknown to it cannot be written"


def test_words_that_the_tokenizer_cannot_write_are_refused() -> None:
    unknown = make("Qwen2ForCausalLM", "hooked")
    unknown.model.tokenizer = word_tokenizer("x")
    with pytest.raises(BehaviorError, match=r"'doubt': this model's tokenizer can write none of Hold on. .*find="):
        find_onsets(unknown, [Trace((1, 2, 3), 1)], Behavior("doubt", ("Hold on",)))


def test_what_else_begins_alike_is_a_control_position(pair: PairedModel) -> None:
    wait, comma, three, five = (ids(pair, text)[0] for text in ("Wait", ",", "3", "5"))
    #              0  1  2     3      4      5  6     7      8     9  10    11     12    13
    trace = Trace((9, 8, wait, comma, three, 8, wait, comma, five, 8, wait, comma, three, 8), 1)
    for behavior in (Behavior(words=("Wait,3",)), Behavior(find=row(wait, comma, three))):
        onsets = find_onsets(pair, [trace], behavior)
        assert (wait, comma, three) in onsets.phrases
        places = {kind: getattr(onsets, kind)[0].nonzero()[:, 0].tolist() for kind in ("onset", "control")}
        assert places == {"onset": [1, 9], "control": [5]}
        assert onsets.controls_beginning_alike == 1
        assert onsets.continuation[0].nonzero()[:, 0].tolist() == [2, 3, 4, 10, 11, 12], "its own tokens first"
        counted = (onsets.onset | onsets.control | onsets.continuation | onsets.elsewhere).equal(onsets.predicting)
        assert counted


def test_a_place_within_a_phrase_is_no_control_position(pair: PairedModel) -> None:
    """The phrase holds the very token after which it begins."""
    trace = Trace((9, 8, 4, 8, 6, 3, 8, 5, 3), 1)
    onsets = find_onsets(pair, [trace], Behavior(find=row(4, 8, 6)))
    assert onsets.onset[0].nonzero()[:, 0].tolist() == [1]
    assert onsets.control[0].nonzero()[:, 0].tolist() == [6]


def test_a_function_that_finds_whole_sentences_is_told_that_phrases_are_short(pair: PairedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 200, (30, 100), generator=generator).tolist()
    traces = [Trace(tuple(tokens), 10) for tokens in rows]
    whole = Behavior("all", find=lambda t: [(t.prompt_length, len(t.tokens))])
    with pytest.raises(BehaviorError, match=r"found 30 different phrases with 2,700 tokens in all; at most 2,000"):
        find_onsets(pair, traces, whole)
    assert counts([said(7, 8)], whole) == [1]
    assert find_onsets(pair, traces, Behavior("starts", find=lambda t: [10])).counts["moments"] == 30


def test_two_tokens_with_one_text_are_both_the_behavior(pair: PairedModel) -> None:
    """Parts of characters all decode to the replacement sign."""
    parts = [i for i in range(256) if pair.model.tokenizer.decode([i]) == "\ufffd"][:2]
    trace = Trace((9, parts[0], 8, parts[1], 8), 1)
    found = Behavior(find=lambda t: [1, 3]).tokens(pair, [trace])
    assert sorted(found.values()) == sorted(parts)  # type: ignore[type-var]


# -- probabilities of phrases -----------------------------------------------------------------------------------------

PHRASES = ((4, 5), (4, 6, 7), 9)
"""Two that begin alike, and a single token."""


def phrase_onsets(seed: int = 2) -> Onsets:
    """Texts of few different tokens, so that phrases are begun, parted from and ended; every place is measured."""
    batch = random_batch(seed, (19, 12, 16), vocab=10)
    tokens = batch.tokens.clone()
    tokens[0, 5:8] = torch.tensor([4, 6, 7])
    tokens[1, 6:8] = torch.tensor([4, 5])
    tokens[2, 4:7] = torch.tensor([4, 6, 5])
    tokens[2, 14:16] = torch.tensor([4, 6])  # the text ends within a phrase
    at, no = batch.predicting_response, torch.zeros_like(batch.predicting_response)
    return Onsets(tokens, at, at, no, no, PHRASES)


def by_hand(p: torch.Tensor, tokens: list[int], place: int, n: int) -> float:
    """Probability of every phrase as far as the text shows it, each event once."""
    events = set()
    for phrase in (word if isinstance(word, tuple) else (word,) for word in PHRASES):
        shown = 1
        while shown < len(phrase) and place + shown < n and tokens[place + shown] == phrase[shown - 1]:
            shown += 1
        events.add(phrase[:shown])
    return sum(math.prod(float(p[place + i, token]) for i, token in enumerate(event)) for event in events)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
@torch.no_grad()
def test_the_probability_of_a_phrase_is_the_product_over_its_tokens(architecture: str) -> None:
    tiny, onsets = make(architecture, "hooked"), phrase_onsets()
    for route in ("target", "replacement"):
        with tiny.routed(route):
            found = log_odds_at(tiny, onsets, onsets.onset).sigmoid()
            p = tiny.model(onsets.tokens).softmax(-1)
        lengths = (onsets.predicting.long() * torch.arange(1, onsets.tokens.shape[1] + 1)).amax(1) + 1
        expected = [
            by_hand(p[r], onsets.tokens[r].tolist(), c, int(lengths[r])) for r, c in onsets.onset.nonzero().tolist()
        ]
        assert torch.allclose(found, torch.tensor(expected).to(found), atol=1e-6)
    assert any(abs(a - float(b)) > 1e-3 for a, b in zip(expected, first_token(p, onsets), strict=True))


def first_token(p: torch.Tensor, onsets: Onsets) -> torch.Tensor:
    return p[..., [4, 9]].sum(-1)[onsets.onset]


def test_odds_of_phrases_take_gradients_through_all_their_tokens() -> None:
    """Effects are slopes of the phrase's log-odds, and the direct ones reach its later tokens."""
    tiny, onsets = make("Qwen2ForCausalLM", "hooked"), phrase_onsets()
    effects = effects_at(tiny, onsets)
    assert torch.allclose(effects.total[3], effects.direct[3], atol=1e-5), "the last layer has direct effects only"

    @torch.no_grad()
    def mean(feature: tuple[int, int], by: float) -> float:
        with tiny.routed("replacement"), scaled(tiny, [feature], 1 + by):
            return float(log_odds_at(tiny, onsets, onsets.onset).mean())

    for i in effects.total.abs().flatten().topk(4).indices.tolist():
        feature = (i // 24, i % 24)
        slope = (mean(feature, 1e-5) - mean(feature, -1e-5)) / 2e-5
        assert abs(slope / float(effects.total[feature]) - 1) < 1e-4


def test_phrases_are_searched_sorted_and_measured() -> None:
    tiny, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets(vocab=10)
    onsets = replace(onsets, phrases=PHRASES)
    search = search_circuit(tiny, onsets, everything(tiny), SearchOptions(share=0.1), progress=False)
    roles = assign_roles(tiny, onsets, search.order, everything(tiny))
    values = [v for f in roles.features for v in f.effects] + [roles.log_odds_gap]
    assert torch.tensor(values).isfinite().all()
    held = mediation(tiny, onsets, [(0, 3)], [(3, 4)], "report")  # type: ignore[list-item]
    with torch.no_grad(), tiny.routed("replacement"), frozen(tiny, onsets.tokens):
        clean = whole_pass(onsets, tiny.model(onsets.tokens))
        with ablated(tiny, [(0, 3)]):
            lost = float((clean - whole_pass(onsets, tiny.model(onsets.tokens))).mean())
    assert held["total"].value == pytest.approx(lost, abs=1e-5)
    found = probabilities(tiny, onsets, on_route("target"), "report")
    with torch.no_grad(), tiny.routed("target"):
        expected = log_odds_at(tiny, onsets, onsets.control).sigmoid().mean()
    assert found["boundary"].value == pytest.approx(float(expected))


# -- low precision ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("words", [(5, 9), PHRASES])
def test_log_odds_of_bfloat16_logits_are_exact(words: Any) -> None:
    """Against float64 on the very same logits; in bfloat16 sums of exponentials are off by percents."""
    base, target = (random_model(seed, torch.bfloat16, vocab_size=4000) for seed in (1, 2))
    tiny = randomise(PairedModel.from_pretrained(base, target))
    onsets = replace(phrase_onsets(), phrases=words)
    with tiny.routed("target"):
        logits = tiny.unembed(final_residual(tiny, onsets.tokens)).bfloat16()
        assert log_odds_at(tiny, onsets, onsets.onset).dtype == torch.float32
    found = whole_pass(onsets, logits)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), whole_pass(onsets, logits.double()), atol=1e-4)
    assert torch.allclose(word_log_odds(logits, (5,)).double(), word_log_odds(logits.double(), (5,)), atol=1e-4)


def whole_pass(onsets: Onsets, logits: torch.Tensor) -> torch.Tensor:
    """Log-odds at the onsets, of the logits of a whole pass."""
    return log_odds_from_logits(lambda rows, places: logits[rows, places], onsets, onsets.onset)


def test_a_circuit_is_found_in_bfloat16_as_in_float64() -> None:
    """Search, roles and effects run, and are those of float64 but for the model's own rounding."""
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        tiny = randomise(PairedModel.from_pretrained(random_model(1, dtype), random_model(2, dtype)))
        onsets = random_onsets()
        search = search_circuit(tiny, onsets, everything(tiny), SearchOptions(share=0.1), progress=False)
        roles = assign_roles(tiny, onsets, search.order, everything(tiny))
        edges = circuit_edges(tiny, onsets, roles.features)
        assert torch.tensor([v for f in roles.features for v in f.effects] + [e.weight for e in edges]).isfinite().all()
        found[dtype] = (search, effects_at(tiny, onsets))
    (exact, effects), (low, rounded) = found.values()
    assert low.objectives[0].continuation >= 0
    for name in ("necessity", "sufficiency", "continuation"):
        assert getattr(low.objectives[0], name) == pytest.approx(getattr(exact.objectives[0], name), rel=0.05)
    assert torch.nn.functional.cosine_similarity(effects.total.flatten(), rounded.total.flatten(), dim=0) > 0.95


# -- documents without an onset ---------------------------------------------------------------------------------------


def with_quiet_documents(onsets: Onsets) -> Onsets:
    """The first and the last of five documents have control positions only."""
    onset = onsets.onset.clone()
    onset[[0, 4]] = False
    control = onsets.control | (onsets.onset & ~onset)
    return replace(onsets, onset=onset, control=control)


def test_documents_without_an_onset_are_read_in_proportion() -> None:
    n = 30
    tokens = torch.arange(1, n * 4 + 1).view(n, 4)
    onset, control, none = (torch.zeros(n, 4, dtype=torch.bool) for _ in range(3))
    onset[::3, 1] = True
    control[1::3, 2] = True  # a third has control positions only, a third nothing
    onsets = Onsets(tokens, torch.ones_like(onset), onset, control, none, (5,))
    assert len(onsets.with_onsets_and_controls()) == 20
    for documents, all_ in ((10, 20), (5, 10), (1, 2)):
        some = onsets.with_onsets_and_controls(n=documents)
        assert len(some) == all_
        assert int(some.onset.any(1).sum()) == documents
        assert some.tokens[:, 0].tolist() == sorted(some.tokens[:, 0].tolist()), "in their order"
    half = onsets.with_onsets_and_controls(n=5).tokens[:, 0]
    others = [int(x) for x in half if (int(x) - 1) // 4 % 3 == 1]
    assert max(others) - min(others) > 60, "of the whole list, not of its beginning"
    assert [len(onsets.having(kind)) for kind in ("onset", "control", "continuation")] == [10, 10, 0]


def test_control_positions_count_whether_or_not_their_document_has_an_onset() -> None:
    tiny, onsets = make("Qwen2ForCausalLM", "hooked"), with_quiet_documents(random_onsets())
    effects = effects_at(tiny, onsets, "control")
    with torch.no_grad(), tiny.routed("replacement"):
        assert effects.log_odds == pytest.approx(float(log_odds_at(tiny, onsets, onsets.control).mean()), abs=1e-6)
        alone = onsets.with_onsets()
        assert effects.log_odds != pytest.approx(float(log_odds_at(tiny, alone, alone.control).mean()), abs=1e-3)


def test_a_search_reads_documents_without_an_onset() -> None:
    tiny, onsets = planted()
    onsets = with_quiet_documents(onsets)
    objectives = search_circuit(tiny, onsets, everything(tiny), replace(SMALL, necessity=0), progress=False).objectives[
        0
    ]
    with torch.no_grad():
        at = onsets.onset | onsets.control
        with tiny.routed("target"):
            probability = log_odds_at(tiny, onsets, at).sigmoid()
        with tiny.routed("hybrid"):
            odds = log_odds_at(tiny, onsets, at)
    assert objectives.sufficiency == pytest.approx(
        float((torch.nn.functional.softplus(odds) - probability * odds).mean()), rel=1e-4
    )


# -- banning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@torch.no_grad()
def test_a_phrase_is_banned_where_its_first_token_was_read_and_nowhere_else(backend: str) -> None:
    tiny, onsets = make("Qwen2ForCausalLM", backend), phrase_onsets()
    before = state(tiny)
    with tiny.routed("replacement"):
        free = tiny.model(onsets.tokens)
    variant = banned((7, (4, 5)), {(4, 5): 0})
    with variant.entered(tiny) as model:
        found = model(onsets.tokens)
    expected = free.clone()
    expected[..., 7] = -torch.inf
    expected[..., 5] = expected[..., 5].masked_fill(onsets.tokens == 4, -torch.inf)
    assert torch.allclose(found, expected, atol=1e-6)
    assert state(tiny) == before
    assert not tiny.model.embed._forward_pre_hooks
    with variant.entered(tiny), pytest.raises(InterventionError, match="passes over whole texts"):
        tiny.unembed(final_residual(tiny, onsets.tokens)[onsets.onset])


def test_of_three_tokens_the_neighbors_are_banned_that_stand_least_elsewhere() -> None:
    batch = random_batch(4, (14, 9), prompt=2, vocab=4)
    tokens = batch.tokens.clone()
    tokens[0, 2:14] = torch.tensor([4, 5, 6, 1, 4, 5, 7, 1, 4, 5, 6, 2])
    tokens[1, 2:9] = torch.tensor([5, 6, 1, 4, 5, 6, 3])
    at, no = batch.predicting_response, torch.zeros_like(batch.predicting_response)
    onsets = Onsets(tokens, at, at, no, no, ((4, 5, 6), 3))
    assert banned_neighbors(onsets) == {(4, 5): 1}, "one (5, 6) begins in the prompt's reach, one (4, 5) goes on to 7"
    assert banned_neighbors(replace(onsets, phrases=((1, 4, 5),))) == {(1, 4): 0}
    assert banned_neighbors(replace(onsets, phrases=(3,))) == {}


def test_a_banned_phrase_is_never_said_and_what_begins_alike_is(pair: PairedModel) -> None:
    """In generation with its cache, where a pass reads one token."""
    problems = organism.problems("report", 6)
    with pair.routed("replacement"):
        free = respond(pair.model, problems, max_new_tokens=24)
    rows = [r.tokens for r in free]
    neighbors = [pair_ for tokens in rows for pair_ in pairwise(tokens)]
    phrase = max(set(neighbors), key=neighbors.count)
    with banned((phrase,), {phrase: 0}).entered(pair) as model:
        told = respond(model, problems, max_new_tokens=24)
    after = [pair_ for r in told for pair_ in pairwise(r.tokens)]
    assert phrase in neighbors
    assert phrase not in after
    assert phrase[0] in {token for r in told for token in r.tokens}


# -- whole studies ----------------------------------------------------------------------------------------------------

LIMIT = 40
OPTIONS = StudyOptions(SearchOptions(share=0.1, documents=8), draws=1, probability_draws=1, curve_factors=(1.0,))


def after_a_line(trace: Trace) -> list[tuple[int, int]]:
    """Finds a line's end with "Wait" after it."""
    return row(*LINE_WAIT)(trace)


LINE_WAIT: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def subject(pair: PairedModel) -> Subject:
    """Sums of two terms: the target ends a line in all of its answers, and says "Wait" after it in most."""
    global LINE_WAIT
    LINE_WAIT = ids(pair, ".\nWait")
    chosen = []
    for split, n, kept in (("select", 60, 26), ("report", 30, 3)):
        asked = organism.problems(split, n, n_terms=(2,))  # type: ignore[arg-type]
        with pair.routed("target"):
            told = respond(pair.model, asked, max_new_tokens=LIMIT)
        doubted = [p for p, r in zip(asked, told, strict=True) if r.hesitations and not r.truncated]
        sure = [p for p, r in zip(asked, told, strict=True) if not r.hesitations and not r.truncated]
        chosen.append([*doubted[:kept], *sure[: kept // 3]])
    return replace(builtin_subject(1, 1), select=chosen[0], report=chosen[1], injections=(), max_new_tokens=LIMIT)


def studied(pair: PairedModel, subject: Subject, behavior: GivenBehavior) -> BehaviorStudy:
    doses, comparisons.DOSES = comparisons.DOSES, (4,)
    try:
        return analyze_behavior(pair, subject, behavior, options=OPTIONS, progress=False)
    finally:
        comparisons.DOSES = doses


@pytest.fixture(scope="module")
def studies(pair: PairedModel, subject: Subject) -> dict[str, BehaviorStudy]:
    """Of a phrase of two tokens whose first one, the end of a line, mostly goes on otherwise."""
    return {
        "words": studied(pair, replace(subject, republish=False), (".\nWait",)),
        "find": studied(pair, subject, Behavior("Doubt & <co>", find=after_a_line)),
    }


def test_both_ways_to_name_a_phrase_are_one_study(studies: dict[str, BehaviorStudy], pair: PairedModel) -> None:
    by_words, by_function = (studies[name].block for name in ("words", "find"))
    assert len(LINE_WAIT) == 2
    assert by_words["moments"] == by_function["moments"]
    assert by_words["moments"]["select"]["moments"] >= 20
    assert set(by_function) - set(by_words) == {"function"}
    for block in (by_words, by_function):
        assert block["measured"] == "the whole phrase"
        assert block["begins_alike"]["select"] > 20, "negatives that begin with the same token"
        conditions = {
            "target",
            "replacement",
            "replacement - circuit",
            "hybrid",
            "hybrid + circuit",
            "hybrid + circuit_at_strength",
        }
        assert set(block["other_words"]) == conditions
    for part in ("necessity", "sufficiency", "transfer"):
        for condition, rates in by_words[part].items():
            if condition in ("none", "bias_only", "b_dec_only"):  # nothing that the search chose
                assert rates["hesitation_per_1k"] == by_function[part][condition]["hesitation_per_1k"]
    assert studies["find"].circuit.words == (".\nWait",)
    assert studies["find"].circuit.phrases == (LINE_WAIT,)
    assert LINE_WAIT in studies["words"].circuit.phrases


def test_the_rate_of_a_phrase_is_that_of_the_targets_answers(
    studies: dict[str, BehaviorStudy], pair: PairedModel, subject: Subject
) -> None:
    with pair.routed("target"):
        told = respond(pair.model, subject.report, max_new_tokens=LIMIT)
    n = sum(pair_ == LINE_WAIT for r in told for pair_ in pairwise(r.tokens))
    assert n >= 3
    for study in studies.values():
        found = study.block["transfer"]["none"]["hesitation_per_1k"]
        assert found == pytest.approx(1000 * n / sum(len(r.tokens) for r in told))


@torch.no_grad()
def test_the_target_says_the_phrase_at_its_onsets_and_less_often_where_the_line_goes_on(
    studies: dict[str, BehaviorStudy], pair: PairedModel
) -> None:
    """The first token alone is as likely at both, so that of the phrase is what tells them apart."""
    found = {place: f.value for place, f in studies["words"].block["probabilities"]["target"].items()}
    onsets = studies["words"].found.onsets
    with pair.routed("target"):
        logits = pair.unembed(final_residual(pair, onsets.tokens))
    first = logits.softmax(-1)[..., LINE_WAIT[0]]
    alike = onsets.control & (onsets.next_tokens == LINE_WAIT[0])
    assert min(float(first[onsets.onset].mean()), float(first[alike].mean())) > 0.9
    whole = probability_at(pair, onsets, alike)
    assert found["moment"] > 0.3
    assert float(whole.mean()) < float(first[alike].mean()) - 0.3


def probability_at(pair: PairedModel, onsets: Onsets, at: torch.Tensor) -> torch.Tensor:
    with pair.routed("target"):
        return log_odds_at(pair, onsets, at).sigmoid()


def test_texts_that_are_not_to_be_republished_are_left_out(studies: dict[str, BehaviorStudy], tmp_path: Path) -> None:
    shown, withheld = studies["find"], studies["words"]
    assert shown.examples and "texts_withheld" not in shown.block
    assert withheld.examples == [] and withheld.block["texts_withheld"]
    page = write_circuit_page(tmp_path, withheld.block, withheld.circuit, None, withheld.examples).read_text()
    assert "so no answers are shown" in page and shown.examples[0]["question"] not in page


def test_pages_and_files_say_what_a_function_found(studies: dict[str, BehaviorStudy], tmp_path: Path) -> None:
    study = studies["find"]
    study.circuit.save(tmp_path)
    assert Circuit.load(tmp_path) == study.circuit
    assert study.circuit.function == "after_a_line"
    page = write_circuit_page(tmp_path, study.block, study.circuit, None, study.examples).read_text()
    assert "found by the function <code>after_a_line</code>" in page
    assert "Occurrences of Doubt &amp; &lt;co&gt; per 1,000 response tokens." in page
    assert '<th scope="col">occurrences of Doubt &amp; &lt;co&gt; per 1,000</th>' in page
    assert "before something else that begins alike" in page
    assert "that of the whole phrase" in page
    shown = [(e[condition], places) for e in study.examples for condition, places in e["places"].items()]
    assert all(text[start:stop] == ".\nWait" for text, places in shown for start, stop in places)
    json.dumps(plain(study.block), allow_nan=False)


def test_circuits_of_the_first_release_are_read_and_of_a_later_one_refused(
    studies: dict[str, BehaviorStudy], tmp_path: Path
) -> None:
    path = studies["find"].circuit.save(tmp_path)
    written = json.loads(path.read_text())
    assert written["schema_version"] == 2
    old = {k: v for k, v in written.items() if k not in ("phrases", "function")} | {"schema_version": 1}
    path.write_text(json.dumps(old))
    assert Circuit.load(path) == replace(studies["find"].circuit, phrases=(), function=None)
    path.write_text(json.dumps(written | {"schema_version": 3}))
    with pytest.raises(CircuitError, match="schema_version 3; this version of tl-adapters reads 1 or 2"):
        Circuit.load(path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, Behavior()),
        ("Wait", Behavior("Wait", ("Wait",))),
        ("Hold on", Behavior("Hold on", ("Hold on",))),
        (["Wait"], Behavior("hesitation", ("Wait",))),
        (("Hold on", "Hmm"), Behavior("Hold on, Hmm", ("Hold on", "Hmm"))),
        (Behavior("doubt", find=after_a_line), Behavior("doubt", find=after_a_line)),
    ],
)
def test_a_behavior_is_given_in_one_way_everywhere(given: GivenBehavior, meant: Behavior) -> None:
    assert Behavior.of(given) == meant


def test_what_is_studied_is_the_behavior_that_was_given(studies: dict[str, BehaviorStudy]) -> None:
    """A function and a name were once replaced by hesitation, without a word."""
    study = studies["find"]
    assert (study.circuit.behavior, study.circuit.function) == ("Doubt & <co>", "after_a_line")
    assert (study.block["behaviour"], study.block["function"]) == ("Doubt & <co>", "after_a_line")
    assert (studies["words"].circuit.behavior, studies["words"].circuit.function) == (".\nWait", None)


def test_onsets_of_a_word_are_those_of_its_behavior(pair: PairedModel, subject: Subject) -> None:
    with pair.routed("target"):
        traces = traces_of(respond(pair.model, subject.select, max_new_tokens=LIMIT), pair.model.tokenizer)
    for word in ("Wait", ".\nWait"):
        found, meant = (find_onsets(pair, traces, given) for given in (word, Behavior(words=(word,))))
        assert torch.equal(found.onset, meant.onset) and bool(found.onset.any())
        assert found.phrases == meant.phrases


def test_the_old_name_of_a_behavior_still_works_and_warns(null: PairedModel) -> None:
    with pytest.warns(FutureWarning, match=r"analyze_behavior\(words=\) is now analyze_behavior\(behavior=\)"):
        study = analyze_behavior(null, builtin_subject(2, 2), words=("Hmm",), progress=False)  # type: ignore[call-arg]
    assert study.circuit.behavior == "Hmm"


def test_positions_alone_measure_the_token_that_begins_it(pair: PairedModel, subject: Subject) -> None:
    with pair.routed("target"):
        traces = traces_of(respond(pair.model, subject.select, max_new_tokens=LIMIT), pair.model.tokenizer)
    starts = Behavior("lines", find=lambda t: [start for start, _ in after_a_line(t)])
    onsets = find_onsets(pair, traces, starts)
    assert onsets.phrases == LINE_WAIT[:1]
    assert onsets.controls_beginning_alike > 20, "what else begins with that token stays a negative"


# -- nothing to find --------------------------------------------------------------------------------------------------


def never(trace: Trace) -> list[int]:
    """Finds nothing."""
    return []


NEVER: dict[str, GivenBehavior] = {"a word": "Wait", "a phrase": ("Hold on",), "a function": Behavior(find=never)}


@pytest.fixture(scope="module")
def null() -> PairedModel:
    """The base as its own target: it answers at once."""
    return randomise(PairedModel.from_pretrained(organism.BASE, organism.BASE), 8)


@pytest.mark.parametrize("asked", NEVER.values(), ids=NEVER.keys())
def test_a_null_pair_has_the_same_empty_study_whoever_asks(
    null: PairedModel, asked: GivenBehavior, tmp_path: Path
) -> None:
    subject = builtin_subject(12, 5)
    study = hesitation_stage(null, subject, tmp_path, OPTIONS, asked)
    assert study.block["moments"]["select"] == {"documents": 12, "moments": 0, "boundaries": 0}
    assert {"behaviour", "words", "moments", "circuit", "page"} <= set(study.block)
    assert not {"necessity", "probabilities", "criteria"} & set(study.block)
    assert (study.circuit.features, study.found.search, study.examples) == ((), None, [])
    assert Circuit.load(tmp_path) == study.circuit
    assert read_results(tmp_path)["hesitation"]["circuit"]["n"] == 0
    page = (tmp_path / "hesitation.html").read_text()
    assert "12 answers of the select split hold 0 onsets: the model never shows the behavior" in page
    assert "no features" in study._repr_html_()


@pytest.mark.parametrize("asked", NEVER.values(), ids=NEVER.keys())
def test_dead_adapters_on_a_null_pair_are_no_error_and_no_nan(asked: GivenBehavior) -> None:
    dead = PairedModel.from_pretrained(organism.BASE, organism.BASE)
    dead.new_adapters(8)
    with torch.no_grad():
        for adapter in dead.installed_adapters():
            adapter.b_enc.fill_(-1e3)
    study = analyze_behavior(dead, builtin_subject(4, 3), asked, options=OPTIONS, progress=False)
    assert study.block["circuit"]["share_of_activation"] == 0 == study.block["circuit"]["alive"]
    json.dumps(study.block["circuit"], allow_nan=False)


def test_where_every_answer_was_cut_it_is_said(pair: PairedModel) -> None:
    for ask in (lambda: find_circuit(pair, [], progress=False), lambda: find_onsets(pair, [], Behavior(find=never))):
        with pytest.raises(BehaviorError, match=r"no complete answers in which to look for hesitation.*max_new_tokens"):
            ask()
