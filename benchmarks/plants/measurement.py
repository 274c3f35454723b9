"""What the adapters of one recipe find of one plant, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from plants.plant import Plant, layer_inputs
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.faithfulness import faithfulness_block, measure_faithfulness
from tl_adapters.evaluation.feature_matching import (
    SAME_FEATURE_THRESHOLD,
    Matching,
    match_features,
    rate_decade,
    target_inputs,
)
from tl_adapters.local_stage.encoder_fit import fit_encoder
from tl_adapters.local_stage.whitening import RunningCovariance, Whitening
from tl_adapters.utils.results import plain

KL_DOCUMENTS = 200
"""Number of held-out documents on which KL and L0 are measured."""
FITTED_DOCUMENTS = 500
"""Number of training documents to which the encoders of `representable` are fitted."""

Firings = Mapping[FeatureId, int]


@torch.no_grad()
def firings(plant: Plant, traces: Sequence[Trace]) -> dict[FeatureId, int]:
    """The number of tokens of a text on which each true feature is active."""
    counts = torch.zeros(plant.pair.n_layers, plant.truth.n_features, dtype=torch.long)
    for inputs in target_inputs(plant.pair, traces):
        counts += torch.stack([(a.encode(x) > 0).sum(0) for a, x in zip(plant.truth, inputs, strict=True)])
    return {FeatureId(i, j): n for i, row in enumerate(counts.tolist()) for j, n in enumerate(row)}


def measure(plant: Plant, adapters: AdapterSet, held_out: Sequence[Trace], in_training: Firings) -> dict[str, Any]:
    """Recall by firing rate, precision, KL and L0 of adapters that are installed in the plant's pair.

    Args:
        plant: the pair and its true features.
        adapters: the trained adapters.
        held_out: evaluation text.
        in_training: firings of the true features in the training text.
    """
    matching = match_features(adapters, plant.truth, plant.pair, held_out)
    faithfulness = faithfulness_block(measure_faithfulness(plant.pair, held_out[:KL_DOCUMENTS]), "held out")
    l0 = [figure["value"] for figure in plain(faithfulness["l0_all_tokens"])]
    return {
        "recall": recall(matching, in_training),
        "precision": matching.shares("a")["all"]._asdict(),
        "kl_left": {key: plain(faithfulness["kl_of_hybrid"])[key] for key in ("value", "low", "high")},
        "kl_of_hybrid_nats": plain(faithfulness["kl"])["hybrid"]["value"],
        "l0": sum(l0) / len(l0),
        "true_l0": sum(matching.b.values()) / plant.pair.n_layers,
        "alive": len(matching.a),
        "held_out_tokens": matching.tokens,
        "matches": [asdict(m) for m in matching.matches],
        "features": [[*feature, rate, in_training[feature]] for feature, rate in matching.b.items()],
    }


def recall(matching: Matching, in_training: Firings) -> dict[str, dict[str, Any]]:
    """The share of the alive true features that were found: "all", and by firing rate, with their firings."""
    shares = {name: share._asdict() for name, share in matching.shares("b").items()}
    for feature, rate in matching.b.items():
        for name in ("all", rate_decade(rate)):
            for text, n in (("training", in_training[feature]), ("held_out", round(rate * matching.tokens))):
                low, high = shares[name].setdefault(f"firings_{text}", [n, n])
                shares[name][f"firings_{text}"] = [min(low, n), max(high, n)]
    return shares


@torch.no_grad()
def representable(plant: Plant, training: Sequence[Trace], held_out: Sequence[Trace]) -> dict[str, int]:
    """How many true features one ReLU feature can represent: fitted to the true activations, it has their correlation.

    For plants of ReLU features it is all of them. Returns k and n, of those that are active in both texts.
    """
    if all(type(adapter) is TranscoderAdapter for adapter in plant.truth):
        return {}
    k = n = 0
    for layer, truth in enumerate(plant.truth):
        x, x_held = (layer_inputs(plant.pair, text, layer) for text in (training[:FITTED_DOCUMENTS], held_out))
        inputs = RunningCovariance(x.shape[1])
        inputs.add(x)
        whitening = Whitening.of(inputs, 1e-4)
        white, white_held = whitening(x), whitening(x_held)
        acts, acts_held = truth.encode(x), truth.encode(x_held)
        for feature in ((acts > 0).sum(0).minimum((acts_held > 0).sum(0)) >= 10).nonzero()[:, 0].tolist():
            encoder = fit_encoder(white, acts[:, feature])
            assert encoder is not None
            both = torch.stack([torch.relu(white_held @ encoder.w + encoder.b), acts_held[:, feature]])
            n += 1
            k += float(torch.corrcoef(both)[0, 1]) > SAME_FEATURE_THRESHOLD
    return {"k": k, "n": n}
