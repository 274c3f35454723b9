"""Planted features: features with a known meaning, made for a base model and active at chosen rates.

Added to the base's MLPs (`PairedModel.plant`) they make a target whose difference from the base is known. How many of
them training recovers is measured by `planted_recovery.planted_test`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.checkpoints.model_reference import ModelReference
from tl_adapters.data.traces import Batch, Trace, batches_by_length, readable_traces
from tl_adapters.errors import UserError
from tl_adapters.evaluation.baselines import corrected
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.notebook import RecordTable, ResultRecord
from tl_adapters.utils.precision import host_float64, wide

if TYPE_CHECKING:
    from pandas import DataFrame

FIRING_RATES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
"""The default shares of tokens on which planted features are active."""
WHITENED_VARIANCE = 0.99
"""Share of the inputs' variance in the directions that planted encoders read; the other directions are left out."""
SMALLEST_SCORE_GAP = 1e-5
"""Smallest gap between two scores, in standard deviations, that is not a rounding error of equal inputs."""
MAX_TEXT_TOKENS = 3
"""Number of tokens of the longest text on which a planted feature is active."""
CANDIDATE_TEXTS = 8
"""Number of candidate texts of each length for a text feature, of which the purest is used."""

Kind = Literal["text", "direction"]


class PlantingError(UserError, ValueError):
    """Rates, options or text with which features cannot be planted."""


@dataclass(frozen=True)
class PlantedFeature(ResultRecord):
    """One planted feature, with its meaning and firing rate."""

    feature: FeatureId
    """Its layer and index in the planted set."""
    kind: Kind
    """ "text": it is active on given tokens; "direction": it reads a random direction of the MLP input."""
    rate_asked: float
    """Share of tokens on which it should be active."""
    rate: float
    """Share of the calibration tokens on which it is active."""
    tokens: tuple[int, ...] = ()
    """For a text: its tokens. The feature should be active on the last one."""
    purity: float | None = None
    """For a text: the share of the active tokens that are the end of the text."""


@dataclass(frozen=True)
class PlantedSet(ResultRecord):
    """Planted features, as adapters and as records."""

    adapters: AdapterSet
    """The features as an adapter set, for `PairedModel.plant`."""
    features: tuple[PlantedFeature, ...]
    """One record per feature, by layer and index."""

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in Counter(one.kind for one in self.features).items())
        return f"PlantedSet of {len(self.features):,} features: {kinds}"

    def to_dict(self) -> dict[str, Any]:
        """The records of the features as JSON values, without the adapters."""
        return {"features": [one.to_dict() for one in self.features]}

    def to_pandas(self) -> DataFrame:
        """A DataFrame with a row for each feature."""
        return RecordTable(self.features).to_pandas()

    def _repr_html_(self) -> str:
        return RecordTable(self.features)._repr_html_()


class _Inputs:
    """The MLP inputs of one layer at the calibration tokens, and their whitened coordinates (variance 1)."""

    def __init__(self, x: Float[Tensor, "n d_model"]) -> None:
        self.x = x
        self.mean = sum((wide(part).sum(0) for part in x.split(2**14)), torch.zeros_like(wide(x[0]))) / len(x)
        moment = sum(((p := wide(part) - self.mean).T @ p for part in x.split(2**14)), torch.zeros(()).to(self.mean))
        values, vectors = torch.linalg.eigh(host_float64(moment) / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        rank = int((values.cumsum(0) < WHITENED_VARIANCE * values.sum()).sum()) + 1
        self.whiten = (vectors[:, :rank] / values[:rank].sqrt()).to(self.mean)

    def encoder_of(self, direction: Float[Tensor, "k"]) -> Float[Tensor, "d_model"]:
        """The encoder of a direction in whitened coordinates; its scores have variance 1."""
        return self.whiten @ (direction / direction.norm())

    def discriminant(self, tokens: Bool[Tensor, "n"]) -> Float[Tensor, "d_model"]:
        """The encoder that best separates the given tokens from the others (Fisher's discriminant)."""
        return self.encoder_of((wide(self.x[tokens]).mean(0) - self.mean) @ self.whiten)

    def scores(self, encoder: Float[Tensor, "d_model"]) -> Float[Tensor, "n"]:
        """The inner product of an encoder with every input, with mean 0."""
        return self.x @ encoder.to(self.x.dtype) - float(self.mean @ encoder)


class _Candidate(NamedTuple):
    """An encoder and threshold for a planted feature, with its activations at the calibration tokens."""

    encoder: Tensor
    threshold: float
    activations: Tensor
    tokens: tuple[int, ...] = ()
    purity: float | None = None


@torch.no_grad()
def plant_features(
    base: ModelReference | PairedModel,
    traces: Sequence[Trace],
    *,
    per_layer: int = 20,
    rates: Sequence[float] = FIRING_RATES,
    strength: float = 0.5,
    seed: int = 0,
    tokens_per_batch: int = 2048,
) -> PlantedSet:
    """Features with a known meaning for every layer of a base, active at known rates.

    They are made layer by layer, on the base with the features of the earlier layers in place (the target's stream):

    * a *text* feature is active on a token, or on two or three in a row, of about the given rate. Its encoder is
      Fisher's discriminant of these tokens; of several such texts the one that it separates most purely is used.
    * a *direction* feature reads a random direction of the whitened input.
    * the bias is in a gap between scores, such that the given share of the tokens, within 10 %, is above it.
    * the decoder is a random direction. Its norm makes the feature's contribution, where it is active, ``strength``
      times as long as the base MLP's output at that layer (root mean squares of both).

    Args:
        base: a model reference as in `PairedModel.plant`, or a pair, whose hybrid is the base.
        traces: calibration text, with at least 10 tokens per firing of the rarest feature. The inputs and residual
            streams of all tokens are kept in memory; a few hundred thousand tokens are enough.
        per_layer: features per layer, alternating between texts and directions.
        rates: shares of tokens, used in turn, each for a text and a direction. Any sequence is possible, such as
            ``sae_lens.synthetic.ZipfianFiringProbabilityConfig(...).generate(10).tolist()``.
        strength: see above. With 20 features of strength 0.5 per layer on the built-in base, KL(target || hybrid) is
            about 0.4 nats; that of the model organism is 0.6.
        seed: seed of directions, texts and decoders.
        tokens_per_batch: tokens of a forward pass.

    Raises:
        PlantingError: features cannot be planted with these rates or this text.
        ArgumentError, DataError: something else than traces, or a document that the model cannot read.
        UserError: whatever `PairedModel.from_pretrained` raises.
    """
    _check_rates(per_layer, rates, sum(len(trace.tokens) for trace in traces))
    pair = base if isinstance(base, PairedModel) else PairedModel.from_pretrained(base, base)
    device = pair.device
    generator = torch.Generator().manual_seed(seed)
    layers, planted = _empty_set(pair, per_layer)
    batches = [
        batch.to(device) for _, batch in batches_by_length(readable_traces(traces, pair.model.cfg), tokens_per_batch)
    ]
    texts = _texts(batches, pair.model.cfg.d_vocab)
    feature_rates = [rates[index // 2 % len(rates)] for index in range(per_layer)]
    records: list[PlantedFeature] = []
    streams = [pair.embed(batch.tokens) for batch in batches]
    for layer in range(pair.n_layers):
        with corrected(pair, layers):  # the hybrid with the features so far; those of this layer are still zero
            x = torch.cat([_mlp_input(pair, r, b, layer) for r, b in zip(streams, batches, strict=True)])
            norm = strength * _output_size(pair, layer, x)
            records += _plant_layer(
                layers[layer], layer, _Inputs(x), feature_rates, norm, texts, generator, pair.model.cfg.d_vocab
            )
            streams = [pair.run_blocks(resid, layer, layer + 1) for resid in streams]
    return PlantedSet(planted, tuple(records))


def _check_rates(per_layer: int, rates: Sequence[float], n_tokens: int) -> None:
    """Raises PlantingError for rates out of range, or too few tokens for the lowest one."""
    if per_layer < 1 or not rates or not all(0 < rate < 0.5 for rate in rates):
        raise PlantingError(f"per_layer is {per_layer} and rates {list(rates)}; give 1 or more, and rates below 0.5.")
    if n_tokens * min(rates) < ALIVE_FIRINGS:
        raise PlantingError(
            f"At a rate of {min(rates):g} a feature fires {n_tokens * min(rates):.1f} times in {n_tokens:,} tokens; "
            f"give {math.ceil(ALIVE_FIRINGS / min(rates)):,} tokens of text, or higher rates."
        )


def _empty_set(pair: PairedModel, per_layer: int) -> tuple[list[TranscoderAdapter], AdapterSet]:
    """Adapters without a contribution, as a list and as a set for the pair's base."""
    cfg = pair.model.cfg
    dtype = torch.promote_types(cfg.dtype, torch.float32)
    layers = [TranscoderAdapter(cfg.d_model, per_layer, dtype=dtype, device=pair.device) for _ in range(cfg.n_layers)]
    about = AdapterMetadata(base=pair.base_id, target=pair.base_id)
    return layers, AdapterSet(layers, pair.layer_samples, about, samples=pair.samples).requires_grad_(False)


def _plant_layer(
    adapter: TranscoderAdapter,
    layer: int,
    inputs: _Inputs,
    rates: Sequence[float],
    norm: float,
    texts: Sequence[Int[Tensor, "n"]],
    generator: torch.Generator,
    d_vocab: int,
) -> list[PlantedFeature]:
    """Write the features of one layer into ``adapter``, one per rate; returns their records."""
    records: list[PlantedFeature] = []
    used: set[tuple[int, ...]] = set()
    for index, rate in enumerate(rates):
        kind: Kind = "direction" if index % 2 else "text"
        if kind == "direction":
            candidate = _direction_feature(inputs, rate, generator)
        else:
            candidate = _text_feature(inputs, rate, texts, used, d_vocab, generator)
        used.add(candidate.tokens)
        _write(adapter, index, candidate, inputs.mean, norm, generator)
        firing_rate = int((candidate.activations > 0).sum()) / len(candidate.activations)
        feature = FeatureId(layer, index)
        records.append(PlantedFeature(feature, kind, rate, firing_rate, candidate.tokens, candidate.purity))
    return records


def _mlp_input(pair: PairedModel, resid: Tensor, batch: Batch, layer: int) -> Float[Tensor, "n d_model"]:
    """The MLP input of a layer at the tokens of a batch, without padding."""
    with pair.recorded("mlp.hook_in") as inputs:
        pair.run_blocks(resid, layer, layer + 1)
    return inputs[layer][batch.real]


def _output_size(pair: PairedModel, layer: int, x: Tensor) -> float:
    """The root mean square of the norm of the base MLP's output."""
    _, base = pair.mlps[layer].weights()
    sums = torch.stack([wide(base.neurons(part) @ base.W_out).square().sum() for part in x.split(2**14)])
    return math.sqrt(float(host_float64(sums).sum()) / len(x))


def _texts(batches: Sequence[Batch], d_vocab: int) -> list[Int[Tensor, "n"]]:
    """For each length from 1: the text that ends at each token, as a number in base d_vocab; -1 if there is none."""
    texts = []
    for length in range(1, MAX_TEXT_TOKENS + 1):
        parts = []
        for batch in batches:
            number = torch.zeros_like(batch.tokens)
            for back in range(length):
                number[:, back:] += batch.tokens[:, : number.shape[1] - back] * d_vocab**back
            number[:, : length - 1] = -1
            parts.append(number[batch.real])
        texts.append(torch.cat(parts))
    return texts


def _text_feature(
    inputs: _Inputs,
    rate: float,
    texts: Sequence[Int[Tensor, "n"]],
    used: set[tuple[int, ...]],
    d_vocab: int,
    generator: torch.Generator,
) -> _Candidate:
    """The feature of a text: of texts with one to two times the given rate, the one with the highest purity."""
    best = None
    for length, ends in enumerate(texts, 1):
        numbers, counts = ends[ends >= 0].unique(return_counts=True)
        share = counts / len(ends)
        frequent = numbers[(share >= rate) & (share <= 2 * rate)].cpu()
        for number in frequent[torch.randperm(len(frequent), generator=generator)[:CANDIDATE_TEXTS]].tolist():
            tokens = tuple(number // d_vocab**back % d_vocab for back in reversed(range(length)))
            at_text = ends == number
            encoder = inputs.discriminant(at_text)
            threshold = None if tokens in used else threshold_at_rate(inputs.scores(encoder), rate)
            if threshold is not None:
                fires = threshold[1] > 0
                purity = int((at_text & fires).sum()) / int(fires.sum())
                if best is None or purity > (best.purity or 0):
                    best = _Candidate(encoder, *threshold, tokens, purity)
    if best is None:
        raise PlantingError(
            f"No unused text of up to {MAX_TEXT_TOKENS} tokens is about as frequent as {rate:g} and can be separated "
            "from others at this layer. Give more traces, other rates, or fewer features per layer."
        )
    return best


def _direction_feature(inputs: _Inputs, rate: float, generator: torch.Generator) -> _Candidate:
    """The feature of a random direction whose scores have a gap at the given rate."""
    for _ in range(10 * CANDIDATE_TEXTS):
        direction = torch.randn(inputs.whiten.shape[1], generator=generator, dtype=torch.float64)
        encoder = inputs.encoder_of(direction.to(inputs.whiten))
        if (threshold := threshold_at_rate(inputs.scores(encoder), rate)) is not None:
            return _Candidate(encoder, *threshold)
    raise PlantingError(f"No direction fires on a share of {rate:g} of these tokens; give more varied traces.")


def threshold_at_rate(scores: Float[Tensor, "n"], rate: float) -> tuple[float, Float[Tensor, "n"]] | None:
    """A threshold exceeded by a share ``rate`` of the scores, and the activations above it.

    The threshold is in the widest gap within 10 % of the rate, so that it never separates equal inputs (such as the
    beginnings of documents). None if there is no gap.
    """
    k = max(1, round(rate * len(scores)))
    first, last = round(0.9 * k), round(1.1 * k)
    top = scores.topk(last + 1).values
    gaps = top[first - 1 : last] - top[first : last + 1]
    n_above = first + int(gaps.argmax())
    if gaps.max() < SMALLEST_SCORE_GAP:
        return None
    threshold = float(top[n_above - 1] + top[n_above]) / 2
    return threshold, torch.relu(scores - threshold)


def _write(
    adapter: TranscoderAdapter, index: int, feature: _Candidate, mean: Tensor, norm: float, generator: torch.Generator
) -> None:
    """Write the weights of one feature; ``norm`` is the root mean square of its contribution where it is active."""
    firing = feature.activations[feature.activations > 0]
    direction = torch.randn(len(mean), generator=generator, dtype=torch.float64).to(mean)
    adapter.W_enc[:, index] = feature.encoder.to(adapter.W_enc.dtype)
    adapter.b_enc[index] = -float(mean @ feature.encoder) - feature.threshold
    adapter.W_dec[index] = (direction / direction.norm() * norm / firing.square().mean().sqrt()).to(adapter.W_dec.dtype)
