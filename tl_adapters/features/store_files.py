"""The files of a feature store's folder.

store.json               options, and the models and documents that the store was collected on (`StoreDescription`)
vocabulary.json          every token as text
effects/layer_N          direct effects of each feature on the logits (`LayerEffects`)
part-HASH/               documents and statistics; several until they are merged (`store_parts`)
agreement.json           agreement of the target's and the replacement's streams, once measured (`stream_agreement`)
labels.json              labels of the features, once they have any
features.parquet         a row per feature, for other programs (`FeatureStore.write_parquet`); no reader here needs it
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.tensor_fields import floats, require_tensors, whole_numbers
from tl_adapters.data.tokens import single_token, token_text
from tl_adapters.features.feature import FeatureStoreError, Label
from tl_adapters.features.logit_effects import N_EFFECT_BINS, LayerEffects, decoder_rows, layer_effects
from tl_adapters.features.store_description import COLLECT_AGAIN, StoreDescription
from tl_adapters.features.store_parts import StorePart, current_parts, layer_file
from tl_adapters.features.stream_agreement import LayerAgreement
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.files import locked, new_folder, remove_own, write_tensors, write_text
from tl_adapters.utils.reading import (
    Record,
    UnreadableFileError,
    as_dataclass,
    as_record,
    read_json,
    read_json_object,
    read_tensors,
    read_text,
    shown,
    unreadable_as,
)
from tl_adapters.utils.strict_json import dumps

STORE_SCHEMA_VERSION = 1
STORE_FILE, VOCABULARY_FILE, EFFECTS_FOLDER = "store.json", "vocabulary.json", "effects"
AGREEMENT_FILE, LABELS_FILE = "agreement.json", "labels.json"
FEATURE_TABLE_FILE = "features.parquet"
STORE_NAMES = (
    *(STORE_FILE, VOCABULARY_FILE, EFFECTS_FOLDER, "part-*", AGREEMENT_FILE, LABELS_FILE, FEATURE_TABLE_FILE),
)
"""Patterns of everything that a store's folder holds."""


def prepare_folder(
    pair: PairedModel, folder: Path, description: StoreDescription, *, write_effects: bool = True
) -> list[StorePart]:
    """Create a store's folder, or check that the existing one can be added to; returns the parts that it holds.

    Args:
        pair: the pair whose features are collected.
        folder: created where it does not exist.
        description: of the collection that is about to start.
        write_effects: write the logit effects too; of several processes, one does.

    Raises:
        FeatureStoreError: the folder holds something else, or a store of another collection.
    """
    with locked(folder / STORE_FILE):  # processes with shares of one collection start together
        if (folder / STORE_FILE).is_file():
            read_description(folder).require_same(description, folder)
        else:
            _begin_store(pair, folder, description)
    if write_effects and not (folder / EFFECTS_FOLDER).is_dir():
        with new_folder(folder / EFFECTS_FOLDER) as out:
            for layer, effects in effects_by_layer(pair, description):
                write_tensors(out / layer_file(layer), effects._asdict())
    return current_parts(folder)


def _begin_store(pair: PairedModel, folder: Path, description: StoreDescription) -> None:
    """Write the first two files of a store; a process that was killed between them has left the first."""
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name != VOCABULARY_FILE]
    texts = dumps(vocabulary_texts(pair))
    vocabulary = folder / VOCABULARY_FILE
    if others or (vocabulary.exists() and read_text(vocabulary) != texts):
        raise FeatureStoreError(
            f"{folder} exists and is not a feature store: it holds {(others or [VOCABULARY_FILE])[0]}. Choose another "
            "folder."
        )
    if not vocabulary.exists():
        write_text(vocabulary, texts)
    record = {"schema_version": STORE_SCHEMA_VERSION, **description.to_json()}
    write_text(folder / STORE_FILE, dumps(record, indent=1) + "\n")


def holds_store(folder: Path) -> bool:
    """Whether a folder holds a store. A process that was killed, or has just begun, leaves a folder without one."""
    return (folder / STORE_FILE).is_file()


def read_description(folder: Path) -> StoreDescription:
    """The description of the store in a folder. Raises FeatureStoreError where the folder holds no store."""
    path = folder / STORE_FILE
    if not holds_store(folder):
        raise FeatureStoreError(
            f"{folder} holds no feature store; make one with collect_features, or tl-adapters features RUN."
        )
    with unreadable_as(FeatureStoreError):
        record = read_json_object(path, COLLECT_AGAIN)
        if (version := record.pop("schema_version", 1)) != STORE_SCHEMA_VERSION:
            raise FeatureStoreError(
                f"{path} has schema_version {shown(version)}; this version reads {STORE_SCHEMA_VERSION}. Read the "
                "store with the version of tl_adapters that wrote it, or collect into a new folder."
            )
        return StoreDescription.from_json(record, path)


def remove_feature_table(folder: Path) -> None:
    """Remove the table of a store that is about to change, so that a kill leaves none that is out of date."""
    remove_own(folder / FEATURE_TABLE_FILE)


def vocabulary_texts(pair: PairedModel) -> list[str]:
    """The text of every token id."""
    return [token_text(pair.model.tokenizer, token) for token in range(pair.model.cfg.d_vocab)]


def effects_by_layer(pair: PairedModel, description: StoreDescription) -> Iterator[tuple[int, LayerEffects]]:
    """The direct logit effects of every layer's features, one layer at a time."""
    words = [single_token(pair.model.tokenizer, word) for word in description.words]
    for layer, rows in decoder_rows(pair, description.kind, description.layers):
        yield layer, layer_effects(pair, layer, rows, words)


def read_vocabulary(folder: Path) -> list[str]:
    """The text of every token id, from a store's folder. Raises FeatureStoreError."""
    path = folder / VOCABULARY_FILE
    with unreadable_as(FeatureStoreError):
        texts = read_json(path, COLLECT_AGAIN)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FeatureStoreError(f"{path} is {shown(texts)}; allowed is a list of texts. {COLLECT_AGAIN}")
    return texts


def read_effects(folder: Path | None, layer: int, about: StoreDescription, d_vocab: int) -> LayerEffects:
    """The logit effects of one layer, from a store's folder. Raises FeatureStoreError."""
    assert folder is not None
    path = folder / EFFECTS_FOLDER / layer_file(layer)
    if not path.is_file():
        raise FeatureStoreError(f"{path} is missing; collect into this folder again, which adds it.")
    sizes = {"features": about.n_features, "words": len(about.words), "d_vocab": d_vocab}
    with unreadable_as(FeatureStoreError):
        tensors = read_tensors(path, advice=COLLECT_AGAIN)
        require_tensors(tensors, _EFFECT_FIELDS, path, sizes, COLLECT_AGAIN)
    return LayerEffects(**tensors)


_EFFECT_FIELDS = {
    "top_tokens": whole_numbers("features", "top", below="d_vocab"),
    "top": floats("features", "top"),
    "bottom_tokens": whole_numbers("features", "top", below="d_vocab"),
    "bottom": floats("features", "top"),
    "norm": floats("features"),
    "words": floats("features", "words"),
    "spread": floats("features"),
    "kurtosis": floats("features"),
    "range": floats("features", 2),
    "histogram": whole_numbers("features", N_EFFECT_BINS),
}
"""The tensors of a layer's file, which are fields of `LayerEffects`."""


def read_labels(path: Path) -> dict[FeatureId, Label]:
    """The labels that `FeatureStore.set_labels` wrote. Raises FeatureStoreError."""
    advice = "Remove the file and label the features again."
    with unreadable_as(FeatureStoreError):
        labels = as_record(_Labels, {"labels": read_json(path, advice)}, str(path), advice).labels
    return {FeatureId(*map(int, name.split("."))): label for name, label in labels.items()}


class _Labels(Record):
    """The content of labels.json: labels by "layer.index"."""

    labels: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}\.[0-9]{1,9}$")], Label]


def read_agreement(path: Path) -> list[dict[str, Any]]:
    """The records of `stream_agreement`, as `FeatureStore.agreement` holds them. Raises FeatureStoreError."""
    advice = "Remove the file; tl-adapters features RUN measures the agreement again."
    with unreadable_as(FeatureStoreError):
        record = read_json(path, advice)
        if not isinstance(record, list):
            raise UnreadableFileError(f"{path} is {shown(record)}; allowed is a list. {advice}")
        for number, layer in enumerate(record):
            as_dataclass(LayerAgreement, layer, f"{path}, layer {number} of the list", advice)
    return record
