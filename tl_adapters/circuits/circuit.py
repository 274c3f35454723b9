"""A circuit as an artefact: which features of one set of adapters do a behaviour, in which role, and with what effect.

It is a small JSON file that says whose features it numbers, so it is refused on other adapters. It lies in a run
(circuit.json) and goes up beside the adapters (circuits/NAME.json in their repository of the hub).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped,unused-ignore]

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId, owned
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.errors import UserError
from tl_adapters.interop.hub import HubError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import escape, table
from tl_adapters.utils.results import plain
from tl_adapters.utils.strict_json import dumps

CIRCUIT_SCHEMA_VERSION, CIRCUIT_READABLE_VERSIONS = 2, (1, 2)
"""Version 1 does not say which tokens the words are, nor which function found them."""
CIRCUIT_FILE = "circuit.json"
HUB_FILE = "circuits/{}.json"
SAME_DIRECTION = 0.8
"""Above this cosine of their decoder rows two features of a layer write the same direction."""
Role = Literal["output", "template", "continuation", "other", "suppress"]
ROLES: tuple[Role, ...] = get_args(Role)
PROMOTING: tuple[Role, ...] = ("output", "template", "continuation", "other")
"""The roles of what was found to do the behaviour; what `Circuit.ids` gives where no role is named."""
EFFECTS = ("direct", "through output", "total", "on what follows", "over boundaries")
"""What tables call `CircuitFeature.effects`."""
_SHOWN = 20
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
    """A circuit that cannot be read, or that is not of the adapters it is asked of."""


@dataclass(frozen=True)
class CircuitFeature:
    """One feature of a circuit: what it does, and how strongly. Effects are in nats of the word's log-odds."""

    id: FeatureId
    """Layer and index."""
    role: Role
    """ "output" raises the word itself, "template" through output features, "continuation" what the word begins,
    "other" none of these by itself; "suppress" lowers the word."""
    direct: float
    """Mean direct effect at the moments: what it writes, read by the unembedding."""
    through: float
    """Mean effect at the moments through output features."""
    total: float
    """Mean effect at the moments along all paths."""
    continuation: float
    """Mean effect on the log-odds of the tokens that come after the word, along all paths."""
    contrast: float
    """``total`` at the moments less that at matched boundaries, where the word could come and does not."""
    activation: float
    """Mean activation at the moments, in decoder-norm units."""

    @property
    def effects(self) -> tuple[float, ...]:
        """All that are in nats, in the order of `EFFECTS`."""
        return (self.direct, self.through, self.total, self.continuation, self.contrast)

    @property
    def sign(self) -> int:
        """1 if it raises the word in total, -1 if it lowers it, 0 if neither."""
        return (self.total > 0) - (self.total < 0)


@dataclass(frozen=True)
class CircuitEdge:
    """One effect between features of a circuit, or of one on the word."""

    source: FeatureId
    """Whose effect it is."""
    target: FeatureId | None
    """On which feature; None is the word."""
    weight: float
    """How much, in nats of the word's log-odds."""


@dataclass(frozen=True)
class CircuitComparison:
    """What two circuits of one set of adapters have in common."""

    shared: tuple[FeatureId, ...]
    """In both."""
    only_a: tuple[FeatureId, ...]
    """In the first only."""
    only_b: tuple[FeatureId, ...]
    """In the second only."""
    jaccard: float
    """Shared features as a share of all; NaN for two empty circuits."""
    role_agreement: float
    """Share of the shared features that have the same role in both; NaN where none is shared."""


@dataclass(frozen=True)
class Circuit:
    """The features that do a behaviour, with what is needed to put them to work and to know whose they are."""

    behaviour: str
    """What they do, such as "hesitation"."""
    words: tuple[str, ...]
    """The words and phrases whose log-odds the effects are on."""
    features: tuple[CircuitFeature, ...]
    """All of them, suppressors included."""
    strength: float
    """Factor at which the set is inserted where it is not at home."""
    split: str
    """Split of the documents that it was found on."""
    fingerprints: dict[str, str]
    """Content hashes: "adapters", whose features these are; "target" and "base_mlps"."""
    n_features: int
    """Features per layer of the adapters."""
    n_layers: int
    """Layers of the model."""
    threshold: float
    """Direct effect, in nats, from which a feature is an output feature."""
    edges: tuple[CircuitEdge, ...] = field(default=(), repr=False)
    """Effects among them, where they were measured."""
    phrases: tuple[tuple[int, ...], ...] = ()
    """The tokens of each of the words, in their order; empty where a file of version 1 does not say them."""
    function: str | None = None
    """The name of the function that found the behaviour; None where words are said."""

    def __post_init__(self) -> None:
        # However its features are taken out, they know whose they are, so that no other adapters take them.
        own = tuple(replace(f, id=owned(f.id, self.fingerprints)) for f in self.features)
        object.__setattr__(self, "features", own)

    def __len__(self) -> int:
        return len(self.features)

    def ids(self, *roles: Role) -> list[FeatureId]:
        """Features of these roles, sorted; without any, of all promoting ones (suppressors must be named)."""
        if unknown := set(roles) - set(ROLES):
            raise CircuitError(f"No role {sorted(unknown)[0]!r}; there are {', '.join(ROLES)}.")
        return sorted(f.id for f in self.features if f.role in (roles or PROMOTING))

    def feature(self, id: FeatureId | tuple[int, int]) -> CircuitFeature:
        """One of them. Raises CircuitError for a feature that is not in the circuit."""
        found = next((f for f in self.features if f.id == tuple(id)), None)
        if found is None:
            raise CircuitError(f"Feature {id[0]}.{id[1]} is not in this circuit of {len(self)} features.")
        return found

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write it whole or not at all: into a folder as circuit.json, or as the .json file named. Returns the file.

        Raises DiskFullError.
        """
        path = Path(path) if Path(path).suffix == ".json" else Path(path) / CIRCUIT_FILE
        write_text(path, self._json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote, from the folder or the file.

        Raises CircuitError where there is none, where it is damaged, or of another version.
        """
        path = Path(path) / CIRCUIT_FILE if Path(path).is_dir() else Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CircuitError(f"There is no circuit at {path}; tl-adapters hesitation RUN finds one.") from error
        except (OSError, ValueError) as error:
            raise CircuitError(f"{path} is damaged ({error}); copy or download it again.") from error
        version = record.get("schema_version") if isinstance(record, dict) else None
        if version not in CIRCUIT_READABLE_VERSIONS:
            read = " and ".join(map(str, CIRCUIT_READABLE_VERSIONS))
            raise CircuitError(f"{path} has schema_version {version}; this version reads {read}.")
        try:
            return _circuit_of(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise CircuitError(f"{path} is damaged ({reason}); copy or download it again.") from error

    @classmethod
    def from_hub(
        cls, repo: str, name: str = "hesitation", *, revision: str | None = None, token: str | None = None
    ) -> Circuit:
        """Download one from the repository of its adapters.

        Args:
            repo: repository of the hub, or a folder laid out as one.
            name: of the circuit: the file is circuits/NAME.json.
            revision, token: as `AdapterSet.from_pretrained`.

        Raises:
            CircuitError: the repository has no such circuit, or a damaged one.
            CheckpointError: no such repository, no network.
        """
        file = _hub_file(name)
        path = fetch(repo, [file], revision=revision, token=token) / file
        if not path.is_file():
            raise CircuitError(f"{repo} holds no circuit {name!r} ({file}); push one with Circuit.push.")
        return cls.load(path)

    def push(
        self, repo: str, name: str = "hesitation", *, revision: str | None = None, token: str | None = None
    ) -> str:
        """Upload it into the repository of its adapters, which must be there; returns the commit's address.

        Args:
            repo: "user/name".
            name: of the circuit: the file is circuits/NAME.json.
            revision: branch to commit to; None is the main one.
            token: None takes HF_TOKEN or the stored login.

        Raises HubError: no permission, no such repository, no network.
        """
        file = _hub_file(name)
        try:
            commit = HfApi(token=token).upload_file(
                path_or_fileobj=self._json().encode(),
                path_in_repo=file,
                repo_id=repo,
                revision=revision,
                commit_message=f"The {self.behaviour} circuit",
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise HubError(
                f"The hub did not take {file} into {repo} ({type(error).__name__}: {reason}). Push its adapters first, "
                "and set HF_TOKEN to a token that may write there (or run `hf auth login`)."
            ) from error
        return str(commit.commit_url)

    def _json(self) -> str:
        record = {"schema_version": CIRCUIT_SCHEMA_VERSION, **plain(asdict(self), null=True)}
        record["features"] = [
            {_NUMBER_KEYS.get(name, name): value for name, value in feature.items()} for feature in record["features"]
        ]
        return dumps(record, indent=1) + "\n"

    # -- beside adapters and other circuits -----------------------------------------------------------------------

    def require_belonging(self, pair: PairedModel) -> None:
        """Raises CircuitError where these are not features of the pair's adapters, or not of the pair's models.

        Interventions ask only for the adapters (`AdapterSet.require_own`), which belong to the pair they are in.
        """
        self._require_adapters(
            {**pair.fingerprints, **pair.installed_adapters().fingerprints}, "the pair's adapters are"
        )

    def compare(self, other: Circuit) -> CircuitComparison:
        """What it has in common with another circuit of the same adapters; suppressors are compared, too.

        Raises CircuitError for other adapters: a feature is a number of one set.
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
    def distinct_directions(self, adapters: AdapterSet, cosine: float = SAME_DIRECTION) -> int:
        """How many directions its promoting features write: features of a layer are one if a chain of decoder rows
        leads from one to the other, each of a larger cosine with the next than ``cosine``.

        Raises CircuitError for other adapters.
        """
        self._require_adapters(adapters.fingerprints, "these adapters are")
        by_layer: dict[int, list[int]] = {}
        for layer, index in self.ids():
            by_layer.setdefault(layer, []).append(index)
        found = 0
        for layer, indices in by_layer.items():
            rows = torch.nn.functional.normalize(adapters[layer].W_dec[indices].float(), dim=1)
            found += int(connected_components((rows @ rows.T > cosine).cpu().numpy(), directed=False)[0])
        return found

    def _require_adapters(self, theirs: Mapping[str, str], whose: str) -> None:
        ours = self.fingerprints.get("adapters")
        differs = differing(self.fingerprints, theirs)
        if ours is None or "adapters" not in theirs or any(name.startswith("adapters") for name in differs):
            raise CircuitError(
                f"This circuit is of adapters {ours}, and {whose} {theirs.get('adapters')}: a feature is a number of "
                "one set. Load the adapters it was found in, or find a circuit in these (tl-adapters hesitation RUN)."
            )
        if differs:
            raise CircuitError(
                f"This circuit was found in a pair whose {' and '.join(differs)} are others than here, by fingerprint: "
                "its effects are not those of this pair. Open the pair it was found in, or find a circuit in this one."
            )

    def _repr_html_(self) -> str:
        counts = Counter(f.role for f in self.features)
        said = ", ".join(f"{counts[role]} {role}" for role in ROLES if counts[role]) or "no features"
        words = ", ".join(f"<code>{escape(repr(word))}</code>" for word in self.words[:_SHOWN])
        words = ", ".join(filter(None, (words, self.function and f"found by {escape(self.function)}"))) or "never said"
        strongest = sorted(self.features, key=lambda f: -_size(f.total))[:_SHOWN]
        rows = [
            [f"{f.id.layer}.{f.id.index}", f.role] + [f"{value:+.3g}" for value in f.effects] + [f"{f.activation:.3g}"]
            for f in strongest
        ]
        more = f"<p>... and {len(self) - _SHOWN} more, weaker ones.</p>" if len(self) > _SHOWN else ""
        header = ["feature", "role", *EFFECTS, "activation"]
        return f"<p><b>{escape(self.behaviour)}</b> ({words}): {said}.</p>" + table(header, rows) + more


def _circuit_of(record: Mapping[str, Any]) -> Circuit:
    n_layers, n_features = int(record["n_layers"]), int(record["n_features"])

    def id_of(value: Sequence[int]) -> FeatureId:
        layer, index = value
        if not (
            isinstance(layer, int) and isinstance(index, int) and 0 <= layer < n_layers and 0 <= index < n_features
        ):
            raise ValueError(f"no feature {layer}.{index} in {n_layers} layers of {n_features}")
        return FeatureId(layer, index)

    features = []
    for item in record["features"]:
        if item["role"] not in ROLES:
            raise ValueError(f"no role {item['role']!r}; there are {', '.join(ROLES)}")
        numbers = {name: _number(item[key]) for name, key in _NUMBER_KEYS.items()}
        features.append(CircuitFeature(id_of(item["id"]), item["role"], **numbers))
    if len({f.id for f in features}) < len(features):
        raise ValueError("a feature is in it twice")
    edges = [
        CircuitEdge(id_of(e["source"]), None if e["target"] is None else id_of(e["target"]), _number(e["weight"]))
        for e in record["edges"]
    ]
    return Circuit(
        behaviour=str(record["behaviour"]),
        words=tuple(map(str, record["words"])),
        features=tuple(features),
        strength=_number(record["strength"]),
        split=str(record["split"]),
        fingerprints={str(name): str(value) for name, value in record["fingerprints"].items()},
        n_features=n_features,
        n_layers=n_layers,
        threshold=_number(record["threshold"]),
        edges=tuple(edges),
        phrases=tuple(tuple(int(token) for token in phrase) for phrase in record.get("phrases", ())),
        function=None if record.get("function") is None else str(record["function"]),
    )


def _number(value: Any) -> float:
    """A float that `plain` wrote: null was NaN."""
    return math.nan if value is None else float(value)


def _size(value: float) -> float:
    """How large, for sorting: NaN last."""
    return abs(value) if math.isfinite(value) else 0.0


def _hub_file(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise CircuitError(f"{name!r} is not a circuit's name; give letters, digits, '_', '.' and '-'.")
    return HUB_FILE.format(name)
