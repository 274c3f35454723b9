"""A store of features as the files that Neuronpedia takes in.

    layer_3/batch-0.json            128 alive features of layer 3, then the next 128
    layer_3/run_settings.json       what they were read on
    layer_3/skipped_indexes.json    the numbers of the layer that are not alive

Everything comes from the store's records. What a store does not hold is an empty list, which Neuronpedia shows as
nothing: the neurons that a feature's row or its activations resemble, the row itself, and contributions of heads.

Two fields need a word. Neuronpedia's examples below the strongest lie in intervals of the activation; ours are the
random sample, in the intervals between the quantiles that the store tells, whose share of the tokens is known. And its
correlated features are those of the same layer that fire where this one does: Pearson's correlation and the cosine
are those of *whether* the two fire, from the densities and the share of sampled firings that they have in common.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.set_folder import LAYER_FOLDER
from tl_adapters.features.feature import ALIVE_FIRINGS, Example, Feature, FeatureStoreError
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.files import new_folder
from tl_adapters.utils.strict_json import dumps

SETTINGS_FILE, SKIPPED_FILE, BATCH_FILE = "run_settings.json", "skipped_indexes.json", "batch-{}.json"
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
        store: of features or of neurons.
        folder: must not exist.
        model_id: what Neuronpedia calls the model ("deepseek-r1-distill-qwen-7b").
        sae_set: what the set is to be called there; layer 3 becomes the source "3-SAE_SET".
        sae_id_suffix: what follows it, where there are several of one set; "" for none.
        features_per_batch: features in a file.
        min_firings: features that fired less often are listed as skipped.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        FeatureStoreError: names that make no address, or figures that are not finite.
        FolderExistsError, DiskFullError.
    """
    for name, given in (("model_id", model_id), ("sae_set", sae_set), ("sae_id_suffix", sae_id_suffix or "none")):
        if not _SLUG.fullmatch(given):
            raise FeatureStoreError(f"{name} is {given!r}; allowed are letters, digits, '.', '_' and '-'.")
    if features_per_batch < 1:
        raise FeatureStoreError(f"features_per_batch is {features_per_batch}; allowed is a whole number >= 1.")
    ids = store.ids(min_firings)
    about = {"model_id": model_id, "sae_set": sae_set, "sae_id_suffix": sae_id_suffix or None}
    with new_folder(folder) as partial, tqdm(total=len(ids), disable=not progress, unit="feature") as bar:
        features = store.features(ids)
        for layer in store.about.layers:
            out = partial / LAYER_FOLDER.format(layer)
            out.mkdir()
            alive = [name for name in ids if name.layer == layer]
            for number, batch in enumerate(_batches(alive, features_per_batch)):
                records = [_record(store, feature) for feature in itertools.islice(features, len(batch))]
                _write(out / BATCH_FILE.format(number), {**about, "layer": layer, "features": records})
                bar.update(len(batch))
            settings = _settings(store, layer, features_per_batch, min_firings)
            _write(out / SETTINGS_FILE, {**about, **settings})
            _write(out / SKIPPED_FILE, _skipped(store, layer, alive, model_id, sae_set, min_firings))
    return Path(folder)


def _batches(alive: Sequence[FeatureId], size: int) -> Iterator[Sequence[FeatureId]]:
    for start in range(0, len(alive), size):
        yield alive[start : start + size]


def _record(store: FeatureStore, feature: Feature) -> dict[str, Any]:
    """One feature under Neuronpedia's names."""
    correlated = [_correlation(feature, near.share, near.density) for near in feature.coactivating]
    beside = [
        (near.id.index, *values)
        for near, values in zip(feature.coactivating, correlated, strict=True)
        if near.id.layer == feature.id.layer
    ]
    return {
        "feature_index": feature.id.index,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [index for index, _, _ in beside],
        "correlated_features_l1": [_short(cosine) for _, _, cosine in beside],
        "correlated_features_pearson": [_short(pearson) for _, pearson, _ in beside],
        "neg_str": [text for text, _ in feature.bottom_logits],
        "neg_values": [_short(value) for _, value in feature.bottom_logits],
        "pos_str": [text for text, _ in feature.top_logits],
        "pos_values": [_short(value) for _, value in feature.top_logits],
        "frac_nonzero": _share(feature.density),
        "freq_hist_data_bar_values": [_short((low + high) / 2) for low, high, _ in feature.histogram],
        "freq_hist_data_bar_heights": [count for _, _, count in feature.histogram],
        "logits_hist_data_bar_values": [_short((low + high) / 2) for low, high, _ in feature.effect_histogram],
        "logits_hist_data_bar_heights": [count for _, _, count in feature.effect_histogram],
        "n_prompts_total": store.documents,
        "n_tokens_in_prompt": _mean_length(store),
        "dataset": store.about.split,
        "decoder_weights_dist": [],
        "vector": [],
        "activations": [*_strongest(feature), *_sampled(feature)],
    }


def _correlation(feature: Feature, share: float, other: float) -> tuple[float, float]:
    """Pearson's correlation and the cosine of two features' firing or not, of densities a and b that fire together on
    a share s of the first's firings: (s - b) sqrt(a / (1 - a)) / sqrt(b (1 - b)) and s sqrt(a / b)."""
    a = feature.density
    share = min(share, other / a)  # of a sample: it may say more than the whole allows
    cosine = share * math.sqrt(a / other)
    if a == 1 or other == 1:
        return 0.0, cosine  # what never varies correlates with nothing
    return (share - other) * math.sqrt(a / (1 - a) / (other * (1 - other))), cosine


def _strongest(feature: Feature) -> Iterator[dict[str, Any]]:
    for example in feature.top_examples:
        yield _activation(example, -1, _short(feature.max), -1)


def _sampled(feature: Feature) -> Iterator[dict[str, Any]]:
    """The random sample, each in its interval between the quantiles; the strongest interval first."""
    shares = [0.0, *(share for share, _ in feature.quantiles), 1.0]
    edges = [0.0, *(value for _, value in feature.quantiles), feature.max]
    for example in feature.random_examples:  # strongest first
        value = example.values[example.token_index]
        place = max(i for i in range(len(edges) - 1) if i == 0 or edges[i] <= value)
        inside = (shares[place + 1] - shares[place]) * feature.density
        yield _activation(example, _short(edges[place]), _short(edges[place + 1]), _share(inside))


def _activation(example: Example, low: float, high: float, contains: float) -> dict[str, Any]:
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": contains,
        "tokens": example.display_texts,
        "values": [_short(value) for value in example.values],
        "qualifying_token_index": example.token_index,
        "dfa_values": [],
        "dfa_maxValue": 0,
        "dfa_targetIndex": -1,
    }


def _settings(store: FeatureStore, layer: int, features_per_batch: int, min_firings: int) -> dict[str, Any]:
    about = asdict(store.about)
    return {
        "layer": layer,
        "huggingface_dataset_path": store.about.split,
        "n_prompts_total": store.documents,
        "n_tokens_in_prompt": _mean_length(store),
        "n_features_at_a_time": features_per_batch,
        "top_acts_group_size": store.about.options.examples,
        "tl_adapters": {**about, "tokens": store.tokens, "min_firings": min_firings, "units": "decoder norm"},
    }


def _skipped(
    store: FeatureStore, layer: int, alive: Sequence[FeatureId], model_id: str, sae_set: str, min_firings: int
) -> dict[str, Any]:
    skipped = set(range(store.about.n_features)) - {name.index for name in alive}
    return {
        "model_id": model_id,
        "layer": str(layer),
        "sae_set": sae_set,
        "log_sparsity": _short(math.log10(max(1, min_firings) / max(1, store.tokens))),
        "skipped_indexes": sorted(skipped),
    }


def _mean_length(store: FeatureStore) -> int:
    """Documents differ in length; Neuronpedia takes one, and multiplies it by their number."""
    return round(store.tokens / max(1, store.documents))


def _short(value: float) -> float:
    return round(value, 3)


def _share(value: float) -> float:
    """Rounded as a percentage of three decimals, for most features fire on less than one token in a thousand."""
    return round(value, 5)


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.write_text(dumps(record) + "\n", encoding="utf-8")
    except ValueError as error:
        raise FeatureStoreError(
            f"{path.name} would hold a number that is not finite ({error}), which Neuronpedia refuses; collect again."
        ) from error
