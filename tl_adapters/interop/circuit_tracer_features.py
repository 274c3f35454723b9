"""Feature files of circuit-tracer's viewer: one JSON file per feature, or all features of a set in the packed form.

    features/<number>.json                                 one feature; the number is its layer and index, Cantor-paired
    features/index.json.gz and features/layer_N.bin        packed: the features of a set, for all of its graphs

Files hold no NaN and no infinity, which are not JSON and which browsers refuse.
"""

from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_adapters.attribution.graph import GraphError
from tl_adapters.utils.files import new_folder, write_bytes, write_text
from tl_adapters.utils.strict_json import dumps

VIEWER_FEATURES_FOLDER = "features"
_PACKED_INDEX_FILE, _PACKED_LAYER_FILE = "index.json.gz", "layer_{}.bin"


@dataclass(frozen=True)
class FeatureRecord:
    """What a viewer shows of one feature; fields that were not measured are empty or None."""

    layer: int
    """Layer of the adapter."""
    index: int
    """Index of the feature in its layer."""
    top_logits: Sequence[str] = ()
    """Tokens whose logits the feature raises most."""
    bottom_logits: Sequence[str] = ()
    """Tokens whose logits the feature lowers most."""
    act_min: float | None = None
    """Smallest activation observed."""
    act_max: float | None = None
    """Largest activation observed."""
    quantiles: Sequence[float] = ()
    """Quantiles of the activations; the viewer draws 100 of them."""
    histogram: Sequence[float] = ()
    """Histogram of the activations."""
    activation_frequency: float | None = None
    """Share of tokens on which the feature is active."""
    examples: Sequence[tuple[Sequence[str], Sequence[float], int]] = ()
    """Examples as (tokens, activation on each token, position of the token it was chosen for), strongest first."""
    top_effects: Sequence[float] = ()
    """Effects on the logits of ``top_logits``, per unit of activation."""
    bottom_effects: Sequence[float] = ()
    """Effects on the logits of ``bottom_logits`` (negative), per unit of activation."""
    label: str = ""
    """Short description of the feature."""


def cantor_number(layer: int, index: int) -> int:
    """Return the number that identifies a feature in the viewer: Cantor's pairing of its layer and index."""
    return (layer + index) * (layer + index + 1) // 2 + index


def write_feature_file(folder: Path, layer: int, index: int, record: FeatureRecord | None) -> None:
    """Write the file of one feature; without a record an existing file is kept, or an empty one is written.

    Without any file the viewer shows an error in place of an empty panel.
    """
    path = folder / f"{cantor_number(layer, index)}.json"
    if record is not None or not path.exists():
        write_text(path, viewer_json(_feature_json(record or FeatureRecord(layer, index))))


def write_packed_features(folder: str | Path, records: Mapping[int, Iterable[FeatureRecord]], n_features: int) -> None:
    """Write the features of a set in the packed form, which the viewer reads from a repository on the hub.

    Args:
        folder: the folder to publish; ``folder/features`` must not exist.
        records: records by layer, in any order; a feature without a record is dead, and empty in the file.
        n_features: number of features in each layer.

    Raises:
        GraphError: a record of another layer, outside the layer or repeated, or values that are not finite.
        FolderExistsError, DiskFullError.
    """
    index: dict[str, Any] = {"version": "1.0", "format": "variable_chunks"}
    with new_folder(Path(folder) / VIEWER_FEATURES_FOLDER) as out:
        for layer in sorted(records):
            chunks = _packed_layer(layer, records[layer], n_features)
            in_order = [chunks.get(feature, b"") for feature in range(n_features)]
            file_name = _PACKED_LAYER_FILE.format(layer)
            write_bytes(out / file_name, in_order)
            offsets = [0, *itertools.accumulate(map(len, in_order))]
            index[str(layer)] = {"filename": file_name, "offsets": offsets}
        write_bytes(out / _PACKED_INDEX_FILE, _compressed(index))


def viewer_json(record: dict[str, Any]) -> str:
    """Return a record as JSON. Raises GraphError for NaN and infinities."""
    try:
        return dumps(record)
    except ValueError as error:
        raise GraphError(
            f"Graph files hold finite numbers only ({error}); check the activations and weights."
        ) from error


def _feature_json(record: FeatureRecord) -> dict[str, Any]:
    """Return the content of a feature's file, which is the same in the packed form."""
    examples = [
        {
            "tokens": list(tokens),
            "tokens_acts_list": list(activations),
            "train_token_ind": position,
            "is_repeated_datapoint": False,
        }
        for tokens, activations, position in record.examples
    ]
    return {
        "transcoder_id": f"layer_{record.layer}",
        "index": record.index,
        "top_logits": list(record.top_logits),
        "bottom_logits": list(record.bottom_logits),
        "act_min": record.act_min,
        "act_max": record.act_max,
        "quantile_values": list(record.quantiles),
        "histogram": list(record.histogram),
        "activation_frequency": record.activation_frequency,
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}] if examples else [],
    }


def _packed_layer(layer: int, records: Iterable[FeatureRecord], n_features: int) -> dict[int, bytes]:
    """Return each feature's chunk: the length of its compressed JSON as uint32, and the compressed JSON."""
    chunks: dict[int, bytes] = {}
    for record in records:
        if record.layer != layer or not 0 <= record.index < n_features or record.index in chunks:
            raise GraphError(
                f"A record of layer {record.layer}, feature {record.index} among layer {layer}'s {n_features} features "
                "is of another layer, out of range, or repeated."
            )
        compressed = _compressed(_feature_json(record))
        chunks[record.index] = struct.pack("<I", len(compressed)) + compressed
    return chunks


def _compressed(record: dict[str, Any]) -> bytes:
    return gzip.compress(viewer_json(record).encode(), mtime=0)  # the same record always gives the same bytes
