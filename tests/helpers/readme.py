"""The README's fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
