"""HTML views for notebooks: circuitsvis components that work offline, and tokens colored by value."""

from __future__ import annotations

import functools
import html
import importlib.util
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tl_adapters.utils.strict_json import dumps


@dataclass(frozen=True)
class NotebookView:
    """Self-contained HTML that a notebook displays as the result of a cell."""

    html: str = field(repr=False)
    """The HTML, which loads nothing from the network."""

    def _repr_html_(self) -> str:
        return self.html


def circuitsvis_view(parts: Sequence[str | tuple[str, Mapping[str, object]]]) -> NotebookView:
    """Return HTML and circuitsvis components in order, with the script of circuitsvis included once.

    circuitsvis itself writes 1.3 MB of script for every component and tries the network first.

    Args:
        parts: pieces of HTML, and components as (name, properties). Tokens among the properties must be escaped
            (`circuitsvis_tokens`).

    Raises:
        ValueError: a property is a number that is not finite.
    """
    pieces, calls = [], []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        element_id, (component, properties) = f"circuits-vis-{uuid.uuid4().hex[:12]}", part
        pieces.append(f'<div id="{element_id}" style="margin: 12px 0"></div>')
        # Escaped tokens hold no "<"; one in any other text could end the script.
        properties_json = dumps(properties).replace("<", "\\u003c")
        calls.append(f'CircuitsVis.render("{element_id}", CircuitsVis.{component}, {properties_json});')
    script = f'<script type="module">{_circuitsvis_script()}\n{"".join(calls)}</script>' if calls else ""
    return NotebookView("".join(pieces) + script)


def circuitsvis_tokens(tokens: Sequence[str]) -> list[str]:
    """Return tokens for circuitsvis: escaped, since it inserts them as HTML, and with visible line breaks."""
    return [html.escape(token, quote=False).replace("\n", "↵\n") for token in tokens]


@functools.cache
def _circuitsvis_script() -> str:
    """Return the script of circuitsvis without importing the package, which takes seconds."""
    package = importlib.util.find_spec("circuitsvis")
    assert package is not None
    assert package.origin is not None
    script = Path(package.origin).parent / "dist" / "cdn" / "iife.js"
    return script.read_text(encoding="utf-8").replace("</script>", "<\\/script>")


def colored_tokens(tokens: Sequence[str], values: Sequence[float]) -> NotebookView:
    """Return a text in which each token is colored by its value; hovering over a token shows the value.

    Raises ValueError for values that are not finite, or not one value for each token.
    """
    values = [float(value) for value in values]
    if len(tokens) != len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"Got {len(tokens)} tokens and {len(values)} values; give one finite value for each token.")
    return circuitsvis_view([("ColoredTokens", {"tokens": circuitsvis_tokens(tokens), "values": values})])
