"""A completion does not depend on the other prompts of its batch: neither its limit, nor its draws, nor its tokens."""

import copy
import functools
import hashlib
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_model, randomise

from tl_adapters import organism
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.sampled_responses import ResponseOptions, sample_responses
from tl_adapters.generation import cached_passes
from tl_adapters.generation.completions import complete
from tl_adapters.generation.responses import respond
from tl_adapters.generation.sampling import GenerationError, SamplingParameters, choose_tokens, seed_of
from tl_adapters.interventions.feature_edits import scaled
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism.recipe import build_tokenizer

LENGTHS = (3, 31, 12, 50, 7, 20)
N_CTX = 64
GREEDY, DRAWN = SamplingParameters(), SamplingParameters(temperature=1.5, top_p=0.9, top_k=20)


def made(
    architecture: str = "Qwen2ForCausalLM", backend: str = "hooked", dtype: torch.dtype = torch.float64, **options: Any
) -> PairedModel:
    models = [random_model(seed, dtype, architecture, **options) for seed in (1, 2)]
    return randomise(PairedModel.from_pretrained(*models, backend=backend))


shared = functools.cache(made)
"""The same pair for every test that changes none of its weights and leaves its routes as they were."""


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 61, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(params=["hooked", "bridge"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def by_whole_passes(model: Any, prompt: list[int], ends: list[int], limit: int) -> list[int]:
    """The likeliest tokens, with the end token, each by a full forward pass."""
    tokens = list(prompt)
    while len(tokens) < min(N_CTX, len(prompt) + limit) and (tokens[-1] not in ends or len(tokens) == len(prompt)):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_completions_are_the_likeliest_tokens_on_every_route_and_with_hooks(
    architecture: str, backend: str
) -> None:
    pair = shared(architecture, backend)
    with pair.routed("target") as model:
        free = [by_whole_passes(model, prompt, [], 6) for prompt in prompts()[::3]]
    ends = [free[0][5], free[1][2]]  # some rows leave the batch early
    features = [(0, 3), (1, 7), (3, 11)]
    said = []
    for how in ({"route": "target"}, {"first": 2}, {"route": "replacement"}):
        hooked = pair.model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value)])
        for change in (hooked, scaled(pair, features, -4.0)):
            with pair.routed(**how), change as model:  # type: ignore[arg-type]
                expected = [by_whole_passes(model, prompt, ends, 12) for prompt in prompts()]
                found = complete(model, prompts(), stop_at=ends, max_new_tokens=12, batch_size=4)
            assert [[*one.tokens, *([] if one.truncated else [one.end])] for one in found] == expected
            assert not any(one.near_ties for one in found)
            said.append([one.tokens for one in found])
    assert len({str(one) for one in said}) == 5, (
        "features are changed in the replacement on the target, too; all else differs"
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("inside", [False, True], ids=["direct", "modules"])
def test_prompts_are_read_in_parts_of_similar_length(
    architecture: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that little padding is read; with a hook inside the attention, decoding steps call the modules, too."""
    model, read = made(architecture).model, []
    point = "attn.hook_q" if inside else "hook_resid_pre"
    with model.hooks(fwd_hooks=[(f"blocks.0.{point}", lambda value, hook: read.append(tuple(value.shape[:2])))]):
        alone = [complete(model, [prompt], stop_at=[], max_new_tokens=8, batch_size=1)[0] for prompt in prompts()]
        for cost, passes in ((1_000, [(6, 50)]), (64, [(4, 20), (2, 50)]), (12, [(2, 7), (2, 20), (1, 31), (1, 50)])):
            monkeypatch.setattr(cached_passes, "TOKENS_PER_PASS", cost)
            read.clear()
            assert complete(model, prompts(), stop_at=[], max_new_tokens=8, batch_size=6) == alone
            assert read[: len(passes) + 1] == [*passes, (6, 1)]


@pytest.mark.parametrize("cost", [0, 5, 64])
def test_groups_of_lengths_read_the_fewest_tokens(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all ways in which the rows, sorted by length, can be divided."""
    monkeypatch.setattr(cached_passes, "TOKENS_PER_PASS", cost)

    def tokens(groups: list[list[int]]) -> int:
        return sum(cost + len(rows) * max(lengths[row] for row in rows) for rows in groups)

    generator = torch.Generator().manual_seed(0)
    for most in (1, 4, 40):
        lengths = torch.randint(1, most + 1, (8,), generator=generator).tolist()
        found = cached_passes.groups_of_lengths(lengths)
        order = sorted(range(8), key=lambda row: lengths[row])
        assert [row for rows in found for row in rows] == order
        divided = (
            [order[start:end] for start, end in zip((0, *ends), (*ends, 8), strict=True)]
            for n in range(8)
            for ends in combinations(range(1, 8), n)
        )
        assert tokens(found) == min(map(tokens, divided))
        assert len(found) <= len(set(lengths))


def test_every_prompt_has_its_own_limit(backend: str) -> None:
    """Also a limit that fills the rest of the context, of which the longest prompt of the batch leaves much less."""
    model = shared("Qwen2ForCausalLM", backend).model
    for limit in (40, None):
        alone = [complete(model, [prompt], stop_at=[], max_new_tokens=limit, batch_size=1)[0] for prompt in prompts()]
        room = [min(limit or N_CTX, N_CTX - n) for n in LENGTHS]
        assert [len(one.tokens) for one in alone] == room and all(one.truncated for one in alone)
        assert complete(model, prompts(), stop_at=[], max_new_tokens=limit, batch_size=6) == alone


def test_records_that_look_alike_are_different_keys() -> None:
    """A trace is shown by its lengths alone."""
    traces = [Trace((1, 2, 3), 2), Trace((1, 2, 4), 2)]
    assert repr(traces[0]) == repr(traces[1])
    for keys in (traces, [(0, ("a", trace)) for trace in traces]):
        assert seed_of(keys[0]) != seed_of(keys[1]) and seed_of(keys[0]) == seed_of(copy.deepcopy(keys[0]))
    assert seed_of((0, "a")) == int.from_bytes(hashlib.sha256(b"(0, 'a')").digest()[:8], "big") >> 1, "as ever"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "sampling", [DRAWN, SamplingParameters(2.0), SamplingParameters(1.0, 0.5), SamplingParameters(1.0, 1.0, 3)], ids=str
)
def test_draws_depend_on_the_prompts_key_alone(architecture: str, backend: str, sampling: SamplingParameters) -> None:
    model = shared(architecture, backend).model
    keys = [f"problem {i}" for i in range(len(LENGTHS))]
    options: dict[str, Any] = dict(max_new_tokens=12, **vars(sampling))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = complete(model, prompts(), stop_at=[5, 9], batch_size=6, keys=keys, **options)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
    backwards = complete(model, prompts()[::-1], stop_at=[5, 9], batch_size=4, keys=keys[::-1], **options)[::-1]
    alone = [
        complete(model, [prompt], stop_at=[5, 9], batch_size=1, keys=[key], **options)[0]
        for prompt, key in zip(prompts(), keys, strict=True)
    ]
    assert together == backwards == alone
    other = complete(model, prompts(), stop_at=[5, 9], batch_size=6, keys=[(k, 1) for k in keys], **options)
    assert [one.tokens for one in other] != [one.tokens for one in together]
    same = complete(model, [prompts()[0]] * 3, stop_at=[], batch_size=3, keys=[1, 1, 2], **options)
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=str)
def test_in_low_precision_completions_are_equal_up_to_a_near_tie(
    dtype: torch.dtype, sampling: SamplingParameters, backend: str
) -> None:
    for architecture in ("Qwen3ForCausalLM", "Gemma2ForCausalLM"):
        model = shared(architecture, backend, dtype).model
        options: dict[str, Any] = dict(max_new_tokens=30, **vars(sampling))
        keys = list(range(len(LENGTHS)))
        together = complete(model, prompts(), stop_at=[], batch_size=6, keys=keys, **options)
        parted = 0
        for prompt, key, one in zip(prompts(), keys, together, strict=True):
            (alone,) = complete(model, [prompt], stop_at=[], batch_size=1, keys=[key], **options)
            pairs = enumerate(zip(one.tokens, alone.tokens, strict=True))
            place = next((i for i, (a, b) in pairs if a != b), len(one.tokens))
            parted += place < len(one.tokens)
            if place < len(one.tokens):
                options_ = {**options, "max_new_tokens": place + 1}
                before = complete(model, prompts(), stop_at=[], batch_size=6, keys=keys, **options_)[key]
                assert before.tokens == one.tokens[: place + 1] and before.near_ties
                (before,) = complete(model, [prompt], stop_at=[], batch_size=1, keys=[key], **options_)
                assert before.tokens == alone.tokens[: place + 1] and before.near_ties
        n = sum(len(one.tokens) for one in together)
        if dtype == torch.float32:
            assert parted == 0 and sum(one.near_ties for one in together) < n / 20


def test_near_ties_are_reported() -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0 - 1e-5, -torch.inf], [3.0, 1.0, 2.9, 0.0], [0.0, 7.0, 7.0, 1.0]])
    tokens, near = choose_tokens(logits, GREEDY)
    assert tokens.tolist() == [0, 0, 1] and near.tolist() == [True, False, True]
    assert choose_tokens(logits.bfloat16(), GREEDY)[1].tolist() == [True, True, True]
    assert choose_tokens(logits.double(), GREEDY)[1].tolist() == [False, False, True]
    even = torch.zeros(5, 4)
    numbers = torch.tensor([0.1, 0.25, 0.25 + 1e-6, 0.4, 0.99])
    tokens, near = choose_tokens(even, SamplingParameters(1.0), numbers)
    assert tokens.tolist() == [0, 1, 1, 1, 3]
    assert near.tolist() == [False, True, False, False, False], "zero logits round to themselves"
    tokens, near = choose_tokens(even + 8, SamplingParameters(1.0), numbers)
    assert near.tolist() == [False, True, True, False, False]
    # Whether the third token is among the likeliest is not sure, and where the draw falls depends on it.
    tokens, near = choose_tokens(
        torch.tensor([[9.0, 8.0, 7.0, 7.0 - 1e-5]] * 2), SamplingParameters(1.0, top_k=3), numbers[[0, 4]]
    )
    assert near.tolist() == [False, True]


def test_drawn_tokens_have_the_models_probabilities() -> None:
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, -torch.inf, 1.0], dtype=torch.float64)
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for sampling, kept in (
        (SamplingParameters(0.7), [0, 1, 2, 3, 5]),
        (SamplingParameters(0.7, top_k=2), [0, 2]),
        (SamplingParameters(0.7, top_p=0.75), [0, 2]),
        (SamplingParameters(0.7, top_p=1e-9), [0]),
        (SamplingParameters(0.7, top_p=0.95, top_k=3), [0, 2, 5]),
    ):
        tokens, _ = choose_tokens(logits.expand(len(numbers), -1), sampling, numbers)
        found = tokens.bincount(minlength=6) / len(numbers)
        only = torch.full_like(logits, -torch.inf)
        only[kept] = logits[kept]
        assert torch.allclose(found.double(), (only / 0.7).softmax(-1), atol=2e-4)
    tokens, _ = choose_tokens(logits.float()[None], SamplingParameters(1.0), torch.ones(1) - 2**-24)
    assert tokens.tolist() == [5], "the last number there is does not lead past the last token"


def test_unusable_prompts_and_options_are_refused(backend: str) -> None:
    model = made("Qwen2ForCausalLM", backend).model
    for bad in ([], [1] * N_CTX):
        with pytest.raises(GenerationError, match=f"A prompt has {len(bad)} tokens; allowed are 1 to {N_CTX - 1}"):
            complete(model, [[1], bad], stop_at=[], batch_size=2)
    for options in ({"batch_size": 0}, {"batch_size": 1, "max_new_tokens": 0}):
        with pytest.raises(GenerationError, match="both must be 1 or more"):
            complete(model, [[1]], stop_at=[], **options)
    with pytest.raises(GenerationError, match="temperature nan"):
        SamplingParameters(float("nan"))
    handle = model.unembed.register_forward_hook(lambda module, inputs, logits: logits * torch.nan)
    try:
        with pytest.raises(GenerationError, match="logits are not finite"):
            complete(model, prompts(), stop_at=[], max_new_tokens=2, batch_size=6)
    finally:
        handle.remove()
    assert complete(model, [], stop_at=[], batch_size=1) == []


# -- problems ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking() -> PairedModel:
    tokenizer = build_tokenizer()
    base, target = (random_model(s, vocab_size=len(tokenizer), max_position_embeddings=128) for s in (1, 2))
    return randomise(PairedModel.from_pretrained(base, target, tokenizer=tokenizer))


def test_responses_do_not_depend_on_the_other_problems(talking: PairedModel, tmp_path: Any) -> None:
    """They are the same in any list, order and batch size, with `respond` and with `sample_responses`."""
    asked = organism.problems("tune", 7, n_terms=(2, 3, 5))
    options: dict[str, Any] = dict(temperature=1.0, top_p=0.9, max_new_tokens=9, seed=3)
    together = respond(talking.model, asked, **options)
    assert [respond(talking.model, [p], **options)[0] for p in asked] == together
    assert respond(talking.model, asked[::-1], batch_size=2, **options)[::-1] == together
    assert respond(talking.model, asked, **{**options, "seed": 4}) != together
    sampling = ResponseOptions(samples=2, temperature=1.0, max_new_tokens=9)
    found = {
        size: sample_responses(
            talking.model, asked, replace(sampling, batch_size=size), tmp_path / str(size), {}, False
        )
        for size in (2, 7)
    }
    by = {size: {(a.problem, a.sample): a.response for a in answers} for size, answers in found.items()}
    assert by[2] == by[7]


def test_near_ties_are_counted_and_recorded(talking: PairedModel, tmp_path: Any) -> None:
    asked = organism.problems("tune", 2)
    half = PairedModel.from_pretrained(
        *(random_model(s, torch.bfloat16, vocab_size=talking.model.cfg.d_vocab) for s in (1, 2)),
        tokenizer=talking.model.tokenizer,
    )
    sampling = ResponseOptions(temperature=0.0, max_new_tokens=20)
    first = sample_responses(half.model, asked, sampling, tmp_path, {}, False)
    assert sum(a.response.near_ties for a in first) > 0
    assert sample_responses(half.model, asked, sampling, tmp_path, {}, False) == first
    assert not any(r.near_ties for r in respond(talking.model, asked, max_new_tokens=20))
