"""What a feature store's folder holds, and what it was read on.

store.json               what it was read on, and the options
vocabulary.json          every token as text
effects/layer_N          direct effects of each feature on the logits (`effects`)
part-HASH/               documents and statistics; several until they are merged (`parts`)
agreement.json           how far the target's and the replacement's streams agree, once measured (`streams`)
labels.json              what the features are called, once they are (`labels`)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tl_adapters.adapters.feature_id import FeatureId, OwnedFeatureId, owned
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.data.chat_format import TRACE_REGIONS
from tl_adapters.data.tokens import single_token, token_text
from tl_adapters.features.feature import FeatureStoreError, Label, ResidualStream, UnitKind
from tl_adapters.features.layer_statistics import Part, layer_file
from tl_adapters.features.logit_effects import LayerEffects, layer_effects, written_rows
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.files import new_folder, remove_partials, write_text
from tl_adapters.utils.strict_json import dumps

STORE_SCHEMA_VERSION = 1
STORE_FILE, VOCABULARY_FILE, EFFECTS_FOLDER = "store.json", "vocabulary.json", "effects"
AGREEMENT_FILE, LABELS_FILE = "agreement.json", "labels.json"


@dataclass(frozen=True)
class StoreOptions:
    """How much is kept of each feature: memory and disk grow with these, not with the documents."""

    examples: int = 20
    """Strongest firings kept of each feature."""
    sample: int = 20
    """Random firings kept of each feature."""
    before: int = 16
    """Tokens of an example before the one that it was chosen for."""
    after: int = 8
    """Tokens after it."""
    neighbours: int = 16
    """Other features kept of each random firing, the strongest there."""
    neurons_per_token: int = 8
    """Neurons that count as firing on a token and layer, those that write most; adapters have no such limit."""
    seed: int = 0
    """Of the random firings."""
    tokens_per_batch: int = 4096
    """Tokens in a forward pass, padding included."""
    tokens_per_part: int = 5_000_000
    """Tokens between two writes to the disk; the documents are held meanwhile."""

    def __post_init__(self) -> None:
        for name, lowest in (("examples", 1), ("sample", 1), ("before", 0), ("after", 0), ("neighbours", 0)):
            _require_at_least(name, getattr(self, name), lowest)
        for name in ("neurons_per_token", "tokens_per_batch", "tokens_per_part"):
            _require_at_least(name, getattr(self, name), 1)


def _require_at_least(name: str, given: int, lowest: int) -> None:
    if given < lowest:
        raise FeatureStoreError(f"{name} is {given}; allowed is a whole number >= {lowest}.")


@dataclass(frozen=True)
class StoreDescription:
    """What a store was read on."""

    kind: UnitKind
    """Adapter features, or the target's MLP neurons."""
    stream: ResidualStream
    """Whose residual stream they read."""
    split: str
    """What the documents are called."""
    base: str
    """Id or folder of the base."""
    target: str
    """Id or folder of the target."""
    layers: list[int]
    """The layers."""
    n_features: int
    """Features, or neurons, of each."""
    fingerprints: dict[str, str]
    """Content hashes of adapters, base and target."""
    words: list[str]
    """Tokens whose logit effects are kept one by one."""
    options: StoreOptions = field(default_factory=StoreOptions)
    """How much is kept."""
    regions: list[str] = field(default_factory=lambda: list(TRACE_REGIONS))
    """Regions of a trace, in the order of the counts."""

    @classmethod
    def of(
        cls,
        pair: PairedModel,
        kind: UnitKind,
        stream: ResidualStream,
        split: str,
        options: StoreOptions,
        words: Sequence[str],
    ) -> StoreDescription:
        """The description of what is about to be collected. Raises UserError for a word that is no single token."""
        for word in words:
            single_token(pair.model.tokenizer, word)
        if kind == "neuron":
            layers, n_features, marks = list(range(pair.n_layers)), pair.model.cfg.d_mlp, {}
        else:
            adapters = pair.installed_adapters()
            layers, n_features, marks = adapters.layer_indices, adapters.n_features, adapters.fingerprints
        fingerprints = {**pair.fingerprints, **marks}
        return cls(
            kind, stream, split, pair.base_id, pair.target_id, layers, n_features, fingerprints, list(words), options
        )

    @property
    def n_flat(self) -> int:
        """Features of all layers together."""
        return len(self.layers) * self.n_features

    def id_of(self, flat: int) -> FeatureId:
        """The feature of a number counted through all layers."""
        return self.own(self.layers[flat // self.n_features], flat % self.n_features)

    def own(self, layer: int, index: int) -> OwnedFeatureId:
        """A feature that knows its adapters; a neuron is a feature of none."""
        return owned((layer, index), self.fingerprints if self.kind == "feature" else {})


def open_store(pair: PairedModel, folder: Path, description: StoreDescription, *, first: bool = True) -> list[Part]:
    """Make a store's folder, or see that the one there is of the same kind; the parts in it.

    Args:
        pair: whose features these are.
        folder: made where it does not exist.
        description: what is about to be collected.
        first: write the effects too; of several processes one does.

    Raises FeatureStoreError where the folder holds a store of something else.
    """
    if (folder / STORE_FILE).is_file():
        _require_same(folder, read_description(folder), description)
    elif folder.exists() and any(not f.name.startswith(".") for f in folder.iterdir()):
        raise FeatureStoreError(f"{folder} is there already and is no feature store; choose another folder.")
    else:
        vocabulary = vocabulary_of(pair)
        write_text(folder / VOCABULARY_FILE, dumps(vocabulary))
        record = {"schema_version": STORE_SCHEMA_VERSION, **asdict(description)}
        write_text(folder / STORE_FILE, dumps(record, indent=1) + "\n")
    if first and not (folder / EFFECTS_FOLDER).is_dir():
        remove_partials(folder / EFFECTS_FOLDER)
        with new_folder(folder / EFFECTS_FOLDER) as out:
            for layer, effects in effects_of(pair, description):
                save_file({k: t.contiguous() for k, t in effects._asdict().items()}, out / layer_file(layer))
    return parts_in(folder)


def parts_in(folder: Path) -> list[Part]:
    """The parts in a store's folder, without those that another one holds already."""
    parts = [Part.open(path) for path in sorted(folder.glob("part-*")) if path.is_dir()]
    held = [set(part.totals.covers) for part in parts]
    return [part for part, mine in zip(parts, held, strict=True) if not any(mine < other for other in held)]


def held_elsewhere(folder: Path) -> list[Path]:
    """Folders of the parts that another one holds already: merged, and no longer needed."""
    kept = {part.folder for part in parts_in(folder)}
    return [path for path in folder.glob("part-*") if path.is_dir() and path not in kept]


def read_description(folder: Path) -> StoreDescription:
    """What a store was read on. Raises FeatureStoreError where the folder holds none."""
    try:
        record = json.loads((folder / STORE_FILE).read_text())
        if (version := record.pop("schema_version")) != STORE_SCHEMA_VERSION:
            raise FeatureStoreError(
                f"{folder} has schema_version {version}; this version reads {STORE_SCHEMA_VERSION}."
            )
        return StoreDescription(**{**record, "options": StoreOptions(**record["options"])})
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FeatureStoreError):
            raise
        raise FeatureStoreError(
            f"{folder} holds no feature store ({error}); make one with collect_features, or tl-adapters features RUN."
        ) from error


def _require_same(folder: Path, there: StoreDescription, now: StoreDescription) -> None:
    # How the work is cut up changes nothing in the result.
    free = {"tokens_per_batch": 0, "tokens_per_part": 0}
    for name in (f.name for f in fields(StoreDescription)):
        was, is_ = getattr(there, name), getattr(now, name)
        if name in ("base", "target"):  # what models are called may change; what they are is in the fingerprints
            continue
        if name == "fingerprints":
            differs = differing(was, is_)
            if "dtype" in was and was["dtype"] != is_["dtype"]:
                differs.append("dtype")
            was, is_ = ({key: prints.get(key) for key in differs} for prints in (was, is_))
        if name == "options":
            was, is_ = ({**asdict(options), **free} for options in (was, is_))
        if was != is_:
            raise FeatureStoreError(
                f"The store in {folder} was read with {name} {was!r}; asked for is {is_!r}. One store means one thing: "
                "give another folder."
            )


def vocabulary_of(pair: PairedModel) -> list[str]:
    """Every token's text."""
    return [token_text(pair.model.tokenizer, token) for token in range(pair.model.cfg.d_vocab)]


def effects_of(pair: PairedModel, description: StoreDescription) -> Iterator[tuple[int, LayerEffects]]:
    """The direct effects of every layer's features, one layer at a time."""
    words = [single_token(pair.model.tokenizer, word) for word in description.words]
    for layer, rows in written_rows(pair, description.kind, description.layers):
        yield layer, layer_effects(pair, layer, rows, words)


def read_effects(folder: Path | None, layer: int) -> LayerEffects:
    """Effects of one layer from a store's folder. Raises FeatureStoreError."""
    assert folder is not None
    path = folder / EFFECTS_FOLDER / layer_file(layer)
    if not path.is_file():
        raise FeatureStoreError(f"{path} is missing; collect into this folder again, which adds it.")
    return LayerEffects(**load_file(path))


def read_plain(path: Path) -> Any:
    """What a JSON file of a store holds. Raises FeatureStoreError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FeatureStoreError(f"{path} is missing or damaged ({error}); collect into a new folder.") from error


def read_labels(path: Path) -> dict[FeatureId, Label]:
    """Labels as `FeatureStore.set_labels` wrote them. Raises FeatureStoreError."""
    try:
        return {FeatureId(*map(int, name.split("."))): Label(**label) for name, label in read_plain(path).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FeatureStoreError(f"{path} cannot be read ({error}); remove it and label again.") from error
