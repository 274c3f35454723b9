"""A set of adapters is what it was saved as, or it is refused: mixed, damaged and edited folders (A11)."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_models import random_model, randomise
from safetensors.torch import load_file, save_file

import tl_adapters.adapters.file_hashes as file_hashes
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.file_hashes import file_hash
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import AdapterFormatError
from tl_adapters.adapters.set_folder import SET_METADATA_FILE, SET_SAMPLES_FILE, record_hash
from tl_adapters.models.paired_model import PairedModel

WEIGHTS = "sae_weights.safetensors"


def pair() -> PairedModel:
    return PairedModel.from_pretrained(*(random_model(seed, torch.float32, num_hidden_layers=2) for seed in (1, 2)))


@pytest.fixture(scope="module")
def adapters() -> AdapterSet:
    return randomise(pair(), n_features=6).installed_adapters()


@pytest.fixture
def folder(adapters: AdapterSet, tmp_path: Path) -> Path:
    adapters.save_pretrained(tmp_path / "set")
    return tmp_path / "set"


def flip(path: Path, tensor: str, bit: int) -> None:
    """One bit of the first value of a tensor."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    place = start + json.loads(whole[8:start])[tensor]["data_offsets"][0] + bit // 8
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit % 8)]) + whole[place + 1 :])


def edited(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / file).read_text())
        change(record)
        (folder / file).write_text(json.dumps(record))

    return edit


def swapped(folder: Path) -> None:
    (folder / "layer_0").rename(folder / "x")
    (folder / "layer_1").rename(folder / "layer_0")
    (folder / "x").rename(folder / "layer_1")


def of_the_other_form(folder: Path) -> None:
    AdapterSet.from_pretrained(folder).normalized().save_pretrained(folder.with_name("normalized"))
    shutil.copytree(folder.with_name("normalized") / "layer_1", folder / "layer_1", dirs_exist_ok=True)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a high bit of W_enc": lambda f: flip(f / "layer_1" / WEIGHTS, "W_enc", 30),
    "the lowest bit of W_enc": lambda f: flip(f / "layer_0" / WEIGHTS, "W_enc", 0),
    "the lowest bit of W_dec": lambda f: flip(f / "layer_0" / WEIGHTS, "W_dec", 0),
    "a bit of the models' samples": lambda f: flip(f / SET_SAMPLES_FILE, "0.ln2_w", 3),
    "swapped layers": swapped,
    "a layer of the other form": of_the_other_form,
    "an edited cfg.json": edited("layer_1/cfg.json", lambda r: r.update(dtype="float16")),
    "an edited description": edited(SET_METADATA_FILE, lambda r: r.update(reads="normalized")),
    "another target": edited(SET_METADATA_FILE, lambda r: r.update(target="org/other")),
    "no samples": lambda f: (f / SET_SAMPLES_FILE).unlink(),
    "a cast layer": lambda f: save_file(
        {name: t.half().float() for name, t in load_file(f / "layer_0" / WEIGHTS).items()}, f / "layer_0" / WEIGHTS
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_mixed_damaged_and_edited_sets_are_refused(what: str, layers: list[int] | None, folder: Path) -> None:
    DAMAGE[what](folder)
    with pytest.raises(AdapterFormatError, match="mixed|edited"):
        AdapterSet.from_pretrained(folder, layers=layers)


def test_unknown_readings_have_no_default(folder: Path) -> None:
    for name in ("reads", "writes"):
        with pytest.raises(AdapterFormatError, match=f"{name} is 'mlp_in'; allowed is one of"):
            AdapterMetadata(**{name: "mlp_in"})
    record = json.loads((folder / SET_METADATA_FILE).read_text()) | {"reads": "resid_mid"}
    record.pop("sha256")
    (folder / SET_METADATA_FILE).write_text(json.dumps(record | {"sha256": record_hash(record)}))
    with pytest.raises(AdapterFormatError, match="reads is 'resid_mid'"):
        AdapterSet.from_pretrained(folder)


def as_the_first_release_wrote_it(folder: Path) -> None:
    """Version 2: no hashes, no samples, two fingerprints."""

    def older(record: dict) -> None:
        record.pop("sha256"), record.pop("files")
        record["schema_version"] = 2
        of_models(record["fingerprints"])

    def of_models(found: dict) -> None:
        for name in ("target_embedding_and_norms", "dtype", "base_dtype"):
            found.pop(name)

    edited(SET_METADATA_FILE, older)(folder)
    for cfg in folder.glob("layer_*/cfg.json"):
        edited(f"{cfg.parent.name}/cfg.json", lambda r: of_models(r["metadata"]["tl_adapters"]["fingerprints"]))(folder)
    kept = {name: t for name, t in load_file(folder / SET_SAMPLES_FILE).items() if not name.startswith("samples/")}
    save_file(kept, folder / SET_SAMPLES_FILE)


def test_sets_of_the_first_release_load_with_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_the_first_release_wrote_it(folder)
    with caplog.at_level(logging.WARNING, "tl_adapters"):
        found = AdapterSet.from_pretrained(folder)
        pair().load_adapters(found)
    assert len(caplog.records) == 1 and "neither hashes of its files nor samples" in caplog.records[0].message
    found.samples = pair().samples  # what the warning says to do
    found.save_pretrained(folder.with_name("again"))
    caplog.clear()
    pair().load_adapters(AdapterSet.from_pretrained(folder.with_name("again")))
    assert not caplog.records


@pytest.mark.parametrize("how", [swapped, of_the_other_form], ids=lambda f: f.__name__)
def test_what_can_be_seen_in_a_set_of_the_first_release_is_refused(how: Callable[[Path], None], folder: Path) -> None:
    how(folder)
    as_the_first_release_wrote_it(folder)
    with pytest.raises(AdapterFormatError, match="files of two sets were mixed"):
        AdapterSet.from_pretrained(folder, layers=[1])


def test_figures_that_are_no_plain_json_values_survive(adapters: AdapterSet, tmp_path: Path) -> None:
    about = replace(adapters.metadata, figures={"by layer": {3: 0.1, 12: 1 / 3}, "pair": (1, 2)})
    made = AdapterSet(list(adapters), adapters.layer_samples, about, samples=adapters.samples)
    made.save_pretrained(tmp_path / "a")
    assert AdapterSet.from_pretrained(tmp_path / "a").metadata.figures["pair"] == [1, 2]


def test_a_large_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    digest = file_hashes._digest
    monkeypatch.setattr(file_hashes, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "_digest", lambda path: (hashed.append(path), digest(path))[1])
    monkeypatch.setattr(file_hashes, "SETTLED_SECONDS", 0.0)
    large, link = tmp_path / "large", tmp_path / "link"
    large.write_bytes(bytes(file_hashes.CACHED_FROM_BYTES))
    link.symlink_to(large)
    first = file_hash(large)
    assert file_hash(large) == file_hash(link) == first and hashed == [large]
    with large.open("r+b") as file:  # one byte, and the size stays
        file.write(b"x")
    assert file_hash(large) != first and hashed == [large] * 2
    monkeypatch.setattr(
        file_hashes, "SETTLED_SECONDS", 60.0
    )  # changed this minute: a coarse clock might hide the next change
    large.write_bytes(bytes(file_hashes.CACHED_FROM_BYTES + 1))
    assert file_hash(large) == file_hash(large) and hashed == [large] * 4
    file_hashes.hash_cache_file().write_text("{ not json")
    monkeypatch.setattr(file_hashes, "SETTLED_SECONDS", 0.0)
    assert file_hash(large) == file_hash(large) and hashed == [large] * 5
    (tmp_path / "cache" / "tl_adapters" / "file_hashes.json").unlink()
    (tmp_path / "cache" / "tl_adapters").rmdir()
    (tmp_path / "cache" / "tl_adapters").write_text("")  # no folder can be made here
    assert file_hash(large) == file_hash(large) and hashed == [large] * 7
