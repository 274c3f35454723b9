"""Onsets, control positions and continuations: against the definitions read word by word, on texts made by hand."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.log_odds import log_odds_at, word_log_odds
from helpers.pairs import make
from helpers.random_models import random_batch

from tl_adapters import organism
from tl_adapters.circuits.onsets import (
    MAX_CONTINUATION_TOKENS,
    Behavior,
    BehaviorError,
    Onsets,
    final_residual,
    find_onsets,
    log_odds_from_logits,
)
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.tokens import VocabularyError
from tl_adapters.data.traces import Trace
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.arguments import ArgumentError

KINDS = ("predicting", "onset", "control", "continuation", "elsewhere")


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    return load_organism_pair()


@pytest.fixture(scope="module")
def wait(pair: PairedModel) -> int:
    return pair.model.tokenizer("Wait", add_special_tokens=False)["input_ids"][0]


@pytest.fixture(scope="module")
def written(pair: PairedModel) -> list[Trace]:
    """Reasoning traces with hesitations, of different lengths."""
    return encode_traces(organism.reasoning_pairs("select", 60), pair.model.tokenizer)


def places(onsets: Onsets, kind: str, row: int = 0) -> list[int]:
    return getattr(onsets, kind)[row].nonzero()[:, 0].tolist()


def by_hand(traces: Sequence[Trace], word: int) -> list[dict[str, list[int]]]:
    """The definitions, place by place, for a word that never comes twice in a row."""
    before = {
        t.tokens[i - 1] for t in traces for i in range(max(1, t.prompt_length), len(t.tokens)) if t.tokens[i] == word
    }
    found = []
    for trace in traces:
        kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}
        left = 0
        for place in range(trace.prompt_length - 1, len(trace.tokens) - 1):
            here, next_tokens = trace.tokens[place], trace.tokens[place + 1]
            kinds["predicting"].append(place)
            if here in before:
                left = 0
                kinds["onset" if next_tokens == word else "control"].append(place)
                left = MAX_CONTINUATION_TOKENS if next_tokens == word else 0
            elif left:
                kinds["continuation"].append(place)
                left -= 1
            else:
                kinds["elsewhere"].append(place)
        found.append(kinds)
    return found


@pytest.mark.parametrize("shape", [(7,), (3, 4, 7)])
@pytest.mark.parametrize("words", [(2,), (0, 3, 6)])
def test_log_odds_are_those_of_the_words_together(shape: tuple[int, ...], words: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)[..., list(words)].sum(-1)
    assert torch.allclose(odds_of(logits, words), p.log() - (1 - p).log(), rtol=1e-10)
    assert torch.allclose(odds_of(logits, words).sigmoid(), p, rtol=1e-10)
    assert torch.allclose(odds_of(logits, words), word_log_odds(logits, words), rtol=1e-10), "the tests' own formula"


def test_log_odds_hold_where_a_probability_rounds_to_one_or_is_banned() -> None:
    sure = torch.tensor([0.0, 90.0, 0.0])  # float32
    assert abs(float(odds_of(sure, (1,))) - (90 - torch.tensor(2.0).log())) < 1e-4
    assert float(odds_of(torch.tensor([0.0, -torch.inf, 0.0]), (1,)).sigmoid()) == 0


def odds_of(logits: torch.Tensor, words: tuple[int, ...]) -> torch.Tensor:
    """`log_odds_from_logits`, of the words at every position of logits of any shape."""
    rows = logits.reshape(-1, logits.shape[-1])
    at = torch.ones(len(rows), 1, dtype=torch.bool)
    onsets = Onsets(torch.zeros(len(rows), 1, dtype=torch.long), at, at, ~at, ~at, words)
    return log_odds_from_logits(lambda row, position: rows[row], onsets, at).reshape(logits.shape[:-1])


def test_every_place_of_a_text_made_by_hand(pair: PairedModel, wait: int) -> None:
    #                  0  1  2       3  4  5     6  7   8  9  10 11
    first = Trace((5, 8, wait, 7, 8, wait, 9, 10, 8, 11, 8, 3), 3)
    second = Trace((8, 6, 8, 8, wait, 9, 12, 3), 2)
    onsets = find_onsets(pair, [first, second])
    assert {pair.model.tokenizer.decode([word]) for word in onsets.phrases} == {"Wait", "wait", " Wait"}
    assert [places(onsets, kind) for kind in KINDS] == [list(range(2, 11)), [4], [8, 10], [5, 6, 7], [2, 3, 9]]
    # A mark before a mark is a boundary; so the prompt's last token may be one, and its other tokens may not.
    assert [places(onsets, kind, 1) for kind in KINDS] == [list(range(1, 7)), [3], [2], [4, 5, 6], [1]]
    assert onsets.counts == {"documents": 2, "moments": 2, "boundaries": 3}
    assert len(onsets) == 2


def test_what_the_target_wrote_is_read_as_the_definitions_say(
    pair: PairedModel, wait: int, written: list[Trace]
) -> None:
    onsets = find_onsets(pair, written)
    assert int(onsets.onset.sum()) > 10
    assert int(onsets.control.sum()) > 10
    for row, kinds in enumerate(by_hand(written, wait)):
        assert {kind: places(onsets, kind, row) for kind in KINDS} == kinds
    ids = onsets.tokens
    marks = ids[onsets.onset].unique()
    assert torch.isin(ids[onsets.control], marks).all(), "control positions stand where an onset might"
    kinds = torch.stack([onsets.onset, onsets.control, onsets.continuation, onsets.elsewhere]).long().sum(0)
    assert torch.equal(kinds.bool(), onsets.predicting), "every place of a response is of one kind"
    assert kinds.max() == 1


def test_the_prompt_and_padding_never_count(pair: PairedModel, wait: int) -> None:
    """Token 0 pads, and is a real token too: as a mark it would make control positions of the padding."""
    traces = [Trace((0, wait, 4, 0, wait, 9, 0, 5), 3), Trace((4, 5, 6), 1)]
    onsets = find_onsets(pair, traces)
    assert places(onsets, "onset") == [3]
    assert places(onsets, "control") == [6]
    assert places(onsets, "control", 1) == []
    assert places(onsets, "predicting", 1) == [0, 1]


def test_what_follows_ends_after_so_many_tokens(pair: PairedModel, wait: int) -> None:
    onsets = find_onsets(pair, [Trace((5, 8, wait, *[9] * 40, 3), 1)])
    assert places(onsets, "continuation") == list(range(2, 2 + MAX_CONTINUATION_TOKENS))
    assert places(onsets, "elsewhere") == [0, *range(2 + MAX_CONTINUATION_TOKENS, 43)]


def test_a_word_right_after_a_word_is_no_mark_of_words(pair: PairedModel, wait: int) -> None:
    onsets = find_onsets(pair, [Trace((5, 8, wait, wait, 9, 10, 8, 3), 1), Trace((5, 8, wait, 9, 11, 3), 1)])
    assert places(onsets, "onset") == [1, 2]
    assert places(onsets, "control") == [6]
    assert places(onsets, "continuation") == [3, 4, 5]
    assert places(onsets, "control", 1) == []
    assert places(onsets, "continuation", 1) == [2, 3, 4]


def test_a_function_may_say_where_the_behavior_begins(pair: PairedModel, wait: int) -> None:
    first, second = Trace((5, 8, 7, 9, 8, 6, 8, 7, 3), 2), Trace((8, 7, 4, 8, 3), 2)

    def after_seven(trace: Trace) -> list[int]:
        return [i + 1 for i, token in enumerate(trace.tokens) if token == 7 and i + 1 < len(trace.tokens)]

    onsets = find_onsets(pair, [first, second], Behavior("after", find=after_seven))
    assert onsets.phrases == (3, 4, 9)
    assert places(onsets, "onset") == [2, 7]
    assert places(onsets, "control") == []
    assert places(onsets, "onset", 1) == [1], "the next token is the first of the response"

    def only_nine(trace: Trace) -> list[int]:
        return [i for i, token in enumerate(trace.tokens) if token == 9]

    onsets = find_onsets(pair, [first, second], Behavior("nine", find=only_nine))
    assert onsets.phrases == (9,)
    assert (places(onsets, "onset"), places(onsets, "control")) == ([2], [7])
    assert (places(onsets, "onset", 1), places(onsets, "control", 1)) == ([], [1])

    def first_eight(trace: Trace) -> list[int]:
        return [trace.tokens.index(8, trace.prompt_length)]

    onsets = find_onsets(pair, [Trace((4, 7, 8, 7, 8, 7, 9, 3), 1)], Behavior("first", find=first_eight))
    assert (places(onsets, "onset"), places(onsets, "control")) == ([1], [3, 5]), "what is not found is a boundary"

    def in_the_prompt(trace: Trace) -> list[int]:
        return [1]

    assert not find_onsets(pair, [first], Behavior("prompt", find=in_the_prompt)).onset.any()


def test_a_function_that_finds_the_words_finds_the_same(pair: PairedModel, wait: int, written: list[Trace]) -> None:
    found = find_onsets(pair, written, Behavior(find=lambda t: [i for i, x in enumerate(t.tokens) if x == wait]))
    plain = find_onsets(pair, written)
    assert set(found.phrases) < set(plain.phrases), "the others are never said"
    assert all(torch.equal(getattr(found, kind), getattr(plain, kind)) for kind in KINDS)


def test_words_may_be_those_that_other_texts_told(pair: PairedModel, wait: int, written: list[Trace]) -> None:
    never = Behavior("never", find=lambda trace: [])
    found = find_onsets(pair, written, never, phrases=(wait, 9))
    assert found.phrases == (wait, 9)
    assert not found.onset.any()


def test_several_words_are_one_behavior(pair: PairedModel, written: list[Trace]) -> None:
    both, one, other = (
        find_onsets(pair, written, Behavior(words=words)) for words in (("Wait", "Hmm"), ("Wait",), ("Hmm",))
    )
    assert set(both.phrases) == {*one.phrases, *other.phrases}
    assert other.onset.any()
    assert torch.equal(both.onset, one.onset | other.onset)
    assert (one.control & other.onset).any()
    assert not (both.control & other.onset).any(), "another of the words is no boundary"


def test_what_cannot_be_studied_is_said(pair: PairedModel, written: list[Trace]) -> None:
    with pytest.raises(VocabularyError, match="without spaces around them"):
        find_onsets(pair, written, Behavior(words=(" Wait",)))
    with pytest.raises(BehaviorError, match="give a list of words or phrases"):
        Behavior(words=())
    silent = find_onsets(pair, [Trace((4, 5, 6, 7), 1)])
    assert silent.counts == {"documents": 1, "moments": 0, "boundaries": 0}


def test_what_is_never_said_has_no_onsets_whoever_asks(pair: PairedModel, written: list[Trace]) -> None:
    """Words, words of several tokens and a function are one case."""
    for never in (Behavior("doubt", ("Perchance", "two words")), Behavior("never", find=lambda trace: [])):
        found = find_onsets(pair, written, never)
        assert found.counts == {"documents": len(written), "moments": 0, "boundaries": 0}


def test_rows_keep_their_places(pair: PairedModel, written: list[Trace]) -> None:
    onsets = find_onsets(pair, written)
    index = [4, 0, 9]
    some = onsets.rows(index)
    assert some.phrases == onsets.phrases
    assert some.tokens.shape[1] >= max(len(written[i].tokens) for i in index) - 1
    for row, i in enumerate(index):
        for kind in KINDS:
            assert places(some, kind, row) == places(onsets, kind, i)
        width = min(some.tokens.shape[1], len(written[i].tokens))
        assert some.tokens[row, :width].tolist() == list(written[i].tokens[:width])
    short = min(range(len(written)), key=lambda i: len(written[i].tokens))
    assert onsets.rows([short]).tokens.shape[1] <= len(written[short].tokens), "no wider than the longest"


def test_documents_with_an_onset_come_in_their_order(pair: PairedModel, written: list[Trace]) -> None:
    onsets = find_onsets(pair, written)
    has = [i for i in range(len(written)) if onsets.onset[i].any()]
    assert 3 < len(has) < len(written)
    for n in (None, 3, 1000):
        some = onsets.with_onsets(n=n)
        assert len(some) == len(has[:n])
        for row, i in enumerate(has[:n]):
            assert places(some, "onset", row) == places(onsets, "onset", i)
    assert int(onsets.with_onsets().onset.sum()) == int(onsets.onset.sum())
    assert len(find_onsets(pair, [Trace((4, 5, 6, 7), 1)]).with_onsets()) == 0


def test_batches_have_every_document_once(pair: PairedModel, written: list[Trace]) -> None:
    onsets = find_onsets(pair, written)
    seen = []
    for limit in (200, 4096):
        batches = list(onsets.batches(tokens_per_batch=limit))
        rows = [i for index, _ in batches for i in index]
        assert sorted(rows) == list(range(len(written)))
        seen.append(len(batches))
        for index, batch in batches:
            assert batch.tokens.numel() <= limit or len(index) == 1
            for row, i in enumerate(index):
                assert all(places(batch, kind, row) == places(onsets, kind, i) for kind in KINDS)
    assert seen[0] > seen[1], "similar lengths go together"
    assert list(onsets.with_onsets(n=0).batches()) == []


@torch.no_grad()
@pytest.mark.parametrize("kinds", [("onset",), ("control",), ("onset", "control", "continuation")])
def test_text_after_the_last_place_changes_nothing_there(kinds: tuple[str, ...]) -> None:
    """Also where a phrase begins at the last place, whose later tokens its log-odds read."""
    pair, tokens = make("Qwen2ForCausalLM", "hooked"), random_batch(3, (30, 12, 25)).tokens.clone()
    tokens[:, 10:13] = torch.tensor([7, 9, 12])
    no = torch.zeros_like(tokens, dtype=torch.bool)
    onset, control, continuation = no.clone(), no.clone(), no.clone()
    onset[:, 9], control[:2, [4, 9]], continuation[2, 14] = True, True, True
    predicting = (tokens != 0) & (torch.arange(tokens.shape[1]) < torch.tensor([[29], [11], [24]]))
    whole = Onsets(tokens, predicting, onset & predicting, control & predicting & ~onset, continuation, (5, (7, 9, 12)))
    cut = whole.cut_after(*kinds)
    n = max(int(getattr(whole, kind).nonzero()[:, 1].max()) for kind in kinds) + 1
    assert len(cut) == len(whole) and cut.tokens.shape[1] == n + 3, "the places, and the tokens of a phrase"
    for kind in kinds:
        before, after = getattr(whole, kind), getattr(cut, kind)
        assert torch.equal(before.nonzero(), after.nonzero())
        assert torch.equal(whole.next_tokens[before], cut.next_tokens[after])
        if kind != "continuation":
            with pair.routed("replacement"):
                torch.testing.assert_close(log_odds_at(pair, cut, after), log_odds_at(pair, whole, before))


def test_an_unknown_kind_of_position_is_named(pair: PairedModel, written: list[Trace]) -> None:
    onsets = find_onsets(pair, written[:3])
    for call in (onsets.having, onsets.cut_after, lambda kind: onsets.cut_after("onset", kind)):
        with pytest.raises(ArgumentError, match="kind is 'onsets'.*Did you mean 'onset'"):
            call("onsets")


def test_to_is_the_same_elsewhere(pair: PairedModel, written: list[Trace]) -> None:
    onsets = find_onsets(pair, written[:3])
    there = onsets.to("meta")
    assert there.phrases == onsets.phrases
    assert {getattr(there, kind).device.type for kind in ("tokens", *KINDS)} == {"meta"}


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
@torch.no_grad()
def test_log_odds_are_the_log_odds_of_a_plain_pass(architecture: str, backend: str) -> None:
    """Gemma's logits have a soft cap, which is part of what the model says."""
    pair, tokens = make(architecture, backend), random_batch(3).tokens
    at = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    no = torch.zeros_like(at)
    onsets = Onsets(tokens, ~no, at, no, no, (7, 12))
    for route in ("target", "hybrid", "replacement"):
        with pair.routed(route):
            found, logits = log_odds_at(pair, onsets, at), pair.model(tokens)
            residual = final_residual(pair, tokens)
            assert torch.allclose(pair.unembed(residual), logits, atol=1e-5)
        p = logits.softmax(-1)[..., [7, 12]].sum(-1)[at]
        assert torch.allclose(found, p.log() - (1 - p).log(), atol=1e-4)
    assert torch.equal(replace(onsets, control=at).elsewhere, ~at)
