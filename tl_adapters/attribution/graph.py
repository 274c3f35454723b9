"""An attribution graph: what each target owes to each source, sparse, and on disk as safetensors and JSON.

Nodes are numbered features first (by layer, then position, then index), then errors (only where base MLPs are frozen),
then tokens by position, then targets in the order asked for. An edge (target, source, weight) says how much of the
target's value, in the frozen linear model, comes from the source. Features are targets and sources alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from tl_adapters.adapters.saelens_folder import AdapterFormatError, read_json, read_safetensors
from tl_adapters.data.tokens import CONTINUATION, span_texts
from tl_adapters.errors import UserError
from tl_adapters.utils.files import new_folder
from tl_adapters.utils.strict_json import dumps

GRAPH_FILE, TENSORS_FILE = "graph.json", "graph.safetensors"
GRAPH_SCHEMA_VERSION = 1


class GraphError(UserError, ValueError):
    """Files that are not an attribution graph, or one that cannot be drawn."""


@dataclass(frozen=True)
class GraphTarget:
    """What is explained: a logit, a difference of logits, or a feature's pre-activation."""

    label: str
    """As a person reads it: a token, or ``"Wait" - "So"``."""
    position: int
    """Where in the prompt; a logit's is the position that predicts it."""
    weight: float
    """Its share in influence: a logit's probability, 1 for anything else."""
    token: int | None = None
    """Vocabulary index, where it is a logit or a difference of two."""
    probability: float | None = None
    """Of that token."""
    against: int | None = None
    """Vocabulary index of the token it is compared with."""


@dataclass(frozen=True)
class AttributionGraph:
    """One prompt's graph; tensors are on the CPU."""

    tokens: Int[Tensor, "pos"]
    """The prompt."""
    strings: list[str]
    """Each token's text by itself (`vocabulary.token_text`)."""
    n_layers: int
    """Of the model."""
    features: Int[Tensor, "n_features 3"]
    """Active features that are nodes: layer, position, index; sorted in that order."""
    activations: Float[Tensor, "n_features"]
    """Their activations."""
    errors: Int[Tensor, "n_errors 2"]
    """Frozen base MLPs that are nodes: layer, position; none for RelP."""
    targets: list[GraphTarget]
    """What is explained."""
    edges: Int[Tensor, "2 n_edges"]
    """Node numbers: target above, source below; sorted by target."""
    weights: Float[Tensor, "n_edges"]
    """Of the edges."""
    rows: Int[Tensor, "n_rows"]
    """Node numbers of the targets that were attributed (features within max_feature_nodes, and all targets)."""
    balance: Float[Tensor, "n_rows 4"]
    """Per row: the target's value, the sum of its edges, the part of leaves that are no nodes, the constant part. What
    is left over is the conservation residual: numerical error and nothing else."""
    decoder_biases: Float[Tensor, "n_rows"]
    """Per row: the adapters' b_dec within the constant part."""
    about: dict[str, Any] = field(default_factory=dict)
    """Linearisation, route, options, model ids, fingerprints, versions."""

    @property
    def text(self) -> str:
        """The prompt's text."""
        return "".join(span_texts(self.strings))

    @property
    def display_strings(self) -> list[str]:
        """The prompt for views in which each token has a box of its own."""
        return span_texts(self.strings, CONTINUATION)

    @property
    def n_nodes(self) -> int:
        """Features, errors, tokens and targets."""
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
        """Are the constants computed, so that the residual checks something? For gradients they are the rest."""
        return self.about.get("linearisation") != "gradient"

    @property
    def residual(self) -> float:
        """The largest conservation residual of any row, as a share of the row's absolute value sum."""
        value, *parts = self.balance.unbind(1)
        scale = torch.stack([value, *parts]).abs().amax(0).clamp(min=1e-30)
        return float(((value - sum(parts)).abs() / scale).max()) if len(value) else 0.0

    def save(self, folder: str | Path) -> None:
        """Write graph.json and graph.safetensors. Raises FolderExistsError, DiskFullError."""
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
            save_file({name: getattr(self, name).contiguous() for name in names}, out / TENSORS_FILE)
            (out / GRAPH_FILE).write_text(dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> AttributionGraph:
        """Read what `save` wrote. Raises GraphError."""
        try:
            record = read_json(Path(folder) / GRAPH_FILE)
            tensors = read_safetensors(Path(folder) / TENSORS_FILE)
        except AdapterFormatError as error:
            raise GraphError(f"{folder} is no attribution graph: {error}") from error
        if record.get("schema_version") != GRAPH_SCHEMA_VERSION:
            raise GraphError(
                f"{folder} has schema_version {record.get('schema_version')}; this version reads "
                f"{GRAPH_SCHEMA_VERSION}."
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
            raise GraphError(f"{folder} is not a complete attribution graph ({error!r}); write it again.") from error
