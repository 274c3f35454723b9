"""How the next token is chosen from logits: the likeliest one, or one drawn by temperature, top_p and top_k.

A drawn token is determined by the model's probabilities and one random number per prompt and position, which a
generator of that prompt alone gives. Rounding of the logits depends on the batch, so every choice that is closer than
rounding is reported as a near tie: a completion without near ties is the same in any batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.errors import UserError

NEAR_TIE_UNITS = {torch.float64: 128, torch.float32: 128, torch.float16: 32, torch.bfloat16: 16}
"""By the model's dtype: two logits that differ by at most so many units of rounding (the dtype's eps times the largest
logit) are a near tie. Between one prompt alone and the same prompt in a batch, the difference of two logits changed by
up to 82 units in float32 and 12 in bfloat16, measured on the CPU with the model organism and with random models of all
four architectures."""


class GenerationError(UserError, ValueError):
    """Prompts or options with which no text can be generated."""


@dataclass(frozen=True)
class SamplingParameters:
    """Temperature, top_p and top_k; the defaults are greedy decoding."""

    temperature: float = 0.0
    """0 chooses the likeliest token; otherwise tokens are drawn from the logits divided by this."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set of likeliest tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Tokens are drawn from this many of the likeliest ones; 0 is all tokens."""

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise GenerationError(
                f"Got temperature {self.temperature}, top_p {self.top_p} and top_k {self.top_k}; temperature must be 0 "
                "or more and finite, top_p above 0 and at most 1, and top_k 0 (all tokens) or more."
            )

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        top_k = f", top_k {self.top_k}" if self.top_k else ""
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}{top_k}"


class PromptDraws:
    """Random numbers in [0, 1), one for every prompt and step, from one generator per prompt."""

    STEPS_PER_BLOCK = 256

    def __init__(self, keys: Sequence[object], dtype: torch.dtype, device: torch.device) -> None:
        """Args: keys determine the generators' seeds (`seed_of`); dtype and device are those of the logits."""
        self.generators = [torch.Generator().manual_seed(seed_of(key)) for key in keys]
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.device, self.block = device, -1
        self.numbers = torch.empty(0)

    def at(self, step: int, rows: Sequence[int]) -> Float[Tensor, "batch"]:
        """The numbers of one step for some of the prompts; steps must not decrease."""
        while self.block < step // self.STEPS_PER_BLOCK:
            drawn = [torch.rand(self.STEPS_PER_BLOCK, generator=g, dtype=torch.float64) for g in self.generators]
            below_one = 1 - torch.finfo(self.dtype).eps  # rounding to float32 must not give 1
            self.numbers = torch.stack(drawn).clamp(max=below_one).to(self.dtype).to(self.device)
            self.block += 1
        return self.numbers[rows, step % self.STEPS_PER_BLOCK]


def seed_of(key: object) -> int:
    """The seed, of 63 bits, that the random numbers of a prompt with this key follow from."""
    return int.from_bytes(hashlib.sha256(repr(_in_full(key)).encode()).digest()[:8], "big") >> 1


def _in_full(key: object) -> object:
    """A key with the fields of records in their place: in a terminal different records may look alike."""
    if is_dataclass(key) and not isinstance(key, type):
        return (type(key).__name__, *(_in_full(getattr(key, field.name)) for field in fields(key)))
    return tuple(map(_in_full, key)) if type(key) is tuple else key


def choose_tokens(
    logits: Float[Tensor, "batch d_vocab"],
    sampling: SamplingParameters,
    numbers: Float[Tensor, "batch"] | None = None,
) -> tuple[Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """The next tokens, and which of these choices are near ties.

    Args:
        logits: in the model's dtype, whose rounding is the tolerance.
        sampling: how tokens are chosen.
        numbers: in [0, 1), one per row, where tokens are drawn.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    finite = wide.masked_fill(wide.isinf(), 0)  # the logits of banned words are -inf
    tolerance = NEAR_TIE_UNITS[logits.dtype] * torch.finfo(logits.dtype).eps * finite.abs().amax(-1)
    if sampling.temperature == 0 or numbers is None:
        best = wide.topk(2, -1).values
        return wide.argmax(-1), best[:, 0] - best[:, 1] <= tolerance
    return _drawn_tokens(wide / sampling.temperature, sampling, numbers, tolerance / sampling.temperature)


def _drawn_tokens(
    scaled: Float[Tensor, "batch d_vocab"],
    sampling: SamplingParameters,
    numbers: Float[Tensor, "batch"],
    tolerance: Float[Tensor, "batch"],
) -> tuple[Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """The tokens at which the cumulative probability, in the order of token ids, passes the random number.

    A change of all logits by up to half the tolerance moves a cumulative probability c by at most tolerance c (1 - c),
    and may exchange the last token that top_p or top_k keeps with the first one that they leave out.
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    sorted_probabilities = ordered.softmax(-1)
    before = sorted_probabilities.cumsum(-1) - sorted_probabilities
    kept = before < sampling.top_p if sampling.top_p < 1 else torch.ones_like(before, dtype=torch.bool)
    kept[:, 0] = True
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    probabilities = torch.zeros_like(scaled).scatter(-1, order, sorted_probabilities * kept)
    sums = probabilities.cumsum(-1)
    total = sums[:, -1:]
    threshold = numbers[:, None] * total
    # At most the last token that has any probability, however the product is rounded.
    tokens = torch.minimum((sums <= threshold).sum(-1), (sums < total).sum(-1))
    upper = sums.gather(-1, tokens[:, None]) / total
    lower = upper - probabilities.gather(-1, tokens[:, None]) / total
    number, slack = numbers[:, None], tolerance[:, None]
    uncertain = _uncertain_probability(ordered, sorted_probabilities, before, kept, sampling.top_p, slack) / total
    near_lower = (number - lower <= slack * lower * (1 - lower) + uncertain) & (lower > 0)
    near_upper = (upper - number <= slack * upper * (1 - upper) + uncertain) & (upper < 1)
    return tokens, (near_lower | near_upper)[:, 0]


def _uncertain_probability(
    ordered: Float[Tensor, "batch d_vocab"],
    probabilities: Float[Tensor, "batch d_vocab"],
    before: Float[Tensor, "batch d_vocab"],
    kept: Bool[Tensor, "batch d_vocab"],
    top_p: float,
    slack: Float[Tensor, "batch 1"],
) -> Float[Tensor, "batch 1"]:
    """Probability that rounding may add or remove where top_p or top_k ends; 0 where that end is certain."""
    last = kept.sum(-1, keepdim=True) - 1
    following = (last + 1).clamp(max=kept.shape[-1] - 1)
    at_last, at_following = (probabilities.gather(-1, rank) for rank in (last, following))
    exchangeable = ordered.gather(-1, last) - ordered.gather(-1, following) <= slack
    for rank in (last, following):
        c = before.gather(-1, rank)
        exchangeable |= (c - top_p).abs() <= slack * c * (1 - c)
    return (at_last + at_following) * (exchangeable & (following > last))
