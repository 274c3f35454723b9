"""Upload and download of adapter sets on the Hugging Face hub, with a model card.

The pushed folder is the one of `AdapterSet.save_pretrained`, whose layer folders SAELens loads too
(``SAE.from_pretrained("user/repo", "layer_3")``); by default it is written in the form that is correct for every way of
processing the model's weights (`to_saelens`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, ModelCard

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.set_folder import set_files
from tl_adapters.checkpoints.hub_client import hub_errors, require_repository_name
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.interop.licenses import licenses_of
from tl_adapters.interop.model_card import CARD_FILE, PICTURE_FILE, card, picture
from tl_adapters.interop.saelens import published, to_saelens
from tl_adapters.utils.arguments import ArgumentError
from tl_adapters.utils.files import (
    copy_file,
    new_folder,
    plain_file,
    require_absent,
    require_writable,
    temporary_folder,
    write_bytes,
    write_text,
)
from tl_adapters.utils.reading import shown


def push_to_hub(
    adapters: AdapterSet,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    reads: Literal["normalized", "mlp_input"] = "normalized",
    license: str | None = None,
    message: str = "Transcoder adapters",
) -> str:
    """Upload a set and its model card as one commit and return the address of the commit.

    An interrupted push leaves the repository unchanged; a repeated push does not send again what has arrived.

    Args:
        adapters: the set; the card shows the measurements and datasets of its metadata.
        repo_id: "user/name"; created if it does not exist.
        private: whether a new repository is private; None takes the account's default.
        revision: branch to commit to, created if it does not exist; None takes the main branch.
        token: None takes HF_TOKEN or the stored login.
        reads: as in `to_saelens`.
        license: under which you publish the adapters, by its identifier on the hub ("apache-2.0", "mit", "cc-by-4.0");
            None states none.
        message: commit message.

    Raises:
        HubError: no permission, no such user, no network, or a license that is not on the hub's list.
        AdapterFormatError, NotFiniteError: adapters that `to_saelens` refuses, such as topk.
        ArgumentError: what is given as license is no identifier.
    """
    require_repository_name(repo_id)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ArgumentError(
            f"license is {shown(license)}; give an identifier of the hub's list, such as apache-2.0, mit or cc-by-4.0."
        )
    client = HfApi(token=token)
    with temporary_folder() as temporary:
        folder = temporary / "adapters"
        if adapters.metadata.reads == "normalized":
            reads = "normalized"
        to_saelens(adapters, folder, reads=reads)
        pushed = published(adapters.normalized() if reads == "normalized" else adapters)
        text = card(pushed, repo_id, licenses_of(adapters.metadata, token), license)
        write_text(folder / CARD_FILE, text)
        if drawn := picture(pushed):
            write_bytes(folder / PICTURE_FILE, drawn)
        if license is not None:  # before a repository is made, which would stay empty
            with hub_errors(f"The hub did not accept a card with the license {license}", repo_id, upload=True):
                ModelCard(text).validate()
        with hub_errors(f"The hub did not accept {repo_id}", repo_id, upload=True):
            client.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                client.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = client.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
            )
    return str(commit.commit_url)


def pull(
    name: str,
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> AdapterSet:
    """Download a set from the hub into ``folder``, check it and return it; on failure the folder is not created.

    Args:
        name: repository on the hub.
        folder: must not exist.
        layers, revision, token: as in `AdapterSet.from_pretrained`.

    Raises:
        AdapterFormatError, CheckpointError: the hub gives no such set, or its files are damaged.
        NotFiniteError: weights that are NaN or infinite.
        FolderExistsError, DiskFullError: the folder cannot be made.
    """
    require_absent(folder)
    require_writable(folder)
    adapters = AdapterSet.from_pretrained(name, layers=layers, revision=revision, token=token)  # checks the files
    if layers is not None:
        adapters.save_pretrained(folder)
        return adapters
    files = [CARD_FILE, PICTURE_FILE, *set_files(adapters.layer_indices)]
    source = fetch(name, files, revision=revision, token=token)
    with new_folder(folder) as out:
        for file in files:
            if (path := plain_file(source, *file.split("/"))).is_file():
                copy_file(path, out / file)
    return adapters
