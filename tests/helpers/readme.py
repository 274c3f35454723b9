"""The fenced blocks of the README and of the pages that continue it."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(language: str) -> list[str]:
    """All blocks of a language, in the order in which they are read: later ones use the names of earlier ones."""
    return [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


ROOT = Path(__file__).parents[2]
GUIDES = ("quickstart", "your_own_pair", "pairs", "routes", "features", "attribution", "circuits", "authors_adapters")
GUIDES += ("sharing", "lora")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]
