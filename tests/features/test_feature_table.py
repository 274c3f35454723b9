"""features.parquet: a row for every feature, equal to the store's own table, and never out of date."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers.stores import HOSTILE, OPTIONS, WORDS, documents, new_store, random_pair, store

import tl_adapters.features.store as stores
from tl_adapters.features.collect import collect_features
from tl_adapters.features.feature import ALIVE_FIRINGS, FeatureStoreError, Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_files import FEATURE_TABLE_FILE


def collected(folder: Path, n: int = 40) -> FeatureStore:
    return collect_features(
        random_pair(), documents()[:n], folder, split="report", words=WORDS, options=OPTIONS, progress=False
    )


def rows(folder: Path) -> dict[str, list[object]]:
    return pq.read_table(folder / FEATURE_TABLE_FILE).to_pydict()


def test_its_rows_are_those_of_the_store_one_layer_after_another(tmp_path: Path) -> None:
    found = collected(tmp_path)
    assert rows(tmp_path) == found.table(0)
    assert len(rows(tmp_path)["layer"]) == found.about.total_features > len(found.ids())
    file = pq.ParquetFile(tmp_path / FEATURE_TABLE_FILE)
    assert file.metadata.num_row_groups == len(found.about.layers), "no more than a layer is in memory"
    assert file.schema_arrow.metadata[b"words"] == b'["Wait", "Hmm", "="]'
    assert pd.read_parquet(tmp_path / FEATURE_TABLE_FILE)["layer"].tolist() == found.table(0)["layer"]


def test_it_follows_labels_and_documents(tmp_path: Path) -> None:
    found = collected(tmp_path, 20)
    earlier = FeatureStore.load(tmp_path)
    found.set_labels({found.ids()[0]: Label("said", "output")})
    earlier.set_labels({found.ids()[1]: Label("a\ud83d", "input")})  # by a process that has not seen the first label
    labels = {label for label in rows(tmp_path)["label"] if label}
    assert labels == {"said", "a?"} and rows(tmp_path) == FeatureStore.load(tmp_path).table(0)
    grown = collected(tmp_path, 40)
    assert grown.documents == 40 and rows(tmp_path) == grown.table(0)


def test_a_kill_leaves_no_table_that_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collected(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(stores, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            found.set_labels({found.ids()[0]: Label("said")})
    assert not (tmp_path / FEATURE_TABLE_FILE).exists()
    assert FeatureStore.load(tmp_path).tokens == found.tokens, "no reader needs it"
    assert rows_after_collecting_again(tmp_path) == found.about.total_features


def rows_after_collecting_again(folder: Path) -> int:
    collected(folder)
    return len(rows(folder)["layer"])


def test_a_store_in_memory_writes_it_where_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match="in memory"):
        store().write_parquet()
    hostile = new_store()
    hostile.vocabulary = [HOSTILE if i % 2 else "\ud800" for i in range(len(hostile.vocabulary))]
    path = hostile.write_parquet(tmp_path / "table.parquet")
    tokens = {token for row in pq.read_table(path)["top_logits"].to_pylist() for token in row}
    assert tokens == {HOSTILE, "?"}


def test_the_data_frame_has_the_alive_features() -> None:
    frame = store().to_pandas()
    assert list(zip(frame["layer"], frame["index"], strict=True)) == store().ids()
    assert (frame["firings"] >= ALIVE_FIRINGS).all() and frame["firings"].tolist() == store().table()["firings"]
    assert f"{len(store().ids()):,} alive" in repr(store()) and repr(store()) in store()._repr_html_()
    assert json.loads(json.dumps(store().to_dict()))["alive"] == len(store().ids())
