"""Adapters in any form that this package reads: a run, its own folder, SAELens folders, the authors' checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.saelens_folder import SAELENS_CONFIG_FILE, AdapterFormatError
from tl_adapters.adapters.set_folder import SET_METADATA_FILE
from tl_adapters.checkpoints.architectures import AUTHORS_CHECKPOINT_SUFFIX, architecture_name
from tl_adapters.checkpoints.model_files import fetch, read_config
from tl_adapters.interop.authors_checkpoint import from_authors
from tl_adapters.interop.saelens import from_saelens
from tl_adapters.utils.files import plain_file

_DESCRIPTIONS = (SET_METADATA_FILE, "config.json", SAELENS_CONFIG_FILE, f"*/{SAELENS_CONFIG_FILE}")
"""The small files by which the forms are told apart."""


def read_adapters(
    name: str | Path,
    *,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> AdapterSet:
    """Adapters by a folder or a hub name, whatever wrote them.

    Args:
        name: a run folder, a folder of `AdapterSet.save_pretrained`, a folder of SAELens transcoders, a checkpoint of
            the paper's authors, or a repository on the hub (USER/NAME or USER/NAME@REVISION) that holds one of these.
        layers: the layers to read; None reads all.
        revision: branch, tag or commit on the hub.
        token: for a private repository; None takes HF_TOKEN or the stored login.

    Raises AdapterFormatError where there are none, and what the reader of the form raises.
    """
    inside = Path(name) / "adapters"
    if inside.is_dir():
        return AdapterSet.from_pretrained(inside, layers=layers, revision=revision)
    folder = fetch(name, _DESCRIPTIONS, revision=revision, token=token)
    return _reader(name, folder)(name, layers, revision, token)


def is_authors_checkpoint(folder: Path) -> bool:
    """Whether a folder's config.json describes a model with the authors' adapters in it."""
    path = plain_file(folder, "config.json")
    return path.is_file() and architecture_name(read_config(folder)).endswith(AUTHORS_CHECKPOINT_SUFFIX)


_Reader = Callable[[str | Path, Sequence[int] | None, str | None, str | None], AdapterSet]


def _reader(name: str | Path, folder: Path) -> _Reader:
    """What reads the adapters that a folder's descriptions are of. Raises AdapterFormatError."""
    if (folder / SET_METADATA_FILE).is_file():
        return lambda n, layers, rev, token: AdapterSet.from_pretrained(n, layers=layers, revision=rev, token=token)
    if is_authors_checkpoint(folder):
        return lambda n, layers, rev, token: from_authors(n, layers=layers, revision=rev, token=token)
    if next(folder.glob(SAELENS_CONFIG_FILE), None) or next(folder.glob(f"*/{SAELENS_CONFIG_FILE}"), None):
        return _saelens
    raise AdapterFormatError(
        f"{name} holds no adapters: neither {SET_METADATA_FILE} (a set of this package), nor {SAELENS_CONFIG_FILE} "
        f"(SAELens), nor a config.json of an architecture that ends in {AUTHORS_CHECKPOINT_SUFFIX} (the paper's "
        "authors). Give the folder of a run that has finished, or a folder or repository that holds one of these."
    )


def _saelens(name: str | Path, layers: Sequence[int] | None, revision: str | None, token: str | None) -> AdapterSet:
    adapters = from_saelens(name, revision=revision, token=token)
    if layers is None:
        return adapters
    if absent := [layer for layer in layers if layer not in adapters.layer_indices]:
        raise AdapterFormatError(f"{name} has the layers {adapters.layer_indices}; there are no layers {absent}.")
    return AdapterSet({i: adapters[i] for i in layers}, None, adapters.metadata, adapters.n_layers)
