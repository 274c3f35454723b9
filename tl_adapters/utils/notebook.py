"""Views for notebooks: circuitsvis pages that work offline, and tokens colored by their values."""

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
    """A piece of HTML that a notebook shows."""

    html: str = field(repr=False)
    """Self-contained: nothing is loaded from anywhere."""

    def _repr_html_(self) -> str:
        return self.html


def circuitsvis_view(parts: Sequence[str | tuple[str, Mapping[str, object]]]) -> NotebookView:
    """HTML and circuitsvis's components (name, properties) one after the other, its script in it once.

    circuitsvis itself writes 1.3 MB of script for each component, and asks the network first. Properties are those of
    the component; tokens are to be escaped (`circuitsvis_tokens`). Raises ValueError for a number that is not finite.
    """
    pieces, calls = [], []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        name, (component, properties) = f"circuits-vis-{uuid.uuid4().hex[:12]}", part
        pieces.append(f'<div id="{name}" style="margin: 12px 0"></div>')
        # Tokens hold no "<" any more; what else could would end the script.
        held = dumps(properties).replace("<", "\\u003c")
        calls.append(f'CircuitsVis.render("{name}", CircuitsVis.{component}, {held});')
    script = f'<script type="module">{_circuitsvis()}\n{"".join(calls)}</script>' if calls else ""
    return NotebookView("".join(pieces) + script)


def circuitsvis_tokens(tokens: Sequence[str]) -> list[str]:
    """Tokens as circuitsvis is to have them: it inserts them as HTML, and shows no line breaks."""
    return [html.escape(token, quote=False).replace("\n", "↵\n") for token in tokens]


@functools.cache
def _circuitsvis() -> str:
    """circuitsvis's script, read without importing it, which takes seconds."""
    package = importlib.util.find_spec("circuitsvis")
    assert package is not None
    assert package.origin is not None
    script = Path(package.origin).parent / "dist" / "cdn" / "iife.js"
    return script.read_text(encoding="utf-8").replace("</script>", "<\\/script>")


def colored_tokens(tokens: Sequence[str], values: Sequence[float]) -> NotebookView:
    """A text with each token coloured by its value, by circuitsvis; hover shows the value.

    Raises ValueError for values that are not finite.
    """
    values = [float(value) for value in values]
    if len(tokens) != len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"Got {len(tokens)} tokens and {len(values)} values; give one finite value for each token.")
    return circuitsvis_view([("ColoredTokens", {"tokens": circuitsvis_tokens(tokens), "values": values})])
