"""KL(target || replacement) over long texts, from the probabilities of sampled tokens alone.

Exact KL compares two whole distributions at every position (`faithfulness`), so both models' logits over the vocabulary
are formed together. Over texts that the target itself samples at temperature 1, the mean of log p_target(token) -
log p_replacement(token) has the same expectation: by the chain rule the KL of two distributions over texts is the sum
over positions of the KL of the next token, averaged over texts of the target. Each model then runs by itself, and only
one number per token is kept. Single differences may be negative, and only their mean estimates a KL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.finite_weights import NotFiniteError
from tl_adapters.data.traces import Batch, batches_by_length
from tl_adapters.generation.completions import complete
from tl_adapters.generation.sampling import GenerationError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.notebook import ResultRecord
from tl_adapters.utils.precision import host_float64, wide


@dataclass(frozen=True)
class SampledKL(ResultRecord):
    """An estimate of KL(target || model) from texts sampled from the target."""

    value: float
    """Nats per generated token, end tokens included."""
    standard_error: float
    """Standard error of the value, with texts as independent draws; infinite for a single text."""
    n_texts: int
    """Number of texts."""
    n_tokens: int
    """Number of generated tokens."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; the standard error of a single text is None."""
        known = math.isfinite(self.standard_error)
        return {**super().to_dict(), "standard_error": self.standard_error if known else None}


def sampled_kl(
    pair: PairedModel,
    prompts: Sequence[Sequence[int]],
    *,
    route: str = "replacement",
    samples: int = 1,
    max_new_tokens: int | None = None,
    stop_at: Sequence[int] | None = None,
    batch_size: int | None = None,
    tokens_per_batch: int = 2048,
    seed: int = 0,
) -> SampledKL:
    """KL(target || the pair on ``route``) in nats per token, over texts that the target writes after ``prompts``.

    Args:
        pair: a pair, with adapters where the route needs them.
        prompts: token ids. They are read, and only what the target writes after them is compared.
        route: the route that is compared with the target.
        samples: number of texts per prompt; each has random numbers of its own, which follow from ``seed``, the index
            of the prompt and that of the sample, and not from the batch.
        max_new_tokens: limit of a text in tokens; None is the model's own (`default_max_new_tokens`).
        stop_at: ids of the tokens that end a text; None is the model's own (`end_tokens`).
        batch_size: texts that are generated together; None as in `complete`.
        tokens_per_batch: tokens of a forward pass over the finished texts, padding included.
        seed: of the random numbers.

    Raises:
        GenerationError: no prompts, ``samples`` below 1, or what `complete` refuses.
        ArgumentError: a prompt is not a sequence of token ids of the model's vocabulary.
        NotFiniteError: a difference of log-probabilities is NaN or infinite.
        PairMismatchError: the route needs adapters or a base that the pair lacks.
    """
    if not prompts or samples < 1:
        raise GenerationError(f"Got {len(prompts)} prompts and samples={samples}; both must be 1 or more.")
    with pair.routed(route):  # a route that the pair lacks ends the call before anything is generated
        pass
    drawn = [(prompt, (seed, i, sample)) for i, prompt in enumerate(prompts) for sample in range(samples)]
    with pair.routed("target") as model:
        completions = complete(
            model,
            [prompt for prompt, _ in drawn],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            keys=[key for _, key in drawn],
            stop_at=stop_at,
        )
    differences, counts = [], []
    for _, batch in batches_by_length([completion.trace for completion in completions], tokens_per_batch):
        batch = batch.to(pair.device)
        by_route = [_log_probabilities(pair, batch, each) for each in ("target", route)]
        differences.append(host_float64((by_route[0] - by_route[1]).sum(1)))
        counts.append(host_float64(batch.predicting_response.sum(1)))
    return _estimate(torch.cat(differences), torch.cat(counts))


@torch.no_grad()
def _log_probabilities(pair: PairedModel, batch: Batch, route: str) -> Float[Tensor, "batch pos"]:
    """Log-probability of the next token where it belongs to the response, and 0 elsewhere."""
    at = batch.predicting_response.nonzero(as_tuple=True)
    following = batch.tokens[at[0], at[1] + 1]
    with pair.routed(route):
        resid = pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)[at]
        chosen = [
            wide(pair.unembed(rows)).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            for rows, tokens in zip(resid.split(pair.rows_at_once), following.split(pair.rows_at_once), strict=True)
        ]
    found = torch.cat(chosen)
    return found.new_zeros(batch.tokens.shape).index_put_(at, found)


def _estimate(differences: Float[Tensor, "n"], counts: Float[Tensor, "n"]) -> SampledKL:
    """The sum of differences over the number of tokens, and the standard error of this ratio of sums over texts."""
    n, tokens = len(counts), float(counts.sum())
    value = float(differences.sum()) / tokens
    if not math.isfinite(value):
        raise NotFiniteError("A sampled token has no finite log-probability; check the weights of model and adapters.")
    squares = float((differences - value * counts).square().sum())
    error = math.sqrt(squares * n / (n - 1)) / tokens if n > 1 else math.inf
    return SampledKL(value, error, n, int(tokens))
