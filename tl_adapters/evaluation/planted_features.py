"""When can adapters be trusted? A test with a known answer.

1. Known features P are made for a base model, layer by layer, and calibrated on data so that they fire at chosen rates
   (`plant_features`);
2. the target is the base with P added to its MLPs (`PairedModel.plant`): what training changed is now known;
3. adapters are trained on that pair like on any other;
4. found and planted features are matched one to one (`matching`). Precision: the share of the adapters' alive features
   that are planted ones; recall: the share of the planted ones that were found, by firing rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterMetadata, AdapterSet, TranscoderAdapter
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.base_mlps import ModelReference
from tl_adapters.config import TrainingConfig
from tl_adapters.data.traces import Batch, Trace, batches_by_length, readable_traces
from tl_adapters.errors import UserError
from tl_adapters.evaluation.baselines import corrected
from tl_adapters.evaluation.faithfulness import faithfulness_block, measure_faithfulness
from tl_adapters.evaluation.feature_matching import Matching, Share, match_features, shares_table
from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.trainer import train
from tl_adapters.utils.html import figure_cell, table
from tl_adapters.utils.precision import host_float64, wide
from tl_adapters.utils.results import plain

FIRING_RATES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
WHITENED_VARIANCE = 0.99
"""Share of the inputs' variance that planted encoders read; the directions below it hold next to nothing."""
SMALLEST_SCORE_GAP = 1e-5
"""Between two scores, in standard deviations; equal inputs score equal but for rounding."""
MAX_TEXT_TOKENS = 3
"""Tokens of the longest text that a planted feature may stand for."""
CANDIDATE_TEXTS = 8
"""Candidates of each length that are looked at for a feature of a text; the purest is taken."""

Kind = Literal["text", "direction"]


class PlantingError(UserError, ValueError):
    """Features cannot be planted with what was given."""


@dataclass(frozen=True)
class PlantedFeature:
    """What is known of one planted feature."""

    feature: FeatureId
    """Its layer and index in the planted set."""
    kind: Kind
    """ "text": it stands for given tokens; "direction": for a random direction of the input."""
    rate_asked: float
    """Share of tokens it should fire on."""
    rate: float
    """Share of the calibration tokens it fires on."""
    tokens: tuple[int, ...] = ()
    """Of a text: the tokens up to and with the one it should fire on."""
    purity: float | None = None
    """Of a text: the share of its firings that are on it."""


@dataclass(frozen=True)
class PlantedSet:
    """Planted features and what is known of them."""

    adapters: AdapterSet
    """The features as adapters, for `PairedModel.plant`."""
    features: tuple[PlantedFeature, ...]
    """One record per feature, by layer and index."""


# -- planting ----------------------------------------------------------------------------------------------------------


class _Inputs:
    """What one layer's MLP reads at the calibration tokens, and the coordinates in which it varies by 1 everywhere."""

    def __init__(self, x: Float[Tensor, "n d_model"]) -> None:
        self.x = x
        self.mean = sum((wide(part).sum(0) for part in x.split(2**14)), torch.zeros_like(wide(x[0]))) / len(x)
        moment = sum(((p := wide(part) - self.mean).T @ p for part in x.split(2**14)), torch.zeros(()).to(self.mean))
        values, vectors = torch.linalg.eigh(host_float64(moment) / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        kept = int((values.cumsum(0) < WHITENED_VARIANCE * values.sum()).sum()) + 1
        self.whiten = (vectors[:, :kept] / values[:kept].sqrt()).to(self.mean)

    def direction(self, wanted: Float[Tensor, "k"]) -> Float[Tensor, "d_model"]:
        """The encoder of a direction in whitened coordinates; what it reads off has variance 1."""
        return self.whiten @ (wanted / wanted.norm())

    def towards(self, chosen: Tensor) -> Float[Tensor, "d_model"]:
        """The encoder that best tells the chosen tokens from the others (Fisher's discriminant)."""
        return self.direction((wide(self.x[chosen]).mean(0) - self.mean) @ self.whiten)

    def scores(self, encoder: Float[Tensor, "d_model"]) -> Float[Tensor, "n"]:
        """What an encoder reads off, with mean 0."""
        return self.x @ encoder.to(self.x.dtype) - float(self.mean @ encoder)


class _Found(NamedTuple):
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
    """Features with a known meaning for every layer of a base, firing at known rates.

    Layer by layer, on the base with the features so far in place (that is the target's stream):

    * a *text* feature stands for a token, or two or three in a row, of about the rate asked for; its encoder is
      Fisher's discriminant of these tokens, and of several such texts the one it picks out most purely is taken;
    * a *direction* feature reads a random direction of the whitened input;
    * the bias is set so that the asked share of the tokens, give or take a tenth, is above it, in a gap between scores;
    * the decoder is a random direction; its size makes the feature's contribution, where it fires, ``strength`` times
      as long as the base MLP's output at that layer (root mean squares both).

    Args:
        base: a model reference as `PairedModel.plant` takes it, or a pair, whose hybrid counts as the base.
        traces: calibration text, with at least 10 tokens per firing of the rarest feature; inputs and residual stream
            of all its tokens are held, a few hundred thousand do.
        per_layer: features per layer; texts and directions in turn.
        rates: shares of tokens, taken in turn, each for a text and a direction. Any sequence does, such as
            ``sae_lens.synthetic.ZipfianFiringProbabilityConfig(...).generate(10).tolist()``.
        strength: see above. On the built-in base 20 features of 0.5 per layer make a KL(target || hybrid) of about
            0.4 nats; the built-in pair's is 0.6.
        seed: of directions, texts and decoders.
        tokens_per_batch: of the forward passes.

    Raises PlantingError for rates or text with which that cannot be done.
    """
    n_tokens = sum(len(trace.tokens) for trace in traces)
    if per_layer < 1 or not rates or not all(0 < rate < 0.5 for rate in rates):
        raise PlantingError(f"per_layer is {per_layer} and rates {list(rates)}; give 1 or more, and rates below 0.5.")
    if n_tokens * min(rates) < ALIVE_FIRINGS:
        raise PlantingError(
            f"At a rate of {min(rates):g} a feature fires {n_tokens * min(rates):.1f} times in {n_tokens:,} tokens; "
            f"give {math.ceil(ALIVE_FIRINGS / min(rates)):,} tokens of text, or higher rates."
        )
    pair = base if isinstance(base, PairedModel) else PairedModel.from_pretrained(base, base)
    cfg, device = pair.model.cfg, pair.model.W_E.device
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(cfg.dtype, torch.float32)
    layers = [TranscoderAdapter(cfg.d_model, per_layer, dtype=dtype, device=device) for _ in range(cfg.n_layers)]
    about = AdapterMetadata(base=pair.base_id, target=pair.base_id)
    planted = AdapterSet(layers, pair.layer_samples, about, samples=pair.samples).requires_grad_(False)
    traces = readable_traces(traces, cfg)
    batches = [batch.to(device) for _, batch in batches_by_length(traces, tokens_per_batch)]
    texts = _texts(batches, cfg.d_vocab)
    records = []
    streams = [pair.embed(batch.tokens) for batch in batches]
    for layer, adapter in enumerate(layers):
        with corrected(pair, layers):  # the hybrid with the features so far; this layer's are still zero
            x = torch.cat([_mlp_input(pair, r, b, layer) for r, b in zip(streams, batches, strict=True)])
            inputs, size = _Inputs(x), strength * _output_size(pair, layer, x)
            used: set[tuple[int, ...]] = set()
            for index in range(per_layer):
                rate = rates[index // 2 % len(rates)]
                kind: Kind = "direction" if index % 2 else "text"
                found = (
                    _direction_feature(inputs, rate, generator)
                    if kind == "direction"
                    else _text_feature(inputs, rate, texts, used, cfg.d_vocab, generator)
                )
                used.add(found.tokens)
                _write(adapter, index, found, inputs.mean, size, generator)
                fires = int((found.activations > 0).sum()) / len(found.activations)
                where = FeatureId(layer, index)
                records.append(PlantedFeature(where, kind, rate, fires, found.tokens, found.purity))
            streams = [pair.run_blocks(resid, layer, layer + 1) for resid in streams]
    return PlantedSet(planted, tuple(records))


def _mlp_input(pair: PairedModel, resid: Tensor, batch: Batch, layer: int) -> Tensor:
    with pair.recorded("mlp.hook_in") as read:
        pair.run_blocks(resid, layer, layer + 1)
    return read[layer][batch.real]


def _output_size(pair: PairedModel, layer: int, x: Tensor) -> float:
    """Root mean square of the length of the base MLP's output."""
    _, base = pair.mlps[layer].weights()
    sums = torch.stack([wide(base.neurons(part) @ base.W_out).square().sum() for part in x.split(2**14)])
    return math.sqrt(float(host_float64(sums).sum()) / len(x))


def _texts(batches: Sequence[Batch], d_vocab: int) -> list[Int[Tensor, "n"]]:
    """Per length from 1: which text ends at each token, as a number in base d_vocab; -1 near a document's start."""
    found = []
    for length in range(1, MAX_TEXT_TOKENS + 1):
        parts = []
        for batch in batches:
            number = torch.zeros_like(batch.tokens)
            for back in range(length):
                number[:, back:] += batch.tokens[:, : number.shape[1] - back] * d_vocab**back
            number[:, : length - 1] = -1
            parts.append(number[batch.real])
        found.append(torch.cat(parts))
    return found


def _text_feature(
    inputs: _Inputs,
    rate: float,
    texts: Sequence[Int[Tensor, "n"]],
    used: set[tuple[int, ...]],
    d_vocab: int,
    generator: torch.Generator,
) -> _Found:
    """Of texts a little more frequent than ``rate``, the one that is picked out most purely."""
    best = None
    for length, ends in enumerate(texts, 1):
        numbers, counts = ends[ends >= 0].unique(return_counts=True)
        share = counts / len(ends)
        fitting = numbers[(share >= rate) & (share <= 2 * rate)].cpu()
        for number in fitting[torch.randperm(len(fitting), generator=generator)[:CANDIDATE_TEXTS]].tolist():
            tokens = tuple(number // d_vocab**back % d_vocab for back in reversed(range(length)))
            chosen = ends == number
            encoder = inputs.towards(chosen)
            cut = None if tokens in used else _cut(inputs.scores(encoder), rate)
            if cut is not None:
                fires = cut[1] > 0
                purity = int((chosen & fires).sum()) / int(fires.sum())
                if best is None or purity > (best.purity or 0):
                    best = _Found(encoder, *cut, tokens, purity)
    if best is None:
        raise PlantingError(
            f"No text of up to {MAX_TEXT_TOKENS} tokens is left that is about as frequent as {rate:g} and that this "
            "layer tells from others. Give more traces, other rates, or fewer features per layer."
        )
    return best


def _direction_feature(inputs: _Inputs, rate: float, generator: torch.Generator) -> _Found:
    """A random direction that has no crowd of equal inputs at its threshold."""
    for _ in range(10 * CANDIDATE_TEXTS):
        wanted = torch.randn(inputs.whiten.shape[1], generator=generator, dtype=torch.float64)
        encoder = inputs.direction(wanted.to(inputs.whiten))
        if (cut := _cut(inputs.scores(encoder), rate)) is not None:
            return _Found(encoder, *cut)
    raise PlantingError(f"No direction fires on a share of {rate:g} of these tokens; give more varied traces.")


def _cut(scores: Float[Tensor, "n"], rate: float) -> tuple[float, Float[Tensor, "n"]] | None:
    """The threshold that a share ``rate`` of the scores is above, and by how much they are.

    It stands in the widest gap within a tenth of the rate, so that it never parts equal inputs (such as the beginnings
    of documents); None where there is no gap.
    """
    k = max(1, round(rate * len(scores)))
    first, last = round(0.9 * k), round(1.1 * k)
    top = scores.topk(last + 1).values
    gaps = top[first - 1 : last] - top[first : last + 1]
    place = first + int(gaps.argmax())
    if gaps.max() < SMALLEST_SCORE_GAP:
        return None
    threshold = float(top[place - 1] + top[place]) / 2
    return threshold, torch.relu(scores - threshold)


def _write(
    adapter: TranscoderAdapter, index: int, found: _Found, mean: Tensor, size: float, generator: torch.Generator
) -> None:
    """One feature's weights; ``size`` is the length of its contribution where it fires (root mean square)."""
    firing = found.activations[found.activations > 0]
    direction = torch.randn(len(mean), generator=generator, dtype=torch.float64).to(mean)
    adapter.W_enc[:, index] = found.encoder.to(adapter.W_enc.dtype)
    adapter.b_enc[index] = -float(mean @ found.encoder) - found.threshold
    adapter.W_dec[index] = (direction / direction.norm() * size / firing.square().mean().sqrt()).to(adapter.W_dec.dtype)


# -- the test ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlantedReport:
    """What training found of what was planted."""

    plant: PlantedSet = field(repr=False)
    """The planted features."""
    adapters: AdapterSet = field(repr=False)
    """The trained ones."""
    matching: Matching = field(repr=False)
    """a: the trained features, b: the planted ones."""
    faithfulness: dict[str, Any] = field(repr=False)
    """The block of `faithfulness.faithfulness_block`: KL, NMSE, L0 with intervals."""

    @property
    def precision(self) -> Share:
        """Of the trained features that are alive, those that are planted ones."""
        return self.matching.shares("a")["all"]

    @property
    def recall(self) -> dict[str, Share]:
        """Of the planted features that fired often enough to be judged, those found: "all", and by firing rate."""
        return self.matching.shares("b")

    @property
    def recall_by_kind(self) -> dict[str, Share]:
        """Likewise, for texts and directions."""
        same = {FeatureId(m.layer, m.b) for m in self.matching.matches if m.same}
        judged = [f for f in self.plant.features if f.feature in self.matching.b]
        kinds = {kind: [f.feature for f in judged if f.kind == kind] for kind in ("text", "direction")}
        return {kind: Share(len(same.intersection(which)), len(which)) for kind, which in kinds.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as JSON takes it."""
        as_dict = lambda shares: {k: {**s._asdict(), "interval": s.interval} for k, s in shares.items()}  # noqa: E731
        chosen = ("kl", "kl_of_hybrid", "l0_all_tokens")
        return {
            "precision": as_dict({"all": self.precision})["all"],
            "recall": as_dict(self.recall),
            "recall_by_kind": as_dict(self.recall_by_kind),
            "not_judged": len(self.plant.features) - len(self.matching.b),
            "alive": len(self.matching.a),
            "tokens": self.matching.tokens,
            "features": [asdict(f) for f in self.plant.features],
            "matches": [asdict(m) for m in self.matching.matches],
            "rates_of_planted": [[*feature, rate] for feature, rate in self.matching.b.items()],
            **{name: plain(self.faithfulness[name]) for name in chosen},
        }

    def _repr_html_(self) -> str:
        kl = self.faithfulness["kl_of_hybrid"]
        of_hybrid = figure_cell(vars(kl), "{:.1%}".format)
        return shares_table(
            {"precision": {"all": self.precision}, "recall": {**self.recall, **self.recall_by_kind}}
        ) + table(["KL(replacement) / KL(hybrid)"], [[of_hybrid]])


def planted_test(
    base: ModelReference,
    traces: Sequence[Trace],
    held_out: Sequence[Trace],
    config: TrainingConfig | None = None,
    *,
    plant: PlantedSet | None = None,
    kl_documents: int = 200,
    progress: bool = True,
    **options: Any,
) -> PlantedReport:
    """Plant features in a base, train adapters on the pair, and say what they found.

    Args:
        base: as `PairedModel.plant`.
        traces: training text; features are calibrated on it too.
        held_out: evaluation text, 100,000 tokens and more.
        config: of the training.
        plant: features planted already (`plant_features`); None makes them.
        kl_documents: how many of ``held_out`` KL, NMSE and L0 are measured on.
        progress: show a progress bar.
        options: as `plant_features`.

    Raises PlantingError, and what training raises.
    """
    if plant is None:
        plant = plant_features(base, traces, **options)
    pair = PairedModel.plant(base, plant.adapters)
    adapters = train(pair, traces, config, progress=progress)
    matching = match_features(adapters, plant.adapters, pair, held_out)
    sums = measure_faithfulness(pair, held_out[:kl_documents])
    return PlantedReport(plant, adapters, matching, faithfulness_block(sums, "held out"))
