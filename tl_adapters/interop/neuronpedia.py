"""A feature store as the files of a Neuronpedia upload.

    layer_3/batch-0.json            128 alive features of layer 3; batch-1.json holds the next 128
    layer_3/run_settings.json       the documents and options of the store
    layer_3/skipped_indexes.json    indices of the features of the layer that are not alive

All values come from the records of the store. What a store does not hold is an empty list, for which Neuronpedia shows
nothing: the neurons that resemble a feature's decoder row or activations, the row itself, and contributions of heads.

Two fields need an explanation. Neuronpedia groups examples below the strongest by intervals of the activation; here
they are the store's random examples, grouped by the intervals between the stored quantiles, of which the share of
tokens is known. Neuronpedia's correlated features are here the features of the same layer that are active together with
this one. Their Pearson correlation and cosine are those of *whether* the two are active, computed from the densities
and from the share of sampled firings that they have in common.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.set_folder import LAYER_FOLDER
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.features.feature import ALIVE_FIRINGS, Example, Feature, FeatureStoreError
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.files import new_folder, write_text
from tl_adapters.utils.strict_json import dumps

_SETTINGS_FILE, _SKIPPED_FILE, _BATCH_FILE = "run_settings.json", "skipped_indexes.json", "batch-{}.json"
ALLOWED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def write_neuronpedia(
    store: FeatureStore,
    folder: str | Path,
    model_id: str,
    sae_set: str,
    *,
    sae_id_suffix: str = "",
    features_per_batch: int = 128,
    min_firings: int = ALIVE_FIRINGS,
    progress: bool = True,
) -> Path:
    """Write one folder per layer with the files of a Neuronpedia upload.

    Args:
        store: a store of features or of neurons.
        folder: must not exist.
        model_id: name of the model on Neuronpedia ("deepseek-r1-distill-qwen-7b").
        sae_set: name of the set on Neuronpedia; layer 3 becomes the source "3-SAE_SET".
        sae_id_suffix: suffix of that name if several sources belong to one set; "" for none.
        features_per_batch: number of features in a file.
        min_firings: features with fewer firings are listed as skipped.
        progress: whether to show a progress bar.

    Returns:
        The folder.

    Raises:
        FeatureStoreError: names that cannot be part of an address, or values that are not finite.
        FolderExistsError, DiskFullError.
    """
    for name, given in (("model_id", model_id), ("sae_set", sae_set), ("sae_id_suffix", sae_id_suffix or "none")):
        if not ALLOWED_NAME.fullmatch(given):
            raise FeatureStoreError(f"{name} is {given!r}; allowed are letters, digits, '.', '_' and '-'.")
    if features_per_batch < 1:
        raise FeatureStoreError(f"features_per_batch is {features_per_batch}; allowed is a whole number >= 1.")
    ids = store.ids(min_firings)
    names = {"model_id": model_id, "sae_set": sae_set, "sae_id_suffix": sae_id_suffix or None}
    with new_folder(folder) as partial, tqdm(total=len(ids), disable=not progress, unit="feature") as bar:
        features = store.features(ids)
        for layer in store.about.layers:
            out = partial / LAYER_FOLDER.format(layer)
            alive = [id for id in ids if id.layer == layer]
            for number, batch in enumerate(_batches(alive, features_per_batch)):
                records = [_feature_json(store, feature) for feature in itertools.islice(features, len(batch))]
                _write_json(out / _BATCH_FILE.format(number), {**names, "layer": layer, "features": records})
                bar.update(len(batch))
            settings = _settings(store, layer, features_per_batch, min_firings)
            _write_json(out / _SETTINGS_FILE, {**names, **settings})
            _write_json(out / _SKIPPED_FILE, _skipped(store, layer, alive, model_id, sae_set, min_firings))
    return Path(folder)


def _batches(alive: Sequence[FeatureId], size: int) -> Iterator[Sequence[FeatureId]]:
    for start in range(0, len(alive), size):
        yield alive[start : start + size]


def _feature_json(store: FeatureStore, feature: Feature) -> dict[str, Any]:
    """Return one feature under the keys of Neuronpedia."""
    correlated = [
        (other.id.index, *_firing_correlation(feature, other.share, other.density))
        for other in feature.coactivating
        if other.id.layer == feature.id.layer
    ]
    return {
        "feature_index": feature.id.index,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [index for index, _, _ in correlated],
        "correlated_features_l1": [_rounded(cosine) for _, _, cosine in correlated],
        "correlated_features_pearson": [_rounded(pearson) for _, pearson, _ in correlated],
        "neg_str": [text for text, _ in feature.bottom_logits],
        "neg_values": [_rounded(value) for _, value in feature.bottom_logits],
        "pos_str": [text for text, _ in feature.top_logits],
        "pos_values": [_rounded(value) for _, value in feature.top_logits],
        "frac_nonzero": _rounded_share(feature.density),
        "freq_hist_data_bar_values": [_rounded((low + high) / 2) for low, high, _ in feature.histogram],
        "freq_hist_data_bar_heights": [count for _, _, count in feature.histogram],
        "logits_hist_data_bar_values": [_rounded((low + high) / 2) for low, high, _ in feature.effect_histogram],
        "logits_hist_data_bar_heights": [count for _, _, count in feature.effect_histogram],
        "n_prompts_total": store.documents,
        "n_tokens_in_prompt": _mean_length(store),
        "dataset": store.about.split,
        "decoder_weights_dist": [],
        "vector": [],
        "activations": [*_top_examples(feature), *_random_examples(feature)],
    }


def _firing_correlation(feature: Feature, share: float, other_density: float) -> tuple[float, float]:
    """Return Pearson's correlation and the cosine of whether two features are active.

    With densities a and b, and both active on a share s of the first one's firings, these are
    (s - b) sqrt(a / (1 - a)) / sqrt(b (1 - b)) and s sqrt(a / b).
    """
    a, b = feature.density, other_density
    s = min(share, b / a)  # estimated from a sample, the share can exceed its largest possible value
    cosine = s * math.sqrt(a / b)
    if a == 1 or b == 1:
        return 0.0, cosine  # a feature that is always active has no correlation
    return (s - b) * math.sqrt(a / (1 - a) / (b * (1 - b))), cosine


def _top_examples(feature: Feature) -> Iterator[dict[str, Any]]:
    for example in feature.top_examples:
        yield _example_json(example, -1, _rounded(feature.max), -1)


def _random_examples(feature: Feature) -> Iterator[dict[str, Any]]:
    """Yield the random examples, each with its interval between two quantiles, the strongest interval first."""
    shares = [0.0, *(share for share, _ in feature.quantiles), 1.0]
    edges = [0.0, *(value for _, value in feature.quantiles), feature.max]
    for example in feature.random_examples:  # strongest first
        value = example.values[example.token_index]
        interval = max(i for i in range(len(edges) - 1) if i == 0 or edges[i] <= value)
        token_share = (shares[interval + 1] - shares[interval]) * feature.density
        yield _example_json(
            example, _rounded(edges[interval]), _rounded(edges[interval + 1]), _rounded_share(token_share)
        )


def _example_json(example: Example, low: float, high: float, contains: float) -> dict[str, Any]:
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": contains,
        "tokens": example.display_texts,
        "values": [_rounded(value) for value in example.values],
        "qualifying_token_index": example.token_index,
        "dfa_values": [],
        "dfa_maxValue": 0,
        "dfa_targetIndex": -1,
    }


def _settings(store: FeatureStore, layer: int, features_per_batch: int, min_firings: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "huggingface_dataset_path": store.about.split,
        "n_prompts_total": store.documents,
        "n_tokens_in_prompt": _mean_length(store),
        "n_features_at_a_time": features_per_batch,
        "top_acts_group_size": store.about.options.examples,
        "tl_adapters": {
            **store.about.to_json(),
            "base": published_name(store.about.base),
            "target": published_name(store.about.target),
            "tokens": store.tokens,
            "min_firings": min_firings,
            "units": "decoder norm",
        },
    }


def _skipped(
    store: FeatureStore, layer: int, alive: Sequence[FeatureId], model_id: str, sae_set: str, min_firings: int
) -> dict[str, Any]:
    skipped = set(range(store.about.n_features)) - {id.index for id in alive}
    return {
        "model_id": model_id,
        "layer": str(layer),
        "sae_set": sae_set,
        "log_sparsity": _rounded(math.log10(max(1, min_firings) / max(1, store.tokens))),
        "skipped_indexes": sorted(skipped),
    }


def _mean_length(store: FeatureStore) -> int:
    """Return the mean number of tokens of a document; Neuronpedia multiplies one length by the number of documents."""
    return round(store.tokens / max(1, store.documents))


def _rounded(value: float) -> float:
    return round(value, 3)


def _rounded_share(value: float) -> float:
    """Return a share with five decimals, since most features are active on less than one token in a thousand."""
    return round(value, 5)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    try:
        write_text(path, dumps(record) + "\n")
    except ValueError as error:
        raise FeatureStoreError(
            f"{path.name} would hold a number that is not finite ({error}), which Neuronpedia refuses; collect again."
        ) from error
