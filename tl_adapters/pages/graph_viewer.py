"""An attribution graph as one page that opens offline: nodes to click, links by sign and weight, pins and groups.

Everything is inlined, d3 too. What comes from a model goes into the page as JSON that holds no ``<``, and from there
into the page's text by textContent alone, so a token that looks like HTML is shown, not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from tl_adapters.errors import UserError
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import inert_json

Kind = Literal["feature", "token", "logit", "error"]


class ViewerDataError(UserError, ValueError):
    """Data that no page can be made of."""


@dataclass(frozen=True)
class ViewerNode:
    """One node as the page shows it."""

    id: str
    """Its name in links to the page; no two nodes share one."""
    kind: Kind
    """What it stands for; an error is a frozen base MLP."""
    layer: int
    """-1 for tokens, the number of layers for logits."""
    position: int
    """Where in the prompt."""
    label: str
    """What to call it; may be empty."""
    feature: int | None
    """Its index in its layer, if it is a feature."""
    activation: float | None
    """Of a feature, here."""
    influence: float
    """Its share, which is its size."""
    cumulative: float
    """Share of all influence down to this node, 0 to 1: the prune slider hides what is above it."""
    probability: float | None
    """Of a logit's token."""
    examples: tuple[tuple[tuple[str, float], ...], ...]
    """Windows of (token, activation) where the feature is strong."""
    top: tuple[tuple[str, float], ...]
    """Tokens it raises most, with by how much."""
    bottom: tuple[tuple[str, float], ...]
    """Tokens it lowers most, with by how much."""


@dataclass(frozen=True)
class ViewerData:
    """All that the page shows."""

    title: str
    """Its heading."""
    tokens: tuple[str, ...]
    """The prompt, decoded token by token."""
    n_layers: int
    """Of the model."""
    nodes: tuple[ViewerNode, ...]
    """In any order; links name them by number."""
    links: tuple[tuple[int, int, float], ...]
    """Source node, target node, weight."""
    about: Mapping[str, str | float | int]
    """Shown in a panel of its own: how the graph was made and how well it adds up."""


def write_page(path: str | Path, data: ViewerData) -> None:
    """Write the page: one file that needs nothing from anywhere. Raises ViewerDataError and DiskFullError."""
    _check(data)
    try:
        blob = _json(data)
    except ValueError as error:
        raise ViewerDataError(f"The graph holds a number that is not finite ({error}); a page shows none.") from error
    parts = {
        "css": _asset("viewer.css"),
        "d3-licence": _asset("d3.LICENSE"),
        "d3": _asset("d3.min.js"),
        "data": blob,
        "js": _asset("viewer.js"),
    }
    # One pass, so that text of the graph that looks like a place to fill is left alone.
    write_text(path, re.sub(r"@@([a-z0-9-]+)@@", lambda place: parts[place[1]], _asset("page.html")))


def _check(data: ViewerData) -> None:
    """Raises ViewerDataError for what would make the page fail silently."""
    if len({node.id for node in data.nodes}) < len(data.nodes):
        raise ViewerDataError("Two nodes share an id; a link to the page could not tell them apart.")
    for node in data.nodes:
        if not (-1 <= node.layer <= data.n_layers and 0 <= node.position < len(data.tokens)):
            raise ViewerDataError(
                f"Node {node.id} is at layer {node.layer}, position {node.position}; layers run from -1 (tokens) to "
                f"{data.n_layers} (logits), positions from 0 to {len(data.tokens) - 1}."
            )
    for source, target, _ in data.links:
        if not (0 <= source < len(data.nodes) and 0 <= target < len(data.nodes)):
            raise ViewerDataError(f"A link joins nodes {source} and {target}; there are {len(data.nodes)} nodes.")


def _json(data: ViewerData) -> str:
    """The data as JSON that cannot end its script element; U+2028 and all else outside ASCII are escaped too."""
    record = {**vars(data), "nodes": [vars(node) for node in data.nodes], "about": dict(data.about)}
    return inert_json(record)


def _asset(name: str) -> str:
    return (files(__package__) / "templates" / "graph_viewer" / name).read_text(encoding="utf-8")
