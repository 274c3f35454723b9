"""What is generated after a prompt does not depend on what stands beside it: not its limit, its draws or its tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_model, randomise

from tl_adapters import organism
from tl_adapters.evaluation.sampled_answers import Sampling, answer
from tl_adapters.generation.completions import complete
from tl_adapters.generation.decoding import CompletionError, Decoding, choose
from tl_adapters.generation.responses import respond
from tl_adapters.interventions.feature_edits import ablated, scaled
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer

LENGTHS = (3, 31, 12, 50, 7, 20)
N_CTX = 64
GREEDY, DRAWN = Decoding(), Decoding(temperature=1.5, top_p=0.9, top_k=20)


def made(
    architecture: str = "Qwen2ForCausalLM", backend: str = "hooked", dtype: torch.dtype = torch.float64, **options: Any
) -> PairedModel:
    models = [random_model(seed, dtype, architecture, **options) for seed in (1, 2)]
    return randomise(PairedModel.from_pretrained(*models, backend=backend))


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 61, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(params=["hooked", "bridge"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def by_whole_passes(model: Any, prompt: list[int], ends: list[int], limit: int) -> list[int]:
    """The likeliest tokens, with the end token, each by a pass over everything so far."""
    tokens = list(prompt)
    while len(tokens) < min(N_CTX, len(prompt) + limit) and (tokens[-1] not in ends or len(tokens) == len(prompt)):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_completions_are_the_likeliest_tokens_on_every_route_and_with_hooks(
    architecture: str, backend: str
) -> None:
    pair = made(architecture, backend)
    with pair.routed("target") as model:
        free = [by_whole_passes(model, prompt, [], 6) for prompt in prompts()[::3]]
    ends = [free[0][5], free[1][2]]  # some rows leave the batch early
    features = [(0, 3), (1, 7), (3, 11)]
    said = []
    for how in ({"route": "target"}, {"first": 2}, {"route": "replacement"}):
        for change in (ablated(pair, []), scaled(pair, features, -4.0)):
            with pair.routed(**how), change as model:  # type: ignore[arg-type]
                expected = [by_whole_passes(model, prompt, ends, 12) for prompt in prompts()]
                found = complete(model, prompts(), ends, max_new_tokens=12, batch_size=4)
            assert [[*one.tokens, *([one.end] if one.ended else [])] for one in found] == expected
            assert not any(one.near_ties for one in found)
            said.append([one.tokens for one in found])
    assert len({str(one) for one in said}) == 5, "without adapters no feature is changed; all else is another model"


def test_a_prompts_limit_is_its_own(backend: str) -> None:
    """Also one that fills what is left of the context, which the longest prompt of the batch leaves much less of."""
    model = made("Qwen2ForCausalLM", backend).model
    for limit in (40, None):
        alone = [complete(model, [prompt], [], max_new_tokens=limit, batch_size=1)[0] for prompt in prompts()]
        room = [min(limit or N_CTX, N_CTX - n) for n in LENGTHS]
        assert [len(one.tokens) for one in alone] == room and not any(one.ended for one in alone)
        assert complete(model, prompts(), [], max_new_tokens=limit, batch_size=6) == alone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("decoding", [DRAWN, Decoding(2.0), Decoding(1.0, 0.5), Decoding(1.0, 1.0, 3)], ids=str)
def test_draws_are_each_prompts_own(architecture: str, backend: str, decoding: Decoding) -> None:
    model = made(architecture, backend).model
    keys = [f"problem {i}" for i in range(len(LENGTHS))]
    options: dict[str, Any] = dict(max_new_tokens=12, decoding=decoding)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = complete(model, prompts(), [5, 9], batch_size=6, keys=keys, **options)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
    backwards = complete(model, prompts()[::-1], [5, 9], batch_size=4, keys=keys[::-1], **options)[::-1]
    alone = [
        complete(model, [prompt], [5, 9], batch_size=1, keys=[key], **options)[0]
        for prompt, key in zip(prompts(), keys, strict=True)
    ]
    assert together == backwards == alone
    other = complete(model, prompts(), [5, 9], batch_size=6, keys=[(k, 1) for k in keys], **options)
    assert [one.tokens for one in other] != [one.tokens for one in together]
    same = complete(model, [prompts()[0]] * 3, [], batch_size=3, keys=[1, 1, 2], **options)
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoding", [GREEDY, DRAWN], ids=str)
def test_in_low_precision_completions_are_equal_up_to_a_choice_closer_than_rounding(
    dtype: torch.dtype, decoding: Decoding, backend: str
) -> None:
    for architecture in ("Qwen3ForCausalLM", "Gemma2ForCausalLM"):
        model = made(architecture, backend, dtype).model
        options: dict[str, Any] = dict(max_new_tokens=30, decoding=decoding)
        keys = list(range(len(LENGTHS)))
        together = complete(model, prompts(), [], batch_size=6, keys=keys, **options)
        parted = 0
        for prompt, key, one in zip(prompts(), keys, together, strict=True):
            (alone,) = complete(model, [prompt], [], batch_size=1, keys=[key], **options)
            pairs = enumerate(zip(one.tokens, alone.tokens, strict=True))
            place = next((i for i, (a, b) in pairs if a != b), len(one.tokens))
            parted += place < len(one.tokens)
            if place < len(one.tokens):
                assert min(one.near_ties) <= place and min(alone.near_ties) <= place
        n = sum(len(one.tokens) for one in together)
        if dtype == torch.float32:
            assert parted == 0 and sum(len(one.near_ties) for one in together) < n / 20


def test_choices_closer_than_rounding_are_noted() -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0 - 1e-5, -torch.inf], [3.0, 1.0, 2.9, 0.0], [0.0, 7.0, 7.0, 1.0]])
    tokens, near = choose(logits, GREEDY)
    assert tokens.tolist() == [0, 0, 1] and near.tolist() == [True, False, True]
    assert choose(logits.bfloat16(), GREEDY)[1].tolist() == [True, True, True]
    assert choose(logits.double(), GREEDY)[1].tolist() == [False, False, True]
    even = torch.zeros(5, 4)
    numbers = torch.tensor([0.1, 0.25, 0.25 + 1e-6, 0.4, 0.99])
    tokens, near = choose(even, Decoding(1.0), numbers)
    assert tokens.tolist() == [0, 1, 1, 1, 3]
    assert near.tolist() == [False, True, False, False, False], "zero logits round to themselves"
    tokens, near = choose(even + 8, Decoding(1.0), numbers)
    assert near.tolist() == [False, True, True, False, False]
    # Whether the third token is among the likeliest is not sure, and where the draw falls depends on it.
    tokens, near = choose(torch.tensor([[9.0, 8.0, 7.0, 7.0 - 1e-5]] * 2), Decoding(1.0, top_k=3), numbers[[0, 4]])
    assert near.tolist() == [False, True]


def test_what_is_drawn_has_the_models_probabilities() -> None:
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, -torch.inf, 1.0], dtype=torch.float64)
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for decoding, kept in (
        (Decoding(0.7), [0, 1, 2, 3, 5]),
        (Decoding(0.7, top_k=2), [0, 2]),
        (Decoding(0.7, top_p=0.75), [0, 2]),
        (Decoding(0.7, top_p=1e-9), [0]),
        (Decoding(0.7, top_p=0.95, top_k=3), [0, 2, 5]),
    ):
        tokens, _ = choose(logits.expand(len(numbers), -1), decoding, numbers)
        found = tokens.bincount(minlength=6) / len(numbers)
        only = torch.full_like(logits, -torch.inf)
        only[kept] = logits[kept]
        assert torch.allclose(found.double(), (only / 0.7).softmax(-1), atol=2e-4)
    tokens, _ = choose(logits.float()[None], Decoding(1.0), torch.ones(1) - 2**-24)
    assert tokens.tolist() == [5], "the last number there is does not lead past the last token"


def test_what_cannot_be_generated_is_said(backend: str) -> None:
    model = made("Qwen2ForCausalLM", backend).model
    for bad in ([], [1] * N_CTX):
        with pytest.raises(CompletionError, match=f"A prompt has {len(bad)} tokens; the model reads 1 to {N_CTX - 1}"):
            complete(model, [[1], bad], [], batch_size=2)
    for options in ({"batch_size": 0}, {"batch_size": 1, "max_new_tokens": 0}):
        with pytest.raises(CompletionError, match="both are 1 or more"):
            complete(model, [[1]], [], **options)
    with pytest.raises(CompletionError, match="temperature nan"):
        Decoding(float("nan"))
    handle = model.unembed.register_forward_hook(lambda module, inputs, logits: logits * torch.nan)
    try:
        with pytest.raises(CompletionError, match="logits are not finite"):
            complete(model, prompts(), [], max_new_tokens=2, batch_size=6)
    finally:
        handle.remove()
    assert complete(model, [], [], batch_size=1) == []


# -- problems ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking() -> PairedModel:
    tokenizer = build_tokenizer()
    base, target = (random_model(s, vocab_size=len(tokenizer), max_position_embeddings=128) for s in (1, 2))
    return randomise(PairedModel.from_pretrained(base, target, tokenizer=tokenizer))


def test_answers_to_a_problem_are_the_same_in_any_company(talking: PairedModel, tmp_path: Any) -> None:
    """In any list, order and batch size; and of any number of samples, kept or asked at once."""
    asked = organism.problems("tune", 7, n_terms=(2, 3, 5))
    options: dict[str, Any] = dict(temperature=1.0, top_p=0.9, max_new_tokens=9, seed=3)
    together = respond(talking.model, asked, **options)
    assert [respond(talking.model, [p], **options)[0] for p in asked] == together
    assert respond(talking.model, asked[::-1], batch_size=2, **options)[::-1] == together
    assert respond(talking.model, asked, **{**options, "seed": 4}) != together
    sampling = Sampling(samples=2, temperature=1.0, max_new_tokens=9)
    found = {
        size: answer(talking.model, asked, replace(sampling, batch_size=size), tmp_path / str(size), {}, False)
        for size in (2, 7)
    }
    by = {size: {(a.problem, a.sample): a.response for a in answers} for size, answers in found.items()}
    assert by[2] == by[7]


def test_ties_are_counted_and_kept(talking: PairedModel, tmp_path: Any) -> None:
    asked = organism.problems("tune", 2)
    half = PairedModel.from_pretrained(
        *(random_model(s, torch.bfloat16, vocab_size=talking.model.cfg.d_vocab) for s in (1, 2)),
        tokenizer=talking.model.tokenizer,
    )
    sampling = Sampling(temperature=0.0, max_new_tokens=20)
    first = answer(half.model, asked, sampling, tmp_path, {}, False)
    assert sum(a.response.near_ties for a in first) > 0
    assert answer(half.model, asked, sampling, tmp_path, {}, False) == first
    assert not any(r.near_ties for r in respond(talking.model, asked, max_new_tokens=20))
