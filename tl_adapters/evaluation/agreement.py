"""How far two adapter sets of one pair agree, as single features and as subspaces, each beside its chance level.

* Single features: the one-to-one matching of `feature_matching`. Chance: the same, after every alive feature of the
  second set was given the decoder of the next one in firing rate in its layer.
* Subspaces: the share of what a feature of the first set writes that lies in the span of those decoders of the second
  set that are active on the same token. Chance: the decoders that are active on another token of the text.

Part of a difference may be of low rank, with directions that no training run can pin down. On that part two runs can
agree as subspaces and not as single features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import TranscoderAdapter, adapter_of, row_norms, unit_rows
from tl_adapters.data.traces import Trace, readable_traces
from tl_adapters.evaluation.feature_matching import (
    SAME_FEATURE_THRESHOLD,
    Matching,
    SetEncoders,
    Share,
    match_features,
    seed_agreement,
    target_inputs,
)
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.notebook import rows_frame, tables_view
from tl_adapters.utils.precision import host_float64, wide

if TYPE_CHECKING:
    from pandas import DataFrame

SPAN_RIDGE = 1e-4
"""Ridge of the projections on unit rows, so that two decoders of nearly one direction span one direction."""


@dataclass(frozen=True)
class InSpan:
    """How much of what the features of one set write is in the span of another set's decoders."""

    of_features: dict[FeatureId, float]
    """For each feature, the share of its decoder's squared norm, as a mean over its tokens weighted by its squared
    activation."""
    of_energy: float
    """The same share of all that the features write."""

    @property
    def agreeing(self) -> Share:
        """The share of the features whose decoder has a cosine above 0.9 with the span."""
        k = sum(share > SAME_FEATURE_THRESHOLD**2 for share in self.of_features.values())
        return Share(k, len(self.of_features))


@dataclass(frozen=True)
class Agreement:
    """The agreement of two sets, from the view of the first, and its chance level."""

    matching: Matching
    """The sets, matched one to one."""
    matching_by_chance: Matching
    """The first set and the second with exchanged decoders."""
    in_span: InSpan
    """The first set's features in the span of the second set's decoders that are active on the same token."""
    in_span_by_chance: InSpan
    """In the span of those that are active on another token."""

    def to_dict(self) -> dict[str, Any]:
        """The shares, as JSON values."""
        sides = {"observed": (self.matching, self.in_span), "chance": (self.matching_by_chance, self.in_span_by_chance)}
        return {
            name: {
                "features": {rate: share._asdict() for rate, share in matching.shares("a").items()},
                "features_in_span": in_span.agreeing._asdict(),
                "energy_in_span": in_span.of_energy,
            }
            for name, (matching, in_span) in sides.items()
        }

    def to_pandas(self) -> DataFrame:
        """The shares as a DataFrame: a row for each measure of agreement, observed and by chance."""
        return rows_frame(self._rows(), ["measure", "agree", "of", "observed", "by_chance"])

    def _rows(self) -> list[dict[str, Any]]:
        by_chance = self.matching_by_chance.shares("a")
        pairs = {
            f"single features, {f'firing rate {rate}' if rate != 'all' else 'all alive'}": (share, by_chance[rate])
            for rate, share in self.matching.shares("a").items()
        }
        pairs["features in the span"] = self.in_span.agreeing, self.in_span_by_chance.agreeing
        rows = [
            {"measure": name, "agree": share.k, "of": share.n, "observed": share.value, "by_chance": chance.value}
            for name, (share, chance) in pairs.items()
        ]
        energy = {"observed": self.in_span.of_energy, "by_chance": self.in_span_by_chance.of_energy}
        return [*rows, {"measure": "energy in the span", "agree": None, "of": None, **energy}]

    def __repr__(self) -> str:
        first, energy = self._rows()[0], self._rows()[-1]
        observed, chance = ("-" if first[key] is None else f"{first[key]:.0%}" for key in ("observed", "by_chance"))
        return (
            f"Agreement: {observed} of {first['of']:,} alive features are found by the other set too (by chance "
            f"{chance}); {energy['observed']:.0%} of the energy is in its span (by chance {energy['by_chance']:.0%})"
        )

    def _repr_html_(self) -> str:
        percent = lambda value: "-" if value is None else f"{value:.0%}"  # noqa: E731
        rows = [
            [row["measure"], "" if row["of"] is None else f"{row['agree']} of {row['of']}"]
            + [percent(row[key]) for key in ("observed", "by_chance")]
            for row in self._rows()
        ]
        return tables_view((["agreement", "", "observed", "by chance"], rows))


@torch.no_grad()
def measure_agreement(
    pair: PairedModel,
    adapters_a: AdapterSet,
    adapters_b: AdapterSet,
    traces: Sequence[Trace],
    *,
    seed: int = 0,
    tokens_per_batch: int = 2048,
) -> Agreement:
    """How far two training runs on one pair agree, as single features and as subspaces, beside chance.

    Args:
        pair: the pair whose target is read.
        adapters_a, adapters_b: the two sets; neither needs to be installed.
        traces: evaluation text.
        seed: of the tokens that stand for others in the chance level.
        tokens_per_batch: tokens of a forward pass.

    Raises:
        MatchingError: the sets were trained on different pairs, or have other shapes than the pair.
        UserError: whatever else `seed_agreement` raises.
    """
    matching = seed_agreement(pair, adapters_a, adapters_b, traces, tokens_per_batch=tokens_per_batch)
    exchanged = _with_exchanged_decoders(adapters_b, matching.b)
    by_chance = match_features(adapters_a, exchanged, pair, traces, tokens_per_batch=tokens_per_batch)
    layers = sorted({feature.layer for feature in matching.a} & {feature.layer for feature in matching.b})
    alive_a, alive_b = (_by_layer(features, layers) for features in (matching.a, matching.b))
    sums = [[_SpanSums(adapters_a[i], adapters_b[i], alive_a[i], alive_b[i]) for i in layers] for _ in range(2)]
    encoders_a, encoders_b = SetEncoders(pair, adapters_a), SetEncoders(pair, adapters_b)
    generator = torch.Generator().manual_seed(seed)
    for inputs in target_inputs(pair, readable_traces(traces, pair.model.cfg), tokens_per_batch):
        others = torch.randperm(len(inputs[0]), generator=generator).to(inputs[0].device)
        for layer, same_token, other_token in zip(layers, *sums, strict=True):
            a = encoders_a.acts(layer, inputs[layer])[:, alive_a[layer]]
            b = encoders_b.acts(layer, inputs[layer])[:, alive_b[layer]]
            same_token.add(a, b)
            other_token.add(a, b[others])
    of_layers = (dict(zip(layers, side, strict=True)) for side in sums)
    return Agreement(matching, by_chance, *(_in_span(side, alive_a) for side in of_layers))


def _by_layer(features: dict[FeatureId, float], layers: Sequence[int]) -> dict[int, list[int]]:
    """Indices of features, by layer."""
    return {layer: [feature.index for feature in features if feature.layer == layer] for layer in layers}


def _with_exchanged_decoders(adapters: AdapterSet, alive: dict[FeatureId, float]) -> AdapterSet:
    """The same set, in which each alive feature has the decoder of the next one in firing rate in its layer."""
    layers = {}
    for layer in adapters.layer_indices:
        ours = adapters[layer]
        tensors = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        rates = {feature.index: rate for feature, rate in alive.items() if feature.layer == layer}
        order = sorted(rates, key=lambda index: rates[index])
        tensors["W_dec"][order] = ours.W_dec[[*order[1:], *order[:1]]]
        layers[layer] = adapter_of(tensors, ours.activation, ours.k)
    return AdapterSet(layers, adapters.layer_samples, adapters.metadata, adapters.n_layers, adapters.samples)


class _SpanSums:
    """Energy of the first set's features in one layer, and its part in the span of the second's active decoders."""

    def __init__(self, a: TranscoderAdapter, b: TranscoderAdapter, alive_a: list[int], alive_b: list[int]) -> None:
        rows_a, rows_b = (wide(adapter.W_dec[alive]) for adapter, alive in ((a, alive_a), (b, alive_b)))
        self.norms = row_norms(rows_a)
        directions_a, directions_b = unit_rows(rows_a), unit_rows(rows_b)
        self.gram, self.cosines = directions_b @ directions_b.T, directions_b @ directions_a.T
        self.energy, self.inside = torch.zeros_like(self.norms), torch.zeros_like(self.norms)

    def add(self, a: Float[Tensor, "n alive_a"], b: Float[Tensor, "n alive_b"]) -> None:
        """Add tokens with the activations of both sets, which may be of different tokens."""
        energy = (wide(a) * self.norms).square()
        self.energy += energy.sum(0)
        self.inside += (energy * self._shares(b > 0)).sum(0)

    def _shares(self, active: Tensor) -> Float[Tensor, "n alive_a"]:
        """The share of every decoder of the first set in the span of the active ones of the second, by token."""
        most = max(1, int(active.sum(1).max()))
        chosen, index = active.to(torch.uint8).topk(most, dim=1)  # the active ones first
        used = chosen.to(self.gram)
        gram = self.gram[index[:, :, None], index[:, None, :]] * used[:, :, None] * used[:, None, :]
        gram += torch.diag_embed(1 - used + SPAN_RIDGE)
        cosines = self.cosines[index] * used[..., None]
        return (cosines * torch.linalg.solve(gram, cosines)).sum(1)


def _in_span(sums: dict[int, _SpanSums], alive: dict[int, list[int]]) -> InSpan:
    """The shares of all layers."""
    of_features: dict[FeatureId, float] = {}
    inside = energy = 0.0
    for layer, layer_sums in sums.items():
        all_of_it, part = host_float64(layer_sums.energy), host_float64(layer_sums.inside)
        shares = (part / all_of_it.clamp(min=1e-300)).tolist()
        of_features |= {FeatureId(layer, i): share for i, share in zip(alive[layer], shares, strict=True)}
        inside, energy = inside + float(part.sum()), energy + float(all_of_it.sum())
    return InSpan(of_features, inside / energy if energy else 0.0)
