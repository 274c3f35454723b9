"""Responses on any route, and the definitions of their metrics."""

import pytest
import torch
from helpers.random_models import random_model, randomise

from tl_adapters.evaluation.response_metrics import measure_responses
from tl_adapters.generation.responses import Response, respond
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import problems
from tl_adapters.organism.recipe import build_tokenizer


@pytest.fixture(scope="module")
def talking_pair() -> PairedModel:
    tokenizer = build_tokenizer()
    base, target = (random_model(s, torch.float32, vocab_size=len(tokenizer)) for s in (1, 2))
    return randomise(PairedModel.from_pretrained(base, target, tokenizer=tokenizer))


def test_responses_do_not_depend_on_their_batch(talking_pair: PairedModel) -> None:
    asked = problems("tune", 12, n_terms=(2, 3, 5))
    for route in ("target", "hybrid", "replacement"):
        with talking_pair.routed(route):
            together = respond(talking_pair.model, asked, max_new_tokens=10, batch_size=5)
            alone = [respond(talking_pair.model, [p], max_new_tokens=10)[0] for p in asked]
        assert [r.tokens for r in together] == [r.tokens for r in alone]
        assert [r.prompt for r in together] == [r.prompt for r in alone]


def test_a_tokenizer_without_padding_and_with_another_end_of_turn(talking_pair: PairedModel) -> None:
    """As in Qwen2.5's bases: the template ends a turn with a token that is not the tokenizer's end token."""
    model, tokenizer = talking_pair.model, build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|end|>'")
    turn_end, tokenizer.eos_token, tokenizer.pad_token = tokenizer.eos_token_id, "</think>", None
    before, model.tokenizer = model.tokenizer, tokenizer
    model.unembed.b_U.data[turn_end] = 1e9
    try:
        found = respond(model, problems("tune", 6, n_terms=(2, 3, 5)), max_new_tokens=6)
    finally:
        model.unembed.b_U.data[turn_end] = 0
        model.tokenizer = before
    assert all(not r.truncated and r.tokens == () for r in found)
    assert tokenizer.pad_token is None and tokenizer.padding_side == before.padding_side


@pytest.mark.parametrize(("bias", "ends"), [(-1e9, False), (1e9, True)])
def test_a_response_ends_at_the_end_token_or_is_truncated(talking_pair: PairedModel, bias: float, ends: bool) -> None:
    model, end = talking_pair.model, talking_pair.model.tokenizer.eos_token_id
    model.unembed.b_U.data[end] = bias
    try:
        found = respond(model, problems("tune", 4), max_new_tokens=6)
    finally:
        model.unembed.b_U.data[end] = 0
    for r in found:
        assert r.truncated is not ends and not r.correct
        assert len(r.tokens) == (0 if ends else 6) and end not in r.tokens


def test_greedy_responses_are_the_likeliest_tokens(talking_pair: PairedModel) -> None:
    model = talking_pair.model
    (found,) = respond(model, problems("tune", 1), max_new_tokens=6)
    with torch.no_grad():
        logits = model(torch.tensor([[*found.prompt, *found.tokens]]))[0]
    n = len(found.prompt)
    assert logits[n - 1 : n - 1 + len(found.tokens)].argmax(-1).tolist() == list(found.tokens)


def test_the_prefill_is_the_end_of_the_prompt(talking_pair: PairedModel) -> None:
    model, asked = talking_pair.model, problems("tune", 6, n_terms=(2, 3, 5))
    begun = ["<think>", "<think>47+85=122.\n", "", "Wait", "<think>1", "9"]
    free = respond(model, asked, max_new_tokens=5)
    made = respond(model, asked, max_new_tokens=5, batch_size=4, prefill=begun)
    encoded = model.tokenizer(begun, add_special_tokens=False)["input_ids"]
    assert [r.prompt for r in made] == [(*r.prompt, *ids) for r, ids in zip(free, encoded, strict=True)]
    assert made[2] == free[2]
    for r in made:
        with torch.no_grad():
            likeliest = model(torch.tensor([[*r.prompt, *r.tokens]]))[0].argmax(-1)
        assert likeliest[len(r.prompt) - 1 : -1].tolist() == list(r.tokens)
        assert r.text == model.tokenizer.decode(r.tokens)
    assert respond(model, asked, max_new_tokens=5, prefill="Wait")[3] == made[3]
    with pytest.raises(ValueError, match="shorter"):
        respond(model, asked, prefill=begun[:-1])


def response(text: str, n: int, correct: bool, truncated: bool = False) -> Response:
    return Response((1,), tuple(range(n)), text, truncated, correct)


def test_metrics_follow_their_definitions() -> None:
    found = measure_responses(
        [
            response("<think>Wait, wait. Awaiting.</think>3", 10, True),
            response("Waiter WAIT", 30, False, truncated=True),
        ],
        "report",
    )
    assert found.accuracy == 0.5 and found.length == 20 and found.n == 2 and found.split == "report"
    assert found.hesitation_per_1k == pytest.approx(1000 * 3 / 40)  # whole words, in any case, over all tokens
    assert found.truncated == 0.5 and found.think_opened == 0.5
    for name in ("accuracy", "length", "hesitation_per_1k"):
        assert found.ci[name].low <= getattr(found, name) <= found.ci[name].high


def test_the_tokenizer_is_unchanged(talking_pair: PairedModel) -> None:
    talking_pair.model.tokenizer.padding_side = "right"
    respond(talking_pair.model, problems("tune", 2), max_new_tokens=2)
    assert talking_pair.model.tokenizer.padding_side == "right"
