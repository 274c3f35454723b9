"""The licenses under which base, target and data of an adapter set are published, as they state them themselves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download, metadata_load

from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.checkpoints.hub_client import RepositoryKind, given_token, hub_errors
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.errors import UserError
from tl_adapters.organism import BUILTIN, BUILTIN_TEXT

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
"""What is said where no license is stated, or cannot be read now."""
_CARD = "README.md"
_BUILTIN = "apache-2.0"
"""License of this package, whose files the model organism is."""


def licenses_of(about: AdapterMetadata, token: str | None = None) -> dict[str, str]:
    """The license of base, target and each data set, by the name under which a model card shows it.

    Args:
        about: of the adapters, with the names by which models and data are found from here.
        token: for private or gated repositories; None takes that of `hub_token`, HF_TOKEN or the stored login.
    """
    found = {
        "base": _license(about.base, about.base_revision, "model", token),
        "target": _license(about.target, about.target_revision, "model", token),
    }
    return found | {f"data: {published_name(name)}": _license(name, None, "dataset", token) for name in about.datasets}


def _license(name: str | None, revision: str | None, kind: RepositoryKind, token: str | None) -> str:
    """The license that the card of a repository or folder states, or "unknown"."""
    if name in (*BUILTIN, BUILTIN_TEXT):
        return _BUILTIN
    if not name:
        return UNKNOWN
    try:
        path = _card_of(name, revision, kind, token)
        stated = metadata_load(path) if path.is_file() else None
    except (UserError, ValueError, OSError, yaml.YAMLError) as error:
        log.info("The license of %s is not known: %s", name, error)
        return UNKNOWN
    return _stated(stated or {})


def _card_of(name: str, revision: str | None, kind: RepositoryKind, token: str | None) -> Path:
    if kind == "model" or Path(name).exists():
        if Path(name).exists():  # of a folder of the hub's cache the commit is recorded too
            return Path(name) / _CARD
        return fetch(name, [_CARD], revision=revision, token=token) / _CARD
    with hub_errors(f"The hub did not give the card of {name}", name):
        return Path(hf_hub_download(name, _CARD, repo_type=kind, token=token or given_token()))


def _stated(entries: Mapping[str, object]) -> str:
    """The license of a card's front matter: its identifier, or the name of one that the hub does not list."""
    given = entries.get("license")
    if given == "other":
        given = entries.get("license_name") or given
    identifiers = given if isinstance(given, list) else [given]
    return ", ".join(one for one in identifiers if isinstance(one, str) and one) or UNKNOWN
