"""The interactive HTML page of an attribution graph: nodes to select, signed links, pruning, pins and groups.

The page opens offline; style, script and d3 are inlined. Text that comes from a model enters the page as JSON without
``<`` and is displayed by textContent only, so a token that looks like HTML is shown and never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tl_adapters.errors import UserError
from tl_adapters.pages.navigation import PageLink
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import render
from tl_adapters.utils.strict_json import NotFiniteJsonError

NodeKind = Literal["feature", "token", "logit", "error"]


class ViewerDataError(UserError, ValueError):
    """The data cannot be shown on a graph page."""


@dataclass(frozen=True)
class ViewerNode:
    """One node of the page."""

    id: str
    """Name of the node in links to the page; unique within the page."""
    kind: NodeKind
    """What the node stands for; an error node stands for the contribution of a base MLP that is held constant."""
    layer: int
    """Layer; -1 for tokens and the number of layers for logits."""
    position: int
    """Position in the prompt."""
    label: str
    """Displayed name; may be empty."""
    feature: int | None
    """Index of the feature in its layer; None for other nodes."""
    activation: float | None
    """Activation of the feature at this position; None for other nodes."""
    influence: float
    """Share of the total influence, which the size of the node shows."""
    cumulative: float
    """Share of the influence of all nodes down to this one, 0 to 1; the prune slider hides nodes above its value."""
    probability: float | None
    """Probability of a logit's token; None for other nodes."""
    examples: tuple[tuple[tuple[str, float], ...], ...]
    """Windows of (token, activation) around strong activations of the feature."""
    top: tuple[tuple[str, float], ...]
    """Tokens whose logits the feature raises most, with its effect on them."""
    bottom: tuple[tuple[str, float], ...]
    """Tokens whose logits the feature lowers most, with its effect on them."""


@dataclass(frozen=True)
class ViewerData:
    """The content of a graph page."""

    title: str
    """Heading."""
    tokens: tuple[str, ...]
    """The prompt, decoded token by token."""
    n_layers: int
    """Number of layers of the model."""
    nodes: tuple[ViewerNode, ...]
    """Nodes in any order; links refer to them by position in this tuple."""
    links: tuple[tuple[int, int, float], ...]
    """Links as (source node, target node, weight)."""
    about: Mapping[str, str | float | int]
    """Facts shown in a panel: how the graph was made, and its conservation residual."""


def write_viewer(path: str | Path, data: ViewerData, pages: Sequence[PageLink] = ()) -> None:
    """Write the page of a graph as one file that loads nothing.

    Args:
        path: the page.
        data: what it shows.
        pages: navigation to other pages.

    Raises:
        ViewerDataError: repeated node ids, positions or links outside the graph, or a number that is not finite.
        DiskFullError.
    """
    _require_displayable(data)
    record = {**vars(data), "nodes": [vars(node) for node in data.nodes], "about": dict(data.about)}
    try:
        text = render("graph_viewer/graph.html.j2", data=record, run_pages=pages)
    except NotFiniteJsonError as error:
        raise ViewerDataError(
            f"The graph holds a number that is not finite ({error}), which a page cannot show."
        ) from error
    write_text(path, text)


def _require_displayable(data: ViewerData) -> None:
    """Raise ViewerDataError for data with which the page would fail silently."""
    if len({node.id for node in data.nodes}) < len(data.nodes):
        raise ViewerDataError("Two nodes share an id, so a link to the page could not tell them apart.")
    for node in data.nodes:
        if not (-1 <= node.layer <= data.n_layers and 0 <= node.position < len(data.tokens)):
            raise ViewerDataError(
                f"Node {node.id} is at layer {node.layer}, position {node.position}; layers run from -1 (tokens) to "
                f"{data.n_layers} (logits), positions from 0 to {len(data.tokens) - 1}."
            )
    for source, target, _ in data.links:
        if not (0 <= source < len(data.nodes) and 0 <= target < len(data.nodes)):
            raise ViewerDataError(f"A link joins nodes {source} and {target}; there are {len(data.nodes)} nodes.")
