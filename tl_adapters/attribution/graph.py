"""Attribution graphs: nodes, sparse edges and their weights, saved as safetensors and JSON.

Nodes are numbered in this order: features (by layer, then position, then index), errors (only if base MLPs are frozen),
tokens by position, and targets in the order in which they were given. The weight of an edge (target, source) is the
contribution of the source to the target's value in the linearized replacement model. Features are both targets and
sources.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tl_adapters.adapters.file_hashes import file_hash
from tl_adapters.checkpoints.tensor_fields import floats, require_tensors, whole_numbers
from tl_adapters.data.tokens import CONTINUATION, WITHHELD, span_texts
from tl_adapters.errors import UserError
from tl_adapters.utils.files import new_folder, write_tensors, write_text
from tl_adapters.utils.notebook import data_frame, drawing_view, tables_view
from tl_adapters.utils.reading import (
    Record,
    UnreadableFileError,
    as_record,
    read_json_object,
    read_tensors,
    shown,
    unreadable_as,
)
from tl_adapters.utils.renamed import renamed_attributes
from tl_adapters.utils.strict_json import dumps

if TYPE_CHECKING:
    from pandas import DataFrame

_MAX_TARGETS, _MAX_SOURCES = 3, 8
"""Number of targets, and of edges into each, that a notebook shows."""
GRAPH_FILE, TENSORS_FILE = "graph.json", "graph.safetensors"
GRAPH_SCHEMA_VERSION = 1
Linearization = Literal["relp", "frozen_mlp", "gradient"]
"""How edges are computed; `attribute` explains the three."""
LINEARIZATIONS: tuple[str, ...] = get_args(Linearization)


class GraphError(UserError, ValueError):
    """A graph that cannot be computed from these arguments, or files that do not hold a graph."""


@dataclass(frozen=True)
class GraphTarget:
    """A target of the graph: a logit, a difference of two logits, or the pre-activation of a feature."""

    label: str
    """The text for display: a token, or ``'Wait' - 'So'``."""
    position: int
    """Position in the prompt; for a logit, the position that predicts the token."""
    weight: float
    """Weight of the target in influence: the probability of a logit's token, 1 for other targets."""
    token: int | None = None
    """Vocabulary index of the token; None for a feature."""
    probability: float | None = None
    """Probability of the token, for a logit."""
    against: int | None = None
    """Vocabulary index of the token whose logit is subtracted, for a difference."""


@renamed_attributes(shown="display_strings")
@dataclass(frozen=True)
class AttributionGraph:
    """The attribution graph of one prompt; tensors are on the CPU."""

    tokens: Int[Tensor, "pos"]
    """Token ids of the prompt."""
    strings: list[str]
    """Text of each token by itself (`data.tokens.token_text`)."""
    n_layers: int
    """Number of layers of the model."""
    features: Int[Tensor, "n_features 3"]
    """Layer, position and index of the active features that are nodes, sorted in that order."""
    activations: Float[Tensor, "n_features"]
    """Activations of the feature nodes."""
    errors: Int[Tensor, "n_errors 2"]
    """Layer and position of the error nodes (frozen base MLPs); none for RelP."""
    targets: list[GraphTarget]
    """The targets of the graph."""
    edges: Int[Tensor, "2 n_edges"]
    """Node numbers of the edges' targets (first row) and sources (second row), sorted by target."""
    weights: Float[Tensor, "n_edges"]
    """Weights of the edges."""
    rows: Int[Tensor, "n_rows"]
    """Node numbers of the nodes whose incoming edges were computed: all feature nodes and all targets."""
    balance: Float[Tensor, "n_rows 4"]
    """Per row: the target's value, the sum of its edges, the contribution from outside the graph, the constant part.
    The value minus the other three is the conservation residual, which is numerical error only."""
    decoder_biases: Float[Tensor, "n_rows"]
    """Per row: the contribution of the adapters' b_dec, which is within the constant part."""
    about: dict[str, Any] = field(default_factory=dict)
    """Linearization, route, options, model ids, weight fingerprints and versions."""

    @property
    def text(self) -> str:
        """The text of the prompt."""
        return "".join(span_texts(self.strings))

    def without_text(self) -> AttributionGraph:
        """The same graph with a mark in place of every token's text, for prompts that are not to be republished."""
        return replace(self, strings=[WITHHELD] * len(self.strings), about={**self.about, "texts_withheld": True})

    @property
    def display_strings(self) -> list[str]:
        """The text of each token, for views that show every token in its own box."""
        return span_texts(self.strings, CONTINUATION)

    @property
    def n_nodes(self) -> int:
        """Number of nodes: features, errors, tokens and targets."""
        return len(self.features) + len(self.errors) + len(self.tokens) + len(self.targets)

    @property
    def first_token(self) -> int:
        """Node number of the first token."""
        return len(self.features) + len(self.errors)

    @property
    def first_target(self) -> int:
        """Node number of the first target."""
        return self.first_token + len(self.tokens)

    @property
    def adds_up(self) -> bool:
        """Whether the constants were computed, so that the residual is a check. For gradients they are the rest."""
        return self.about.get("linearisation") != "gradient"

    @property
    def residual(self) -> float:
        """The largest conservation residual of any row, relative to the largest part of that row."""
        value, *parts = self.balance.unbind(1)
        scale = torch.stack([value, *parts]).abs().amax(0).clamp(min=1e-30)
        return float(((value - sum(parts)).abs() / scale).max()) if len(value) else 0.0

    def node_name(self, node: int) -> str:
        """A node in words: a feature as layer.index, with its token, an error, a token, or a target."""
        if node >= self.first_target:
            return self.targets[node - self.first_target].label
        if node >= self.first_token:
            position = node - self.first_token
            return f"token {position} {self.strings[position]!r}"
        if node < len(self.features):
            layer, position, index = self.features[node].tolist()
            return f"{layer}.{index} at {position} {self.strings[position]!r}"
        layer, position = self.errors[node - len(self.features)].tolist()
        return f"error of layer {layer} at {position} {self.strings[position]!r}"

    def __repr__(self) -> str:
        targets = ", ".join(target.label for target in self.targets)
        return (
            f"AttributionGraph of {targets} over {len(self.tokens)} tokens: {len(self.features):,} features, "
            f"{len(self.weights):,} edges"
        )

    def to_dict(self) -> dict[str, Any]:
        """The prompt, the targets, the conservation residual, and the columns of `to_pandas`, as JSON values."""
        by_weight = self.weights.abs().argsort(descending=True, stable=True)
        names = [self.node_name(node) for node in range(self.n_nodes)]
        targets, sources = self.edges[:, by_weight].tolist()
        return {
            "text": self.text,
            "targets": [asdict(target) for target in self.targets],
            "residual": self.residual if self.adds_up else None,
            "edges": {
                "source": [names[node] for node in sources],
                "target": [names[node] for node in targets],
                "weight": self.weights[by_weight].tolist(),
                "source_node": sources,
                "target_node": targets,
            },
        }

    def to_pandas(self) -> DataFrame:
        """The edges as a DataFrame, those with the largest weights first: names and numbers of both nodes, weight."""
        return data_frame(self.to_dict()["edges"])

    def _repr_html_(self) -> str:
        from tl_adapters.pages.graph_diagram import GRAPH_CAPTION, draw_graph

        counts = [("tokens", self.tokens), ("features", self.features), ("edges", self.weights)]
        tables = [(["in this graph", "number"], [[name, f"{len(part):,}"] for name, part in counts])]
        for i, target in enumerate(self.targets[:_MAX_TARGETS]):
            into = (self.edges[0] == self.first_target + i).nonzero()[:, 0]
            largest = into[self.weights[into].abs().argsort(descending=True)[:_MAX_SOURCES]].tolist()
            probability = "" if target.probability is None else f", probability {target.probability:.3g}"
            rows = [[self.node_name(int(self.edges[1, edge])), f"{self.weights[edge]:+.3g}"] for edge in largest]
            tables.append(([f"strongest edges into {target.label}{probability}", "weight"], rows))
        return drawing_view(draw_graph(self), GRAPH_CAPTION) + tables_view(*tables)

    def save(self, folder: str | Path) -> None:
        """Write graph.json and graph.safetensors into a new folder. Raises FolderExistsError or DiskFullError."""
        with new_folder(folder) as out:
            write_tensors(out / TENSORS_FILE, {name: getattr(self, name) for name in _TENSORS})
            record = {
                "schema_version": GRAPH_SCHEMA_VERSION,
                "strings": self.strings,
                "n_layers": self.n_layers,
                "targets": [asdict(target) for target in self.targets],
                "residual": self.residual if self.adds_up else None,
                "about": self.about,
                "sha256": file_hash(out / TENSORS_FILE),
            }
            write_text(out / GRAPH_FILE, dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> AttributionGraph:
        """Load a graph that `save` wrote. Raises GraphError if the folder does not hold one, or a damaged one."""
        path, tensors_path = Path(folder) / GRAPH_FILE, Path(folder) / TENSORS_FILE
        with unreadable_as(GraphError):
            entries = read_json_object(path, _ADVICE)
            strings = entries.pop("strings", None)  # pydantic refuses texts that are not Unicode, as a token's may be
            if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
                raise UnreadableFileError(f"{path}: strings is {shown(strings)}; allowed is a list of texts. {_ADVICE}")
            record = as_record(_GraphRecord, entries, str(path), _ADVICE)
            tensors = read_tensors(tensors_path, advice=_ADVICE)
            if record.sha256 is not None and file_hash(tensors_path) != record.sha256:
                raise UnreadableFileError(f"{tensors_path} is not the file that {path} was written with. {_ADVICE}")
            _require_consistent(record, len(strings), tensors, path, tensors_path)
        return cls(
            **tensors,
            strings=strings,
            n_layers=record.n_layers,
            targets=list(record.targets),
            about=record.about.model_dump(exclude_unset=True),
        )


_ADVICE = "Copy the graph again, or attribute the prompt again (tl-adapters attribute)."
_TENSORS = {
    "tokens": whole_numbers("tokens"),
    "features": whole_numbers("features", 3),
    "activations": floats("features"),
    "errors": whole_numbers("errors", 2),
    "edges": whole_numbers(2, "edges", below="nodes"),
    "weights": floats("edges"),
    "rows": whole_numbers("rows", below="nodes"),
    "balance": floats("rows", 4),
    "decoder_biases": floats("rows"),
}
"""The tensors of a graph's file, which are fields of `AttributionGraph`."""


class _About(Record, extra="allow"):
    """The entries of `AttributionGraph.about` that something reads."""

    linearisation: str | None = None
    fingerprints: dict[str, str] | None = None
    d_vocab: int | None = Field(None, ge=1, le=2**31)
    max_n_logits: int | None = None
    desired_logit_prob: float | None = None
    batch_size: int | None = None
    max_feature_nodes: int | None = None


class _GraphRecord(Record):
    """graph.json, without the strings."""

    schema_version: Literal[1] = 1
    n_layers: int = Field(ge=1, le=10_000)
    targets: tuple[GraphTarget, ...]
    residual: float | None = None
    about: _About
    sha256: str | None = None
    """Hash of graph.safetensors; graphs of the first release have none."""


def _require_consistent(
    record: _GraphRecord, n_tokens: int, tensors: dict[str, Tensor], path: Path, tensors_path: Path
) -> None:
    """Check that nodes, edges and targets refer to what is there. Raises UnreadableFileError."""
    nodes = sum(len(tensors[name]) for name in ("features", "errors") if name in tensors) + n_tokens
    sizes = {"tokens": n_tokens, "nodes": nodes + len(record.targets)}
    require_tensors(tensors, _TENSORS, tensors_path, sizes, _ADVICE)
    for name in ("features", "errors"):
        places = tensors[name][:, :2]
        if len(places) and bool((places.amax(0) >= torch.tensor([record.n_layers, n_tokens])).any()):
            raise UnreadableFileError(
                f"{tensors_path}: {name} name a layer from {record.n_layers} or a position from {n_tokens} on, and "
                f"the graph has so many layers and tokens. {_ADVICE}"
            )
    for number, target in enumerate(record.targets):
        if not 0 <= target.position < n_tokens:
            raise UnreadableFileError(
                f"{path}: targets[{number}].position is {target.position}; allowed is 0 to {n_tokens - 1}. {_ADVICE}"
            )
