"""Attribution graphs: nodes, sparse edges and their weights, saved as safetensors and JSON.

Nodes are numbered in this order: features (by layer, then position, then index), errors (only if base MLPs are frozen),
tokens by position, and targets in the order in which they were given. The weight of an edge (target, source) is the
contribution of the source to the target's value in the linearized replacement model. Features are both targets and
sources.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.adapters.saelens_folder import AdapterFormatError, read_json, read_safetensors
from tl_adapters.data.tokens import CONTINUATION, span_texts
from tl_adapters.errors import UserError
from tl_adapters.utils.files import new_folder, write_tensors, write_text
from tl_adapters.utils.renamed_attributes import renamed_attributes
from tl_adapters.utils.strict_json import dumps

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

    def save(self, folder: str | Path) -> None:
        """Write graph.json and graph.safetensors into a new folder. Raises FolderExistsError or DiskFullError."""
        record = {
            "schema_version": GRAPH_SCHEMA_VERSION,
            "strings": self.strings,
            "n_layers": self.n_layers,
            "targets": [asdict(target) for target in self.targets],
            "residual": self.residual if self.adds_up else None,
            "about": self.about,
        }
        names = ("tokens", "features", "activations", "errors", "edges", "weights", "rows", "balance", "decoder_biases")
        with new_folder(folder) as out:
            write_tensors(out / TENSORS_FILE, {name: getattr(self, name) for name in names})
            write_text(out / GRAPH_FILE, dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> AttributionGraph:
        """Load a graph that `save` wrote. Raises GraphError if the folder does not hold one."""
        try:
            record = read_json(Path(folder) / GRAPH_FILE)
            tensors = read_safetensors(Path(folder) / TENSORS_FILE)
        except AdapterFormatError as error:
            raise GraphError(f"{folder} does not hold an attribution graph: {error}") from error
        if record.get("schema_version") != GRAPH_SCHEMA_VERSION:
            raise GraphError(
                f"{folder} has schema_version {record.get('schema_version')}, and this version of tl_adapters reads "
                f"{GRAPH_SCHEMA_VERSION}; attribute the prompt again."
            )
        try:
            return cls(
                **tensors,
                strings=list(record["strings"]),
                n_layers=int(record["n_layers"]),
                targets=[GraphTarget(**target) for target in record["targets"]],
                about=dict(record["about"]),
            )
        except (KeyError, TypeError) as error:
            raise GraphError(f"The attribution graph in {folder} is incomplete ({error!r}); save it again.") from error
