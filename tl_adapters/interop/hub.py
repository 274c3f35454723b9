"""Adapters on the Hugging Face hub: one commit up, one whole folder down, and a card that says what they are.

What is pushed is our own folder, whose layer folders SAELens loads too (`SAE.from_pretrained("user/repo", "layer_3")`);
by default in the form that is right whatever was processed (`formats.to_saelens`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from tl_adapters.adapters.adapter_set import AdapterSet, set_files
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.errors import UserError
from tl_adapters.interop.model_card import CARD_FILE, card
from tl_adapters.interop.saelens import to_saelens
from tl_adapters.utils.files import new_folder, require_absent


class HubError(UserError, RuntimeError):
    """The hub refused; the message says what and what to do."""


def push_to_hub(
    adapters: AdapterSet,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    reads: Literal["normalized", "mlp_input"] = "normalized",
    message: str = "Transcoder adapters",
) -> str:
    """Upload the set and its card as one commit; returns the commit's address.

    A push that is broken off leaves the repository as it was; pushed again, what had arrived is not sent again.

    Args:
        adapters: with figures and datasets in its metadata, where they are known; the card shows them.
        repo_id: "user/name"; made if it is not there.
        private: for a new repository; None takes the account's default.
        revision: branch to commit to, made if it is not there; None is the main one.
        token: None takes HF_TOKEN or the stored login.
        reads: as `formats.to_saelens`.
        message: of the commit.

    Raises:
        HubError: no permission, no such user, no network.
        AdapterFormatError: what `formats.to_saelens` refuses, such as topk.
    """
    _require_name(repo_id)
    client = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapters"
        if adapters.metadata.reads == "normalized":
            reads = "normalized"
        to_saelens(adapters, folder, reads=reads)
        written = adapters.normalized() if reads == "normalized" else adapters
        (folder / CARD_FILE).write_text(card(written, repo_id), encoding="utf-8")
        try:
            client.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                client.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = client.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise HubError(
                f"The hub did not take {repo_id} ({type(error).__name__}: {reason}). Set HF_TOKEN to a token that may "
                "write there (or run `hf auth login`), and push again: what has arrived is not sent twice."
            ) from error
    return str(commit.commit_url)


def pull(
    name: str,
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> AdapterSet:
    """Download a set from the hub into ``folder``, whole and checked, or not at all; returns it.

    Args:
        name: repository of the hub.
        folder: must not exist.
        layers, revision, token: as `AdapterSet.from_pretrained`.

    Raises:
        AdapterFormatError, CheckpointError, FolderExistsError, DiskFullError.
    """
    require_absent(folder)
    adapters = AdapterSet.from_pretrained(name, layers=layers, revision=revision, token=token)  # checks it
    if layers is not None:
        adapters.save_pretrained(folder)
        return adapters
    files = [CARD_FILE, *set_files(adapters.layer_indices)]
    source = fetch(name, files, revision=revision, token=token)
    with new_folder(folder) as out:
        for file in files:
            if (source / file).is_file():
                (out / file).parent.mkdir(exist_ok=True)
                shutil.copy(source / file, out / file)
    return adapters


def _require_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository's name ({error}); give user/name.") from error
