"""A circuit as a file: which features of one set of adapters do a behavior, in which role, and with what effect.

The file is a small JSON file that records the fingerprints of the adapters and models, so a circuit is refused on other
adapters. It is kept in a run (circuit.json), and on the hub in the repository of its adapters (circuits/NAME.json).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from huggingface_hub import HfApi
from pydantic import Field
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped,unused-ignore]

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId, owned
from tl_adapters.adapters.transcoder import unit_rows
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.checkpoints.hub_client import hub_errors, require_repository_name
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.files import plain_file, write_text
from tl_adapters.utils.html import render
from tl_adapters.utils.notebook import ResultRecord, drawing_view, rows_frame
from tl_adapters.utils.reading import Record, read_record, unreadable_as
from tl_adapters.utils.renamed import renamed_arguments, renamed_attributes
from tl_adapters.utils.results import plain
from tl_adapters.utils.strict_json import dumps

if TYPE_CHECKING:
    from pandas import DataFrame

CIRCUIT_SCHEMA_VERSION = 2
"""Version that is written; 1 is read, too. Files of version 1 have neither the tokens of the words nor the name of the
function that found them."""
CIRCUIT_FILE = "circuit.json"
CIRCUIT_HUB_FILE = "circuits/{}.json"
"""Path of a circuit's file in a repository, with its name filled in."""
SAME_DIRECTION_COSINE = 0.8
"""Two features of a layer write the same direction if the cosine of their decoder rows is larger than this."""
Role = Literal["output", "template", "continuation", "other", "suppress"]
ROLES: tuple[Role, ...] = get_args(Role)
PROMOTING_ROLES: tuple[Role, ...] = ("output", "template", "continuation", "other")
"""Roles of features that promote the behavior; `Circuit.ids` returns these where no role is named."""
EFFECT_NAMES = ("direct", "through output", "total", "on continuation", "onsets less controls")
"""Names of `CircuitFeature.effects` in tables."""
_MAX_ROWS = 20
"""Features and words that a notebook shows."""
_NUMBER_KEYS = {
    "direct": "direct",
    "through": "through",
    "total": "total",
    "continuation": "follows",
    "contrast": "contrast",
    "activation": "mass",
}
"""Numbers of a `CircuitFeature` -> their keys in the file."""


class CircuitError(UserError, ValueError):
    """A circuit that cannot be read, or that belongs to other adapters."""


@renamed_attributes(follows="continuation", mass="activation")
@dataclass(frozen=True)
class CircuitFeature:
    """A feature of a circuit with its role and its effects. Effects are in nats of the word's log-odds."""

    id: FeatureId
    """Layer and index."""
    role: Role
    """ "output" raises the word directly, "template" through output features, "continuation" raises what follows it,
    "other" does none of these by itself; "suppress" lowers the word."""
    direct: float
    """Mean direct effect at the onsets: what the feature writes there, read by the unembedding."""
    through: float
    """Mean effect at the onsets through output features."""
    total: float
    """Mean effect at the onsets along all paths."""
    continuation: float
    """Mean effect on the log-odds of the tokens that come after the word, along all paths."""
    contrast: float
    """``total`` at the onsets less ``total`` at matched control positions."""
    activation: float
    """Mean activation at the onsets, in decoder-norm units."""

    @property
    def effects(self) -> tuple[float, ...]:
        """All effects, in the order of `EFFECT_NAMES`."""
        return (self.direct, self.through, self.total, self.continuation, self.contrast)

    @property
    def sign(self) -> int:
        """1 if the feature raises the word in total, -1 if it lowers it, 0 if neither."""
        return (self.total > 0) - (self.total < 0)


@dataclass(frozen=True)
class CircuitEdge:
    """An effect of a feature of a circuit on another feature or on the word."""

    source: FeatureId
    """The feature that has the effect."""
    target: FeatureId | None
    """The feature that is affected; None is the word."""
    weight: float
    """Size of the effect, in nats of the word's log-odds."""


@dataclass(frozen=True)
class CircuitComparison(ResultRecord):
    """Two circuits of one set of adapters, compared by their features."""

    shared: tuple[FeatureId, ...]
    """Features in both."""
    only_a: tuple[FeatureId, ...]
    """Features in the first only."""
    only_b: tuple[FeatureId, ...]
    """Features in the second only."""
    jaccard: float
    """Shared features as a share of all; NaN for two empty circuits."""
    role_agreement: float
    """Share of the shared features that have the same role in both; NaN where none is shared."""


@renamed_attributes(behaviour="behavior", push="push_to_hub")
@dataclass(frozen=True)
class Circuit:
    """The features that do a behavior, with the fingerprints of the adapters and models that they belong to."""

    behavior: str
    """Name of the behavior, such as "hesitation"."""
    words: tuple[str, ...]
    """Words and phrases whose log-odds the effects are measured on."""
    features: tuple[CircuitFeature, ...]
    """All features, suppressors included."""
    strength: float
    """Factor of the activations with which the circuit was searched, where it is inserted into the hybrid."""
    split: str
    """Split of the documents on which the circuit was found."""
    fingerprints: dict[str, str]
    """Content hashes of "adapters" (to which the features belong), "target" and "base_mlps"."""
    n_features: int
    """Features per layer of the adapters."""
    n_layers: int
    """Layers of the model."""
    threshold: float
    """Direct effect, in nats, from which a feature is an output feature."""
    edges: tuple[CircuitEdge, ...] = field(default=(), repr=False)
    """Effects between features, where they were measured."""
    phrases: tuple[tuple[int, ...], ...] = ()
    """The tokens of each of the words, in their order; empty for a file of version 1, which does not have them."""
    function: str | None = None
    """The name of the function that defines the behavior; None where words do."""

    def __post_init__(self) -> None:
        # Every feature id carries the fingerprint of its adapters, so that other adapters refuse it.
        own = tuple(replace(f, id=owned(f.id, self.fingerprints)) for f in self.features)
        object.__setattr__(self, "features", own)

    def __len__(self) -> int:
        return len(self.features)

    def ids(self, *roles: Role) -> list[FeatureId]:
        """Return the features of some roles, sorted; without roles, those of all promoting roles.

        Raises CircuitError for an unknown role.
        """
        if unknown := set(roles) - set(ROLES):
            raise CircuitError(f"There is no role {sorted(unknown)[0]!r}; the roles are {', '.join(ROLES)}.")
        return sorted(f.id for f in self.features if f.role in (roles or PROMOTING_ROLES))

    def feature(self, id: FeatureId | tuple[int, int]) -> CircuitFeature:
        """Return one of the features. Raises CircuitError for a feature that is not in the circuit."""
        feature = next((f for f in self.features if f.id == tuple(id)), None)
        if feature is None:
            raise CircuitError(f"Feature {id[0]}.{id[1]} is not in this circuit of {len(self)} features.")
        return feature

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the circuit atomically, into a folder as circuit.json or into the named .json file; return the file.

        Raises DiskFullError.
        """
        path = Path(path) if Path(path).suffix == ".json" else Path(path) / CIRCUIT_FILE
        write_text(path, self.json_text())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote, from a folder or a file.

        Raises CircuitError where there is no file, where it is damaged, or of a version that is not read.
        """
        path = Path(path) / CIRCUIT_FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise CircuitError(f"There is no circuit at {path}. Find one with: tl-adapters hesitation RUN.")
        with unreadable_as(CircuitError):
            return _circuit_of(read_record(_CircuitRecord, path, _ADVICE), path)

    @classmethod
    @renamed_arguments(repo="repo_id")
    def from_hub(
        cls, repo_id: str, name: str = "hesitation", *, revision: str | None = None, token: str | None = None
    ) -> Circuit:
        """Download a circuit from the repository of its adapters.

        Args:
            repo_id: "user/name", or a folder laid out as a repository.
            name: of the circuit: the file is circuits/NAME.json.
            revision, token: as `AdapterSet.from_pretrained`.

        Raises:
            CircuitError: the name is not allowed, or the repository has no such circuit, or a damaged one.
            CheckpointError: no such repository, no network.
        """
        file = _hub_file(name)
        path = plain_file(fetch(repo_id, [file], revision=revision, token=token), *file.split("/"))
        if not path.is_file():
            raise CircuitError(f"{repo_id} holds no circuit {name!r} ({file}). Push one with Circuit.push_to_hub.")
        return cls.load(path)

    @renamed_arguments(repo="repo_id")
    def push_to_hub(
        self, repo_id: str, name: str = "hesitation", *, revision: str | None = None, token: str | None = None
    ) -> str:
        """Upload the circuit into the repository of its adapters, which must exist; return the commit's address.

        Args:
            repo_id: "user/name".
            name: of the circuit: the file is circuits/NAME.json.
            revision: branch to commit to; None is the main one.
            token: None takes HF_TOKEN or the stored login.

        Raises:
            CircuitError: the name is not allowed.
            HubError: no permission, no such repository, no network.
        """
        file = _hub_file(name)
        require_repository_name(repo_id)
        with hub_errors(f"The hub did not take {file} into {repo_id}, which holds its adapters", repo_id, upload=True):
            commit = HfApi(token=token).upload_file(
                path_or_fileobj=self.json_text().encode(),
                path_in_repo=file,
                repo_id=repo_id,
                revision=revision,
                commit_message=f"The {self.behavior} circuit",
            )
        return str(commit.commit_url)

    def json_text(self) -> str:
        """The content of circuit.json."""
        fields = plain(asdict(self), null=True)
        record = {"schema_version": CIRCUIT_SCHEMA_VERSION, "behaviour": fields.pop("behavior"), **fields}
        record["features"] = [
            {_NUMBER_KEYS.get(name, name): value for name, value in feature.items()} for feature in record["features"]
        ]
        return dumps(record, indent=1) + "\n"

    # -- beside adapters and other circuits -----------------------------------------------------------------------

    def require_belonging(self, pair: PairedModel) -> None:
        """Raise CircuitError where the circuit belongs to other adapters or models than the pair's.

        Interventions check only the adapters (`AdapterSet.require_own`), which belong to the pair they are loaded in.

        Raises PairMismatchError where the pair has no adapters.
        """
        self._require_adapters(
            {**pair.fingerprints, **pair.installed_adapters().fingerprints}, "the pair's adapters are"
        )

    def compare(self, other: Circuit) -> CircuitComparison:
        """Compare the circuit with another circuit of the same adapters, suppressors included.

        Raises CircuitError for other adapters: a feature index has a meaning only in one set.
        """
        self._require_adapters(other.fingerprints, "the other circuit is of")
        ours, theirs = ({f.id: f.role for f in c.features} for c in (self, other))
        shared, every = sorted(ours.keys() & theirs.keys()), ours.keys() | theirs.keys()
        alike = sum(ours[id] == theirs[id] for id in shared)
        return CircuitComparison(
            shared=tuple(shared),
            only_a=tuple(sorted(ours.keys() - theirs.keys())),
            only_b=tuple(sorted(theirs.keys() - ours.keys())),
            jaccard=len(shared) / len(every) if every else math.nan,
            role_agreement=alike / len(shared) if shared else math.nan,
        )

    @torch.no_grad()
    def distinct_directions(self, adapters: AdapterSet, cosine: float = SAME_DIRECTION_COSINE) -> int:
        """Return the number of distinct directions that the promoting features write.

        Two features of a layer count as one direction if a chain of decoder rows leads from one to the other, each with
        a cosine to the next that is larger than ``cosine``.

        Raises CircuitError for other adapters.
        """
        self._require_adapters(adapters.fingerprints, "these adapters are")
        by_layer: dict[int, list[int]] = {}
        for layer, index in self.ids():
            by_layer.setdefault(layer, []).append(index)
        n_directions = 0
        for layer, indices in by_layer.items():
            rows = unit_rows(adapters[layer].W_dec[indices].float())
            n_directions += int(connected_components((rows @ rows.T > cosine).cpu().numpy(), directed=False)[0])
        return n_directions

    def _require_adapters(self, theirs: Mapping[str, str], whose: str) -> None:
        ours = self.fingerprints.get("adapters")
        differs = differing(self.fingerprints, theirs)
        if ours is None or "adapters" not in theirs or any(name.startswith("adapters") for name in differs):
            raise CircuitError(
                f"This circuit is of adapters {ours}, and {whose} {theirs.get('adapters')}. A feature index has a "
                "meaning only in one set of adapters. Load the adapters in which the circuit was found, or find a "
                "circuit in these (tl-adapters hesitation RUN)."
            )
        if differs:
            raise CircuitError(
                f"This circuit was found in a pair whose {' and '.join(differs)} have other fingerprints than those of "
                "this pair, so its effects differ here. Open the pair in which it was found, or find a circuit in this "
                "one."
            )

    @property
    def _counts(self) -> str:
        """The number of features by role, in words."""
        counts = Counter(f.role for f in self.features)
        return ", ".join(f"{counts[role]} {role}" for role in ROLES if counts[role]) or "no features"

    def __repr__(self) -> str:
        return f"Circuit of {self.behavior!r} ({', '.join(map(repr, self.words)) or self.function}): {self._counts}"

    def to_dict(self) -> dict[str, Any]:
        """The circuit as circuit.json holds it; numbers that are not defined are None."""
        return json.loads(self.json_text())

    def to_pandas(self) -> DataFrame:
        """The features as a DataFrame: layer, index and the other fields of `CircuitFeature`, in nats."""
        rows = [{**plain(f), "layer": f.id.layer, "index": f.id.index} for f in self.features]
        return rows_frame(rows, ["layer", "index", *(field.name for field in fields(CircuitFeature)[1:])])

    def _repr_html_(self) -> str:
        from tl_adapters.pages.circuit_diagram import CIRCUIT_CAPTION, draw_circuit

        drawing = drawing_view(draw_circuit(self), CIRCUIT_CAPTION) if self.features else ""
        strongest = sorted(self.features, key=lambda f: -_size(f.total))[:_MAX_ROWS]
        return drawing + render(
            "notebook/circuit.html.j2",
            behavior=self.behavior,
            words=[repr(word) for word in self.words[:_MAX_ROWS]],
            function=self.function,
            roles=self._counts,
            header=["feature", "role", *EFFECT_NAMES, "activation"],
            rows=[
                [f"{f.id.layer}.{f.id.index}", f.role, *(f"{x:+.3g}" for x in f.effects), f"{f.activation:.3g}"]
                for f in strongest
            ],
            more=len(self) - _MAX_ROWS,
        )


_ADVICE = "Copy or download it again."
_Id = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class _FeatureRecord(Record):
    """A feature in the file; null stands for NaN."""

    id: _Id
    role: Role
    direct: float | None
    through: float | None
    total: float | None
    continuation: float | None = Field(alias="follows")
    contrast: float | None
    activation: float | None = Field(alias="mass")


class _EdgeRecord(Record):
    """An edge in the file."""

    source: _Id
    target: _Id | None
    weight: float | None


class _CircuitRecord(Record):
    """circuit.json."""

    schema_version: Literal[1, 2]
    behavior: str = Field(alias="behaviour")
    words: tuple[str, ...]
    features: tuple[_FeatureRecord, ...]
    strength: float | None
    split: str
    fingerprints: dict[str, str]
    n_features: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    threshold: float | None
    edges: tuple[_EdgeRecord, ...]
    phrases: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = ()
    function: str | None = None


def _circuit_of(record: _CircuitRecord, path: Path) -> Circuit:
    """The circuit in a file. Raises CircuitError for features that the adapters do not have, or that occur twice."""
    ids = [feature.id for feature in record.features]
    ends = [end for edge in record.edges for end in (edge.source, edge.target) if end is not None]
    for layer, index in (*ids, *ends):
        if layer >= record.n_layers or index >= record.n_features:
            raise CircuitError(
                f"{path} is damaged: there is no feature {layer}.{index} in {record.n_layers} layers of "
                f"{record.n_features} features. {_ADVICE}"
            )
    if len(set(ids)) < len(ids):
        raise CircuitError(f"{path} is damaged: a feature is in it twice. {_ADVICE}")
    return Circuit(
        behavior=record.behavior,
        words=record.words,
        features=tuple(
            CircuitFeature(FeatureId(*f.id), f.role, *(_number(getattr(f, name)) for name in _NUMBER_KEYS))
            for f in record.features
        ),
        strength=_number(record.strength),
        split=record.split,
        fingerprints=record.fingerprints,
        n_features=record.n_features,
        n_layers=record.n_layers,
        threshold=_number(record.threshold),
        edges=tuple(
            CircuitEdge(FeatureId(*e.source), e.target and FeatureId(*e.target), _number(e.weight))
            for e in record.edges
        ),
        phrases=record.phrases,
        function=record.function,
    )


def _number(value: float | None) -> float:
    """A float as `plain` wrote it: null is NaN."""
    return math.nan if value is None else value


def _size(value: float) -> float:
    """Absolute value for sorting, with NaN last."""
    return abs(value) if math.isfinite(value) else 0.0


def _hub_file(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise CircuitError(f"{name!r} is not a valid name of a circuit; use letters, digits, '_', '.' and '-'.")
    return CIRCUIT_HUB_FILE.format(name)
