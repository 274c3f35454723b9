"""Matching of the features of two adapter sets, such as planted and trained features, or the features of two seeds.

1. Both sets read the target's residual stream over evaluation text. A feature is alive if it is active on at least 10
   tokens of it (a feature with a firing rate of 1e-4 needs 100,000 tokens).
2. The alive features of a layer are matched one to one, by the assignment with the largest sum of activation
   correlation and decoder cosine (Hungarian algorithm).
3. Matched features are *the same* if both are above 0.9.

The cosine of the encoders is reported but is not a criterion, since an encoder is arbitrary in directions in which the
inputs hardly vary. The cosine under the inputs' covariance (the correlation of the pre-activations) shows whether
encoders differ in directions that matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import unit_rows
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.data.traces import Trace, batches_by_length, readable_traces
from tl_adapters.errors import UserError
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.models.adapter_checks import adapter_scale
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.html import Cell
from tl_adapters.utils.notebook import rows_frame, tables_view
from tl_adapters.utils.precision import host_float64, wide
from tl_adapters.utils.share_intervals import share_interval

if TYPE_CHECKING:
    from pandas import DataFrame

SAME_FEATURE_THRESHOLD = 0.9
"""Two features are the same if both their decoder cosine and their activation correlation are above this."""


class MatchingError(UserError, ValueError):
    """Two adapter sets whose features cannot be compared."""


class Share(NamedTuple):
    """A share k / n, with its 95 % interval for independent draws (`confidence_intervals.share_interval`)."""

    k: int
    n: int

    @property
    def value(self) -> float | None:
        """k / n; None if n is 0."""
        return self.k / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        return share_interval(self.k, self.n)


@dataclass(frozen=True)
class Match:
    """Two matched features, which may or may not be the same feature."""

    layer: int
    """Layer of both features."""
    a: int
    """Index of the feature in the first set."""
    b: int
    """Index of the feature in the second set."""
    correlation: float
    """Pearson correlation of their activations over the tokens."""
    decoder_cosine: float
    """Cosine of their decoder rows."""
    encoder_cosine: float
    """Cosine of their encoder columns, as they read the MLP's input."""
    encoder_cosine_in_covariance: float
    """Cosine under the inputs' covariance, which is the correlation of the two pre-activations."""

    @property
    def same(self) -> bool:
        """Whether the two are the same feature, by both criteria."""
        return self.correlation > SAME_FEATURE_THRESHOLD and self.decoder_cosine > SAME_FEATURE_THRESHOLD


MATCH_STATISTICS = ("correlation", "decoder_cosine", "encoder_cosine", "encoder_cosine_in_covariance")
"""The statistics of a `Match`."""


@dataclass(frozen=True)
class Matching:
    """The alive features of two sets, matched one to one within each layer."""

    matches: tuple[Match, ...]
    """Matches by layer, as many as the set with fewer alive features has; if the sets differ, most are not the same."""
    a: dict[FeatureId, float]
    """Alive features of the first set, with the share of tokens on which each is active."""
    b: dict[FeatureId, float]
    """The same for the second set."""
    tokens: int
    """Number of tokens of the evaluation text."""

    def shares(self, side: Literal["a", "b"]) -> dict[str, Share]:
        """The share of one set's alive features that are the same as a feature of the other: "all", and by firing rate.

        Rates are rounded to the nearest power of ten (`rate_decade`).
        """
        same = {FeatureId(m.layer, getattr(m, side)) for m in self.matches if m.same}
        groups: dict[str, list[FeatureId]] = {"all": list(getattr(self, side))}
        for feature, rate in sorted(getattr(self, side).items(), key=lambda item: -item[1]):
            groups.setdefault(rate_decade(rate), []).append(feature)
        return {name: Share(len(same.intersection(group)), len(group)) for name, group in groups.items()}

    def quantiles(self) -> dict[str, list[float]]:
        """The 10, 25, 50, 75 and 90 % quantiles of every match statistic."""
        if not self.matches:
            return {}
        levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
        values = {name: torch.tensor([getattr(m, name) for m in self.matches]).double() for name in MATCH_STATISTICS}
        return {name: value.quantile(levels).tolist() for name, value in values.items()}

    def __repr__(self) -> str:
        (a, b), same = (len(self.a), len(self.b)), sum(match.same for match in self.matches)
        return f"Matching of {a:,} and {b:,} alive features over {self.tokens:,} tokens: {same:,} are the same"

    def to_dict(self) -> dict[str, Any]:
        """The shares of both sets that are the same, by firing rate, and quantiles of the match statistics."""
        shares = {side: {rate: s._asdict() for rate, s in self.shares(side).items()} for side in ("a", "b")}
        return {"shares": shares, "quantiles": self.quantiles(), "tokens": self.tokens}

    def to_pandas(self) -> DataFrame:
        """The matches as a DataFrame: the fields of `Match`, and whether the two are the same feature."""
        names = [field.name for field in fields(Match)]
        return rows_frame([{**asdict(match), "same": match.same} for match in self.matches], [*names, "same"])

    def _repr_html_(self) -> str:
        rows = [[name, *(f"{v:.2f}" for v in values)] for name, values in self.quantiles().items()]
        shares = shares_table({"of the first": self.shares("a"), "of the second": self.shares("b")})
        header = ["over the matches", "10 %", "25 %", "median", "75 %", "90 %"]
        return tables_view(shares, (header, rows))


def rate_decade(rate: float) -> str:
    """The nearest power of ten of a firing rate, such as "1e-3" for rates from 10^-3.5 to 10^-2.5."""
    return f"1e{round(math.log10(rate))}"


def shares_table(columns: dict[str, dict[str, Share]]) -> tuple[list[str], list[list[str | Cell]]]:
    """The header and rows of a table of shares by firing rate, with one column per set."""
    names = list(dict.fromkeys(name for shares in columns.values() for name in shares))

    def cell(s: Share) -> Cell:
        if s.value is None:
            return Cell("-")
        return Cell(f"{s.value:.0%}", f"{s.interval[0]:.0%} to {s.interval[1]:.0%} of {s.n}")

    rows: list[list[str | Cell]] = [[n, *(cell(s[n]) if n in s else "" for s in columns.values())] for n in names]
    return ["firing rate", *columns], rows


@torch.no_grad()
def match_features(
    adapters_a: AdapterSet,
    adapters_b: AdapterSet,
    pair: PairedModel,
    traces: Sequence[Trace],
    *,
    tokens_per_batch: int = 2048,
) -> Matching:
    """Match the alive features of two sets one to one, layer by layer.

    The assignment has the largest sum of activation correlation + decoder cosine (Hungarian algorithm). Both sets read
    the target's residual stream. There are two passes over ``traces``: the first finds the alive features, the second
    sums products of their activations. Memory is the square of the alive features per layer, for any number of tokens.

    Args:
        adapters_a, adapters_b: two adapter sets for ``pair``; neither needs to be installed.
        pair: the pair whose target is read.
        traces: evaluation text.
        tokens_per_batch: tokens of a forward pass.

    Raises:
        MatchingError: a set has another number of layers or another width than the pair.
    """
    traces = readable_traces(traces, pair.model.cfg)
    encoders_a, encoders_b = SetEncoders(pair, adapters_a), SetEncoders(pair, adapters_b)
    moments, firings_a, firings_b = _InputMoments(pair), _Firings(encoders_a), _Firings(encoders_b)
    for inputs in target_inputs(pair, traces, tokens_per_batch):
        moments.add(inputs)
        firings_a.add(inputs)
        firings_b.add(inputs)
    set_a, set_b = _AliveFeatures(encoders_a, firings_a), _AliveFeatures(encoders_b, firings_b)
    sums = {layer: _ProductSums() for layer in set_a.indices.keys() & set_b.indices.keys()}
    for inputs in target_inputs(pair, traces, tokens_per_batch):
        for layer, products in sums.items():
            products.add(set_a.acts(layer, inputs[layer]), set_b.acts(layer, inputs[layer]))
    matches = [m for layer in sorted(sums) for m in _match_layer(layer, set_a, set_b, sums[layer], moments)]
    return Matching(tuple(matches), set_a.rates(moments.n), set_b.rates(moments.n), moments.n)


def seed_agreement(
    pair: PairedModel,
    adapters_a: AdapterSet,
    adapters_b: AdapterSet,
    traces: Sequence[Trace],
    *,
    tokens_per_batch: int = 2048,
) -> Matching:
    """The features that two training runs on one pair have in common.

    The agreement is `Matching.shares` of either set; see `match_features` for the arguments.

    Raises:
        MatchingError: the sets were trained on different pairs, by weight fingerprint, or have other shapes.
        ArgumentError, DataError: ``traces`` holds something else than traces, or one that the model cannot read.
        PairMismatchError: what a set reads cannot be computed in the pair's target.
    """
    if differs := differing(adapters_a.metadata.fingerprints, adapters_b.metadata.fingerprints):
        raise MatchingError(
            f"The two sets were trained on different pairs: their {' and '.join(differs)} differ. Give two sets that "
            "were trained on one pair."
        )
    return match_features(adapters_a, adapters_b, pair, traces, tokens_per_batch=tokens_per_batch)


@torch.no_grad()
def target_inputs(
    pair: PairedModel, traces: Sequence[Trace], tokens_per_batch: int = 2048
) -> Iterator[list[Float[Tensor, "n d_model"]]]:
    """The MLP inputs of every layer on the target route, without padding, batch by batch."""
    for _, batch in batches_by_length(traces, tokens_per_batch):
        batch = batch.to(pair.device)
        with pair.routed("target"), pair.recorded("mlp.hook_in") as inputs:
            pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
        at_tokens = batch.real.nonzero(as_tuple=True)
        yield [inputs[layer][at_tokens] for layer in range(pair.n_layers)]


class _InputMoments:
    """Mean and covariance of the MLP inputs of every layer, accumulated over batches."""

    def __init__(self, pair: PairedModel) -> None:
        zeros = wide(torch.zeros(pair.n_layers, pair.model.cfg.d_model, device=pair.device))
        self.n, self.sums = 0, zeros
        self.products = [torch.diag(row) for row in zeros]
        self.origin: list[Tensor] = []
        """The mean of the first batch per layer, which is subtracted first: a large mean would cancel in float32."""

    def add(self, inputs: Sequence[Tensor]) -> None:
        self.n += len(inputs[0])
        self.origin = self.origin or [wide(x).mean(0) for x in inputs]
        for layer, x in enumerate(inputs):
            shifted = wide(x) - self.origin[layer]
            self.sums[layer] += shifted.sum(0)
            self.products[layer] += shifted.T @ shifted

    def covariance(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """The covariance at one layer, on the CPU in float64."""
        mean = host_float64(self.sums[layer]) / self.n
        return host_float64(self.products[layer]) / self.n - torch.outer(mean, mean)


class SetEncoders:
    """The encoders of an adapter set, reading the pair's MLP inputs. Raises MatchingError for other shapes."""

    def __init__(self, pair: PairedModel, adapters: AdapterSet) -> None:
        if (adapters.n_layers, adapters.d_model) != (pair.n_layers, pair.model.cfg.d_model):
            raise MatchingError(
                f"The set has {adapters.n_layers} layers of width {adapters.d_model}; the pair has {pair.n_layers} of "
                f"width {pair.model.cfg.d_model}."
            )
        self.adapters = adapters.to(pair.device)
        self.scales = {layer: adapter_scale(adapters, pair.backend, layer) for layer in adapters.layer_indices}

    def acts(self, layer: int, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n n_features"]:
        """Activations at what the layer's MLP reads."""
        scale = self.scales[layer]
        return self.adapters[layer].encode(x if scale is None else x * scale)


class _Firings:
    """The number of tokens at which each feature of a set is active, accumulated over batches."""

    def __init__(self, encoders: SetEncoders) -> None:
        self.encoders = encoders
        self.by_layer: dict[int, Tensor] = {}

    def add(self, inputs: Sequence[Tensor]) -> None:
        for layer in self.encoders.scales:
            firings = (self.encoders.acts(layer, inputs[layer]) > 0).sum(0)
            self.by_layer[layer] = self.by_layer[layer] + firings if layer in self.by_layer else firings


class _AliveFeatures:
    """The alive features of a set: their indices by layer, activations, encoders, decoders and firing rates."""

    def __init__(self, encoders: SetEncoders, firings: _Firings) -> None:
        self.encoders, self.firings = encoders, firings.by_layer
        alive = {layer: (count >= ALIVE_FIRINGS).nonzero()[:, 0] for layer, count in self.firings.items()}
        self.indices = {layer: index for layer, index in alive.items() if len(index)}

    def acts(self, layer: int, x: Tensor) -> Float[Tensor, "n alive"]:
        return self.encoders.acts(layer, x)[:, self.indices[layer]]

    def encoder_columns(self, layer: int) -> Float[Tensor, "d_model alive"]:
        weight = host_float64(self.encoders.adapters[layer].W_enc[:, self.indices[layer]])
        scale = self.encoders.scales[layer]
        return weight if scale is None else weight * host_float64(scale)[:, None]

    def decoder_rows(self, layer: int) -> Float[Tensor, "alive d_model"]:
        return host_float64(self.encoders.adapters[layer].W_dec[self.indices[layer]])

    def rates(self, tokens: int) -> dict[FeatureId, float]:
        firings = {layer: self.firings[layer].tolist() for layer in self.indices}
        return {
            FeatureId(layer, i): firings[layer][i] / tokens
            for layer, index in self.indices.items()
            for i in index.tolist()
        }


class _ProductSums:
    """Sums over tokens from which the correlations between the activations of two sets are computed."""

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
    layer: int, set_a: _AliveFeatures, set_b: _AliveFeatures, sums: _ProductSums, moments: _InputMoments
) -> Iterator[Match]:
    """The matches of one layer."""
    correlation = sums.correlation()
    decoders = _cosines(set_a.decoder_rows(layer), set_b.decoder_rows(layer))
    a, b = (alive.encoder_columns(layer).T for alive in (set_a, set_b))
    values, vectors = torch.linalg.eigh(moments.covariance(layer))
    root = vectors * values.clamp(min=0).sqrt()
    statistics = torch.stack([correlation, decoders, _cosines(a, b), _cosines(a @ root, b @ root)], -1)
    indices_a, indices_b = set_a.indices[layer].tolist(), set_b.indices[layer].tolist()
    for i, j in one_to_one(correlation + decoders):
        yield Match(layer, indices_a[i], indices_b[j], *statistics[i, j].tolist())


def one_to_one(scores: Float[Tensor, "n_a n_b"]) -> list[tuple[int, int]]:
    """Pairs (row, column) with the largest sum of scores, each row and column at most once (Hungarian algorithm)."""
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _cosines(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Float[Tensor, "n_a n_b"]:
    """The cosine of every row of ``a`` with every row of ``b``."""
    return unit_rows(a) @ unit_rows(b).T
