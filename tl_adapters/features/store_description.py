"""The options of a feature store, and the description of the models and documents that it was collected on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tl_adapters.adapters.feature_id import FeatureId, OwnedFeatureId, owned
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.data.tokens import single_token
from tl_adapters.data.trace_regions import TRACE_REGIONS
from tl_adapters.features.feature import FeatureStoreError, ResidualStream, UnitKind
from tl_adapters.local_stage.signal_to_noise import SignalToNoise
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.reading import UnreadableFileError, as_dataclass, shown

COLLECT_AGAIN = "Copy the store again, or collect into a new folder (tl-adapters features RUN)."
"""The way out for a damaged store."""
_COACTIVATING_KEY = "neighbours"
"""Key of `StoreOptions.coactivating` in store.json, as the first release wrote it."""


@dataclass(frozen=True)
class StoreOptions:
    """How much a store keeps of each feature. Memory and disk grow with these options, not with the documents.

    Raises FeatureStoreError for a number that is out of range.
    """

    examples: int = 20
    """Top activating examples kept of each feature."""
    sample: int = 20
    """Random firings kept of each feature."""
    before: int = 16
    """Tokens of an example before the token that it was chosen for."""
    after: int = 8
    """Tokens of an example after that token."""
    coactivating: int = 16
    """Other features kept with each random firing: the strongest on the same token."""
    neurons_per_token: int = 8
    """MLP neurons that count as firing on a token and layer: those that write most. Adapters have no such limit."""
    seed: int = 0
    """Seed of the random sample of firings."""
    tokens_per_batch: int = 4096
    """Tokens in a forward pass, padding included."""
    tokens_per_part: int = 5_000_000
    """Tokens between two writes to the disk. The documents of a part are held in memory until it is written."""

    def __post_init__(self) -> None:
        for name, lowest in (("examples", 1), ("sample", 1), ("before", 0), ("after", 0), ("coactivating", 0)):
            _require_at_least(name, getattr(self, name), lowest)
        for name in ("neurons_per_token", "tokens_per_batch", "tokens_per_part"):
            _require_at_least(name, getattr(self, name), 1)


def _require_at_least(name: str, given: int, lowest: int) -> None:
    if given < lowest:
        raise FeatureStoreError(f"{name} is {given}; allowed is a whole number >= {lowest}.")


@dataclass(frozen=True)
class StoreDescription:
    """The features, models and documents of a store."""

    kind: UnitKind
    """Adapter features, or neurons of the target's MLP."""
    stream: ResidualStream
    """The model whose residual stream the features are read on."""
    split: str
    """Name of the documents."""
    base: str
    """Id or folder of the base."""
    target: str
    """Id or folder of the target."""
    layers: list[int]
    """Layers that have features."""
    n_features: int
    """Features, or neurons, of each layer."""
    fingerprints: dict[str, str]
    """Weight fingerprints that identify the adapters, the base and the target."""
    words: list[str]
    """Tokens whose logit effects are kept one by one."""
    options: StoreOptions = field(default_factory=StoreOptions)
    """How much is kept."""
    regions: list[str] = field(default_factory=lambda: list(TRACE_REGIONS))
    """Regions of a trace, in the order of the counts."""
    signal_to_noise: list[SignalToNoise] | None = None
    """The difference of base and target beside the rounding of weights, by layer, on the first documents; None for
    neurons, for a target without a base, and in stores of earlier versions."""

    @classmethod
    def of(
        cls,
        pair: PairedModel,
        kind: UnitKind,
        stream: ResidualStream,
        split: str,
        options: StoreOptions,
        words: Sequence[str],
        signal_to_noise: list[SignalToNoise] | None = None,
    ) -> StoreDescription:
        """The description of a collection that is about to start; arguments are its fields.

        Raises:
            UserError: a word is not a single token.
        """
        for word in words:
            single_token(pair.model.tokenizer, word)
        if kind == "neuron":
            layers, n_features, adapter_fingerprints = list(range(pair.n_layers)), pair.model.cfg.d_mlp, {}
        else:
            adapters = pair.installed_adapters()
            layers, n_features = adapters.layer_indices, adapters.n_features
            adapter_fingerprints = adapters.fingerprints
        fingerprints = {**pair.fingerprints, **adapter_fingerprints}
        models = (pair.base_id, pair.target_id, layers, n_features, fingerprints)
        return cls(kind, stream, split, *models, list(words), options, signal_to_noise=signal_to_noise)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], path: Path) -> StoreDescription:
        """The description that `to_json` wrote into a file. Raises UnreadableFileError for anything else."""
        options = record.get("options")
        if isinstance(options, Mapping) and _COACTIVATING_KEY in options:
            others = {name: value for name, value in options.items() if name != _COACTIVATING_KEY}
            record = {**record, "options": {**others, "coactivating": options[_COACTIVATING_KEY]}}
        description = as_dataclass(cls, record, str(path), COLLECT_AGAIN)
        layers = description.layers
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or description.n_features < 1:
            raise UnreadableFileError(
                f"{path}: layers is {shown(layers)} and n_features is {description.n_features}; allowed are ascending "
                f"layers and at least one feature. {COLLECT_AGAIN}"
            )
        return description

    def to_json(self) -> dict[str, Any]:
        """The description as store.json holds it."""
        options = {
            _COACTIVATING_KEY if name == "coactivating" else name: value for name, value in vars(self.options).items()
        }
        return {**asdict(self), "options": options}

    @property
    def total_features(self) -> int:
        """Number of features of all layers together."""
        return len(self.layers) * self.n_features

    def id_of(self, flat: int) -> FeatureId:
        """The feature whose number, counted through all layers, is ``flat``."""
        return self.owned_id(self.layers[flat // self.n_features], flat % self.n_features)

    def owned_id(self, layer: int, index: int) -> OwnedFeatureId:
        """A feature id that carries the fingerprint of its adapters; a neuron's id carries none."""
        return owned((layer, index), self.fingerprints if self.kind == "feature" else {})

    def require_same(self, new: StoreDescription, folder: object) -> None:
        """Check that a collection described by ``new`` can be added to this store, which lies in ``folder``.

        Raises:
            FeatureStoreError: the two differ in something that changes what the store means.
        """
        # How the work is split into batches and parts does not change the result.
        irrelevant = {"tokens_per_batch": 0, "tokens_per_part": 0}
        for name in (f.name for f in fields(StoreDescription)):
            stored, given = getattr(self, name), getattr(new, name)
            if name in ("base", "target", "signal_to_noise"):  # of models that are moved or renamed; of other documents
                continue
            if name == "fingerprints":
                differs = differing(stored, given)
                if "dtype" in stored and stored["dtype"] != given["dtype"]:
                    differs.append("dtype")
                stored, given = ({key: prints.get(key) for key in differs} for prints in (stored, given))
            if name == "options":
                stored, given = ({**asdict(options), **irrelevant} for options in (stored, given))
            if stored != given:
                raise FeatureStoreError(
                    f"The store in {folder} was collected with {name} {stored!r}, and this collection has {given!r}. "
                    "A store holds one kind of collection: give another folder."
                )
