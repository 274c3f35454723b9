"""Neuronpedia's batch files: every key there is, every value as the store has it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.stores import new_store, store

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.features.feature import CoactivatingFeature, Feature, FeatureStoreError
from tl_adapters.interop.neuronpedia import write_neuronpedia
from tl_adapters.utils.files import FolderExistsError

FEATURE_KEYS = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_values",
    "logits_hist_data_bar_heights", "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist",
    "vector", "activations",
}  # fmt: skip
ACTIVATION_KEYS = {
    "bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index", "dfa_values", "dfa_maxValue",
    "dfa_targetIndex",
}  # fmt: skip


def refuse(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("neuronpedia") / "up"
    return write_neuronpedia(store(), path, "tiny-r1", "adapters-l1w0.003", features_per_batch=16, progress=False)


def test_batches_settings_and_skipped(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [f"layer_{layer}" for layer in range(5)]
    for layer in range(5):
        alive = [name.index for name in store().ids() if name.layer == layer]
        batches = [read(folder / f"layer_{layer}" / f"batch-{i}.json") for i in range(-(-len(alive) // 16))]
        assert len(list((folder / f"layer_{layer}").iterdir())) == len(batches) + 2
        assert [f["feature_index"] for batch in batches for f in batch["features"]] == alive
        for batch in batches:
            assert set(batch) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
            assert (batch["model_id"], batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) == (
                "tiny-r1", layer, "adapters-l1w0.003", None)  # fmt: skip
            assert len(batch["features"]) <= 16
        skipped = read(folder / f"layer_{layer}" / "skipped_indexes.json")
        assert set(skipped) == {"model_id", "layer", "sae_set", "log_sparsity", "skipped_indexes"}
        assert sorted(skipped["skipped_indexes"] + alive) == list(range(40)) and skipped["layer"] == str(layer)
        assert 10 ** skipped["log_sparsity"] == pytest.approx(10 / store().tokens, rel=1e-2)
        settings = read(folder / f"layer_{layer}" / "run_settings.json")
        assert (settings["model_id"], settings["layer"], settings["n_features_at_a_time"]) == ("tiny-r1", layer, 16)
        assert settings["tl_adapters"]["fingerprints"] == store().about.fingerprints
        assert settings["tl_adapters"]["tokens"] == store().tokens


def test_a_feature_is_the_stores(folder: Path) -> None:
    shown = {
        FeatureId(batch["layer"], record["feature_index"]): record
        for batch in map(read, folder.glob("*/batch-*.json"))
        for record in batch["features"]
    }
    assert sorted(shown) == store().ids()
    for name in store().ids()[::13]:
        record, feature = shown[name], store().feature(name)
        assert set(record) == FEATURE_KEYS
        rounded = lambda values: [round(v, 3) for v in values]  # noqa: E731
        for prefix, pairs in (("pos", feature.top_logits), ("neg", feature.bottom_logits)):
            assert record[f"{prefix}_str"] == [text for text, _ in pairs]
            assert record[f"{prefix}_values"] == rounded(v for _, v in pairs)
        assert record["frac_nonzero"] == round(feature.firings / store().tokens, 5)
        assert record["freq_hist_data_bar_heights"] == [n for _, _, n in feature.histogram]
        assert record["freq_hist_data_bar_values"] == rounded((low + high) / 2 for low, high, _ in feature.histogram)
        assert sum(record["logits_hist_data_bar_heights"]) == len(store().vocabulary)
        assert len(record["logits_hist_data_bar_values"]) == len(feature.effect_histogram)
        assert record["n_prompts_total"] == 40 and record["dataset"] == "report"
        assert abs(record["n_prompts_total"] * record["n_tokens_in_prompt"] - store().tokens) <= 20
        for unknown in ("neuron_alignment_", "correlated_neurons_"):
            assert all(record[key] == [] for key in FEATURE_KEYS if key.startswith(unknown))
        assert record["vector"] == record["decoder_weights_dist"] == []
        here = [near for near in feature.coactivating if near.id.layer == name.layer]
        assert record["correlated_features_indices"] == [near.id.index for near in here]
        assert len(here) == len(record["correlated_features_pearson"]) == len(record["correlated_features_l1"])
        assert all(0 < value <= 1 for value in record["correlated_features_pearson"])
        check_activations(feature, record["activations"])


def check_activations(feature: Feature, shown: Sequence[dict[str, Any]]) -> None:
    """The strongest as one group; the sample in intervals that hold it and whose mass the quantiles tell."""
    assert len(shown) == len(feature.top_examples) + len(feature.random_examples)
    for example, record in zip((*feature.top_examples, *feature.random_examples), shown, strict=True):
        assert set(record) == ACTIVATION_KEYS
        assert record["tokens"] == list(example.tokens) and record["qualifying_token_index"] == example.token_index
        assert record["values"] == [round(v, 3) for v in example.values]
        assert (record["dfa_values"], record["dfa_maxValue"], record["dfa_targetIndex"]) == ([], 0, -1)
    for record in shown[: len(feature.top_examples)]:
        assert (record["bin_min"], record["bin_max"], record["bin_contains"]) == (-1, round(feature.max, 3), -1)
    masses = dict(
        zip((0.0, *(round(v, 3) for _, v in feature.quantiles)), (0.05, 0.2, 0.25, 0.25, 0.2, 0.05), strict=True)
    )
    for example, record in zip(feature.random_examples, shown[len(feature.top_examples) :], strict=True):
        value = example.values[example.token_index]
        assert record["bin_min"] - 1e-3 <= value <= record["bin_max"] + 1e-3
        assert record["bin_contains"] == pytest.approx(masses[record["bin_min"]] * feature.density, abs=1e-5)


def test_correlations_are_those_of_firing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy, where the share is of all firings and not of a sample."""
    rng = np.random.default_rng(0)
    cause = rng.random(4000)
    fires = [(cause + 0.4 * rng.random(4000)) > level for level in (1.0, 1.1)]
    (a, b), joint = (f.mean() for f in fires), (fires[0] & fires[1]).mean()
    found, name = new_store(), FeatureId(0, 1)
    made = replace(
        found.feature(name),
        density=float(a),
        coactivating=(CoactivatingFeature(FeatureId(0, 2), float(joint / a), float(b)),),
    )

    def features(ids: Sequence[FeatureId]) -> Iterator[Feature]:
        return (replace(made, id=id) for id in ids)

    monkeypatch.setattr(found, "features", features)
    write_neuronpedia(found, tmp_path / "up", "m", "s", progress=False)
    record = read(tmp_path / "up" / "layer_0" / "batch-0.json")["features"][0]
    assert record["correlated_features_pearson"] == [pytest.approx(np.corrcoef(*fires)[0, 1], abs=1e-3)]
    cosine = (fires[0] @ fires[1].astype(float)) / np.sqrt(fires[0].sum() * fires[1].sum())
    assert record["correlated_features_l1"] == [pytest.approx(cosine, abs=1e-3)]


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    for given, message in (
        (("", "set"), "model_id is ''"),
        (("model", "a/b"), "sae_set is 'a/b'; allowed are letters"),
    ):
        with pytest.raises(FeatureStoreError, match=message):
            write_neuronpedia(store(), tmp_path / "up", *given, progress=False)
    with pytest.raises(FeatureStoreError, match="sae_id_suffix is '../x'"):
        write_neuronpedia(store(), tmp_path / "up", "m", "s", sae_id_suffix="../x", progress=False)
    with pytest.raises(FeatureStoreError, match="features_per_batch is 0"):
        write_neuronpedia(store(), tmp_path / "up", "m", "s", features_per_batch=0, progress=False)
    broken = new_store()
    _, effects = broken.layer(broken.about.layers[-1])
    effects.top[broken.ids()[-1].index] = float("inf")
    with pytest.raises(FeatureStoreError, match="not finite"):
        write_neuronpedia(broken, tmp_path / "up", "m", "s", progress=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "up").mkdir()
    with pytest.raises(FolderExistsError):
        write_neuronpedia(store(), tmp_path / "up", "m", "s", progress=False)
