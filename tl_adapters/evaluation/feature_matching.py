"""Which features of two adapter sets are the same? What training found of what was planted, and what two seeds share.

1. Both sets read the target's own stream over evaluation text; a feature is alive if it fired at least 10 times in it
   (so a rate of 1e-4 takes 100,000 tokens);
2. the alive features of a layer are matched one to one: the assignment with the largest sum of activation correlation
   and decoder cosine (Hungarian algorithm);
3. matched features are *the same* if both are above 0.9.

Encoders are reported and not asked: where inputs hardly vary an encoder may be anything. Their cosine under the
inputs' covariance (the correlation of what they read off) says whether they differ where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.data.traces import Trace, batches_by_length, readable_traces
from tl_adapters.errors import UserError
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.models.adapter_checks import adapter_scale
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.html import escape, table, with_interval
from tl_adapters.utils.precision import host_float64, wide
from tl_adapters.utils.share_intervals import share_interval

SAME_FEATURE_THRESHOLD = 0.9
"""Above it, in decoder cosine and activation correlation both, two features are the same."""


class MatchingError(UserError, ValueError):
    """Two sets whose features cannot be compared."""


class Share(NamedTuple):
    """k of n, with the 95 % interval of a share of independent draws (`intervals.share_interval`)."""

    k: int
    n: int

    @property
    def value(self) -> float | None:
        """k / n; None for none of none."""
        return self.k / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return share_interval(self.k, self.n)


@dataclass(frozen=True)
class Match:
    """Two features that were matched; the same feature or not."""

    layer: int
    """Of both."""
    a: int
    """Index in the first set."""
    b: int
    """Index in the second set."""
    correlation: float
    """Of their activations over the tokens (Pearson)."""
    decoder_cosine: float
    """Of their decoder rows."""
    encoder_cosine: float
    """Of their encoder columns, as they read the MLP's input."""
    encoder_cosine_in_covariance: float
    """The same under the inputs' covariance: the correlation of what the two encoders read off."""

    @property
    def same(self) -> bool:
        """One feature, found twice."""
        return self.correlation > SAME_FEATURE_THRESHOLD and self.decoder_cosine > SAME_FEATURE_THRESHOLD


MATCH_STATISTICS = ("correlation", "decoder_cosine", "encoder_cosine", "encoder_cosine_in_covariance")


@dataclass(frozen=True)
class Matching:
    """The alive features of two sets, matched one to one within each layer."""

    matches: tuple[Match, ...]
    """As many as the smaller set has alive features, layer by layer; most are no good where the sets differ."""
    a: dict[FeatureId, float]
    """The first set's alive features, with the share of tokens each fires on."""
    b: dict[FeatureId, float]
    """The second set's."""
    tokens: int
    """Tokens of the evaluation."""

    def shares(self, side: Literal["a", "b"]) -> dict[str, Share]:
        """The share of one set's alive features that are the same as one of the other's: "all", and by firing rate.

        A rate counts to the nearest power of ten: "1e-3" is from 10^-3.5 to 10^-2.5.
        """
        same = {FeatureId(m.layer, getattr(m, side)) for m in self.matches if m.same}
        groups: dict[str, list[FeatureId]] = {"all": list(getattr(self, side))}
        for which, rate in sorted(getattr(self, side).items(), key=lambda item: -item[1]):
            groups.setdefault(f"1e{round(math.log10(rate))}", []).append(which)
        return {name: Share(len(same.intersection(group)), len(group)) for name, group in groups.items()}

    def quantiles(self) -> dict[str, list[float]]:
        """10, 25, 50, 75 and 90 % points of every figure over the matches."""
        if not self.matches:
            return {}
        points = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
        values = {name: torch.tensor([getattr(m, name) for m in self.matches]).double() for name in MATCH_STATISTICS}
        return {name: value.quantile(points).tolist() for name, value in values.items()}

    def _repr_html_(self) -> str:
        rows = [[name, *(f"{v:.2f}" for v in values)] for name, values in self.quantiles().items()]
        return shares_table({"of the first": self.shares("a"), "of the second": self.shares("b")}) + table(
            ["over the matches", "10 %", "25 %", "median", "75 %", "90 %"], rows
        )


def shares_table(columns: dict[str, dict[str, Share]]) -> str:
    """Shares by firing rate as a table, a column per set."""
    names = list(dict.fromkeys(name for shares in columns.values() for name in shares))

    def cell(s: Share) -> str:
        if s.value is None:
            return "-"
        return with_interval(f"{s.value:.0%}", f"{s.interval[0]:.0%} to {s.interval[1]:.0%} of {s.n}")

    rows = [[escape(n), *(cell(s[n]) if n in s else "" for s in columns.values())] for n in names]
    return table(["firing rate", *map(escape, columns)], rows)


@torch.no_grad()
def match_features(
    found: AdapterSet, planted: AdapterSet, pair: PairedModel, traces: Sequence[Trace], *, tokens_per_batch: int = 2048
) -> Matching:
    """Match the alive features of two sets one to one, layer by layer.

    The assignment with the largest sum of activation correlation + decoder cosine (Hungarian algorithm). Both sets
    read the target's stream. Two passes over ``traces``: which features are alive, then sums of products of those, so
    memory is a square of alive features per layer, whatever the number of tokens.

    Args:
        found, planted: two sets for ``pair``, in memory; neither has to be installed.
        pair: gives the target.
        traces: evaluation text.
        tokens_per_batch: of the forward passes.

    Raises MatchingError for sets of other depth or width than the pair's.
    """
    traces = readable_traces(traces, pair.model.cfg)
    ours, theirs = _Reader(pair, found), _Reader(pair, planted)
    moments = _InputMoments(pair)
    for inputs in _target_inputs(pair, traces, tokens_per_batch):
        moments.add(inputs)
        ours.count(inputs)
        theirs.count(inputs)
    sums = {layer: _ProductSums() for layer in ours.keep_alive() & theirs.keep_alive()}
    for inputs in _target_inputs(pair, traces, tokens_per_batch):
        for layer, products in sums.items():
            products.add(ours.alive_acts(layer, inputs[layer]), theirs.alive_acts(layer, inputs[layer]))
    matches = [m for layer in sorted(sums) for m in _match_layer(layer, ours, theirs, sums[layer], moments)]
    return Matching(tuple(matches), ours.rates(moments.n), theirs.rates(moments.n), moments.n)


def seed_agreement(
    pair: PairedModel,
    adapters_a: AdapterSet,
    adapters_b: AdapterSet,
    traces: Sequence[Trace],
    *,
    tokens_per_batch: int = 2048,
) -> Matching:
    """What two trainings of one pair have in common: `match_features` of both; its shares, by set, are the agreement.

    Raises MatchingError where the sets say that they were trained on different pairs.
    """
    ours, theirs = (adapters.metadata.fingerprints for adapters in (adapters_a, adapters_b))
    if differs := differing(ours, theirs):
        raise MatchingError(
            f"The two sets were trained on different pairs: their {' and '.join(differs)} differ. Seeds can be "
            "compared on one pair only."
        )
    return match_features(adapters_a, adapters_b, pair, traces, tokens_per_batch=tokens_per_batch)


def _target_inputs(pair: PairedModel, traces: Sequence[Trace], tokens_per_batch: int) -> Iterator[list[Tensor]]:
    """What every layer's MLP reads on the target's route, at real tokens, batch by batch."""
    for _, batch in batches_by_length(traces, tokens_per_batch):
        batch = batch.to(pair.model.W_E.device)
        with pair.routed("target"), pair.recorded("mlp.hook_in") as read:
            pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
        places = batch.real.nonzero(as_tuple=True)
        yield [read[layer][places] for layer in range(pair.n_layers)]


class _InputMoments:
    """Mean and covariance of what every layer's MLP reads, summed over batches."""

    def __init__(self, pair: PairedModel) -> None:
        zeros = wide(torch.zeros(pair.n_layers, pair.model.cfg.d_model, device=pair.model.W_E.device))
        self.n, self.sums = 0, zeros
        self.products = [torch.diag(row) for row in zeros]
        self.about: list[Tensor] = []
        """Per layer the first batch's mean, subtracted from everything: a large mean would cancel in float32."""

    def add(self, inputs: Sequence[Tensor]) -> None:
        self.n += len(inputs[0])
        self.about = self.about or [wide(x).mean(0) for x in inputs]
        for layer, x in enumerate(inputs):
            moved = wide(x) - self.about[layer]
            self.sums[layer] += moved.sum(0)
            self.products[layer] += moved.T @ moved

    def covariance(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """Of one layer, on the CPU in float64."""
        mean = host_float64(self.sums[layer]) / self.n
        return host_float64(self.products[layer]) / self.n - torch.outer(mean, mean)


class _Reader:
    """One set of the two: its encoders as they read the MLP's input of this pair, and its alive features."""

    def __init__(self, pair: PairedModel, adapters: AdapterSet) -> None:
        if (adapters.n_layers, adapters.d_model) != (pair.n_layers, pair.model.cfg.d_model):
            raise MatchingError(
                f"The set has {adapters.n_layers} layers of width {adapters.d_model}; the pair has {pair.n_layers} of "
                f"width {pair.model.cfg.d_model}."
            )
        self.adapters = adapters.to(pair.model.W_E.device)
        self.scales = {layer: adapter_scale(adapters, pair.backend, layer) for layer in adapters.layer_indices}
        self.firings: dict[int, Tensor] = {}
        self.alive: dict[int, Tensor] = {}

    def acts(self, layer: int, x: Tensor) -> Tensor:
        scale = self.scales[layer]
        return self.adapters[layer].encode(x if scale is None else x * scale)

    def count(self, inputs: Sequence[Tensor]) -> None:
        for layer in self.scales:
            fired = (self.acts(layer, inputs[layer]) > 0).sum(0)
            self.firings[layer] = self.firings[layer] + fired if layer in self.firings else fired

    def keep_alive(self) -> set[int]:
        for layer, firings in self.firings.items():
            index = (firings >= ALIVE_FIRINGS).nonzero()[:, 0]
            if len(index):
                self.alive[layer] = index
        return set(self.alive)

    def alive_acts(self, layer: int, x: Tensor) -> Float[Tensor, "n alive"]:
        return self.acts(layer, x)[:, self.alive[layer]]

    def encoders(self, layer: int) -> Float[Tensor, "d_model alive"]:
        weight, scale = host_float64(self.adapters[layer].W_enc[:, self.alive[layer]]), self.scales[layer]
        return weight if scale is None else weight * host_float64(scale)[:, None]

    def decoders(self, layer: int) -> Float[Tensor, "alive d_model"]:
        return host_float64(self.adapters[layer].W_dec[self.alive[layer]])

    def rates(self, tokens: int) -> dict[FeatureId, float]:
        firings = {layer: self.firings[layer].tolist() for layer in self.alive}
        return {
            FeatureId(layer, i): firings[layer][i] / tokens
            for layer, index in self.alive.items()
            for i in index.tolist()
        }


class _ProductSums:
    """Sums over tokens from which the correlations of two sets of activations follow."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: list[Any] = [0.0] * 5

    def add(self, a: Float[Tensor, "n n_a"], b: Float[Tensor, "n n_b"]) -> None:
        self.n += len(a)
        parts = (a.sum(0), a.square().sum(0), b.sum(0), b.square().sum(0), a.T @ b.to(a.dtype))
        self.sums = [total + wide(part) for total, part in zip(self.sums, parts, strict=True)]

    def correlation(self) -> Float[Tensor, "n_a n_b"]:
        a, aa, b, bb, ab = (host_float64(total) / self.n for total in self.sums)
        spread = torch.outer(aa - a.square(), bb - b.square()).clamp(min=1e-300).sqrt()
        return (ab - torch.outer(a, b)) / spread


def _match_layer(
    layer: int, ours: _Reader, theirs: _Reader, sums: _ProductSums, moments: _InputMoments
) -> Iterator[Match]:
    correlation = sums.correlation()
    decoders = _cosines(ours.decoders(layer), theirs.decoders(layer))
    a, b = (reader.encoders(layer).T for reader in (ours, theirs))
    values, vectors = torch.linalg.eigh(moments.covariance(layer))
    root = vectors * values.clamp(min=0).sqrt()
    figures = torch.stack([correlation, decoders, _cosines(a, b), _cosines(a @ root, b @ root)], -1)
    mine, its = ours.alive[layer].tolist(), theirs.alive[layer].tolist()
    for i, j in one_to_one(correlation + decoders):
        yield Match(layer, mine[i], its[j], *figures[i, j].tolist())


def one_to_one(scores: Float[Tensor, "n_a n_b"]) -> list[tuple[int, int]]:
    """The pairs (row, column), each used at most once, with the largest sum of scores (Hungarian algorithm)."""
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _cosines(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Float[Tensor, "n_a n_b"]:
    a, b = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300) for rows in (a, b))
    return a @ b.T
