"""The block "hesitation" of results.json: its schema version, and blocks of an older schema brought up to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_adapters.errors import UserError

HESITATION_SCHEMA_VERSION = 2
"""Version 1 does not state its version, and calls the condition with the whole circuit "both"."""
_PARTS_BY_CONDITION = (
    "necessity",
    "sufficiency",
    "sampled",
    "kinds",
    "injected",
    "probabilities",
    "other_words",
)
"""Parts of the block whose keys are names of conditions."""


def upgraded_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block in the present schema, whatever schema it was written in.

    Args:
        block: as results.json holds it under "hesitation"; it is not changed.

    Raises UserError for a schema that is newer than this version of the package reads.
    """
    version = block.get("schema_version", 1)
    if version == HESITATION_SCHEMA_VERSION:
        return dict(block)
    if version != 1:
        raise UserError(
            f'The block "hesitation" of results.json has schema_version {version}; this version reads 1 and '
            f"{HESITATION_SCHEMA_VERSION}. Update tl-adapters, or run tl-adapters hesitation RUN again."
        )
    upgraded = {"schema_version": HESITATION_SCHEMA_VERSION, **block}
    for part in _PARTS_BY_CONDITION:
        if isinstance(conditions := block.get(part), Mapping):
            upgraded[part] = {_renamed_condition(name): record for name, record in conditions.items()}
    return upgraded


def _renamed_condition(name: str) -> str:
    """The present name of a condition of version 1: "replacement - both" is now "replacement - circuit"."""
    for prefix in ("", "replacement - ", "hybrid + "):
        for old in ("both", "both_at_strength"):
            if name == prefix + old:
                return prefix + old.replace("both", "circuit")
    return name
