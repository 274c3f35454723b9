"""The KL that sampled tokens estimate is the exact one, within its standard error."""

import math
from typing import Any

import pytest
import torch
from helpers.random_models import random_model, randomise

from tl_adapters.evaluation.sampled_kl import sampled_kl
from tl_adapters.generation.sampling import GenerationError
from tl_adapters.models.paired_model import PairedModel

VOCABULARY = 13
PROMPTS = [[3, 5, 7], [2, 11]]


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def pair(request: pytest.FixtureRequest) -> PairedModel:
    models = [random_model(seed, vocab_size=VOCABULARY) for seed in (1, 2)]
    return randomise(PairedModel.from_pretrained(*models, backend=request.param))


@torch.no_grad()
def log_probabilities(pair: PairedModel, route: str, tokens: torch.Tensor) -> torch.Tensor:
    with pair.routed(route) as model:
        return model(tokens)[:, -1].double().log_softmax(-1)


def exact_kl(pair: PairedModel, prompt: list[int], end: int) -> tuple[float, float]:
    """KL and expected number of tokens of a text of at most two tokens, over all of its first tokens."""
    first = torch.tensor([prompt])
    p, q = (log_probabilities(pair, route, first)[0] for route in ("target", "replacement"))
    both = torch.cat([first.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
    p2, q2 = (log_probabilities(pair, route, both) for route in ("target", "replacement"))
    goes_on = p.exp() * (torch.arange(VOCABULARY) != end)
    kl = (p.exp() * (p - q)).sum() + (goes_on * (p2.exp() * (p2 - q2)).sum(-1)).sum()
    return float(kl), 1 + float(goes_on.sum())


def test_the_estimate_is_the_exact_kl_within_its_standard_error(pair: PairedModel) -> None:
    """Some texts end after one token, so that the mean over tokens is a ratio of two random sums."""
    end = int(log_probabilities(pair, "target", torch.tensor([PROMPTS[0]]))[0].argmax())
    exact = torch.tensor([exact_kl(pair, prompt, end) for prompt in PROMPTS]).sum(0)
    value = float(exact[0] / exact[1])
    options: dict[str, Any] = dict(samples=400, max_new_tokens=2, stop_at=[end], seed=1)
    found = sampled_kl(pair, PROMPTS, **options)
    assert found.n_texts == 800 and 800 < found.n_tokens < 1600
    assert abs(found.value - value) < 2 * found.standard_error < 0.2 * value
    again = sampled_kl(pair, PROMPTS, **options, batch_size=7, tokens_per_batch=31)
    assert again.n_tokens == found.n_tokens and math.isclose(again.value, found.value, rel_tol=1e-5)


def test_the_target_has_no_divergence_from_itself(pair: PairedModel) -> None:
    found = sampled_kl(pair, PROMPTS, route="target", max_new_tokens=5, stop_at=[])
    assert (found.value, found.standard_error, found.n_tokens) == (0.0, 0.0, 10)
    assert sampled_kl(pair, PROMPTS[:1], max_new_tokens=2, stop_at=[]).standard_error == math.inf


def test_no_texts_are_refused(pair: PairedModel) -> None:
    for prompts, samples in (([], 1), (PROMPTS, 0)):
        with pytest.raises(GenerationError, match="both must be 1 or more"):
            sampled_kl(pair, prompts, samples=samples)
