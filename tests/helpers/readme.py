"""The fenced blocks of the README, of the pages that continue it, and of the other pages that hold commands."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(language: str) -> list[str]:
    """All blocks of a language, in the order in which they are read: later ones use the names of earlier ones."""
    return [block for page in PAGES for block in blocks_of(page, language)]


def blocks_of(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """All commands of the blocks of sh; one that is written over several lines is joined."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


ROOT = Path(__file__).parents[2]
GUIDES = ("quickstart", "your_own_pair", "pairs", "routes", "features", "attribution", "circuits", "authors_adapters")
GUIDES += ("sharing", "lora", "training", "large_models", "several_processes", "believing_features", "vllm", "formats")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "examples" / "r1_distill_7b" / "README.md"]
GENERATED = {"commands.md": "written from the command line itself; tests/cli/test_commands.py parses its examples"}
"""Pages with blocks that are not in PAGES, and why."""
NOT_RUN = {
    "large_models.md": "device maps need TransformerLens 4: tests/models/test_device_map.py runs them there",
    "vllm.md": "vLLM and lm-evaluation-harness have environments of their own",
}
"""Pages whose Python this environment cannot run, and why; that its calls bind is tested."""
