"""Adapters on the Hugging Face hub: one commit up, one whole folder down, and a card that says what they are.

What is pushed is our own folder, whose layer folders SAELens loads too (`SAE.from_pretrained("user/repo", "layer_3")`);
by default in the form that is right whatever was processed (`formats.to_saelens`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from tl_adapters.adapters.adapter_set import AdapterSet, set_files
from tl_adapters.adapters.saelens_folder import HOOK_IN, HOOK_OUT
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.errors import UserError
from tl_adapters.interop.saelens import require_transcoder, to_saelens
from tl_adapters.utils.files import new_folder, require_absent
from tl_adapters.utils.html import interval_text

CARD_FILE = "README.md"
PAPER = "https://arxiv.org/abs/2602.20904"


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


def card(adapters: AdapterSet, repo_id: str) -> str:
    """The model card: what they are, how to load them, what was measured, and what they do not do.

    Raises AdapterFormatError for what `push_to_hub` does not push.
    """
    require_transcoder(adapters)
    about = adapters.metadata
    base, target = about.base or "BASE", about.target or "TARGET"
    head: dict[str, Any] = {
        "library_name": "tl_adapters",
        "tags": ["transformer-lens", "saelens", "transcoder", "interpretability", "model-diffing", "arxiv:2602.20904"],
    }
    if models := [name for name in (about.target, about.base) if _is_hub_name(name)]:
        head["base_model"] = models
    if datasets := [name for name in about.datasets if _is_hub_name(name)]:
        head["datasets"] = datasets
    layer = adapters.layer_indices[-1]
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# Transcoder adapters: {target} against {base}

At every layer a sparse transcoder that is *added* to the base's MLP and reproduces what training changed in the
target's ([method]({PAPER})). {len(adapters)} of {adapters.n_layers} layers, {adapters.n_features:,} features each,
d_model {adapters.d_model}, {_ACTIVATIONS[about.activation].format(about.k)}. Made with tl_adapters.

```python
from tl_adapters import AdapterSet, PairedModel

pair = PairedModel.from_pretrained(base="{base}", target="{target}")
pair.load_adapters(AdapterSet.from_pretrained("{repo_id}"))
with pair.routed("replacement") as model:  # the target's attention, the base's MLPs, and these adapters
    logits, cache = model.run_with_cache("...")  # cache["blocks.{layer}.mlp.adapter.hook_sae_acts_post"]
```

## With SAELens

```python
from sae_lens import SAE

transcoder = SAE.from_pretrained("{repo_id}", "layer_{layer}")
```

is a stock {_CLASSES[about.activation]} that reads `{HOOK_IN[about.reads].format(layer)}` and writes
`{HOOK_OUT[about.writes].format(layer)}`. {_READS[about.reads]} Without tl_adapters it gives activations, not the
replacement: a model has that output hook only while adapters are attached to it, and on any other `add_sae` logs a
warning and changes nothing. The features were trained on the {about.stream}'s residual stream; on the target's own
stream their activations differ a little.

## Measured

{_figures_table(about.figures)}

## Which weights

| | name | revision | fingerprint |
|---|---|---|---|
| base (its MLPs) | {base} | {about.base_revision or ""} | {about.fingerprints.get("base_mlps", "")} |
| target | {target} | {about.target_revision or ""} | {about.fingerprints.get("target", "")} |
| adapters | {repo_id} | | {adapters.fingerprint} |

A feature is a layer and an index *of these adapters*: other seeds number them anew. Trained on
{", ".join(about.datasets) or "data that was not recorded"}.

## Citation

The method is from Hu, Ward, Icard and Potts, *Transcoder Adapters for Reasoning-Model Diffing*,
[arXiv 2602.20904]({PAPER}).
"""


_ACTIVATIONS = {
    "relu": "relu",
    "jumprelu": "JumpReLU with a learned threshold per feature",
    "batchtopk": "{} features per token on average (BatchTopK: a threshold per layer since training ended)",
}
_CLASSES = {"relu": "Transcoder", "jumprelu": "JumpReLUTranscoder", "batchtopk": "JumpReLUTranscoder"}
_READS = {
    "normalized": "That tensor is the same on models as they are, with folded norms, and fully processed.",
    "mlp_input": "That is right only on models without folded norms (`from_pretrained_no_processing`).",
}


def _figures_table(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "Nothing yet: `tl-adapters evaluate RUN` measures, and pushing the run writes it here."
    rows = ["| figure | value | 95 % interval | unit | on |", "|---|---|---|---|---|"]
    for name, figure in figures.items():
        if isinstance(figure, Mapping):
            value = "-" if figure.get("value") is None else f"{figure['value']:.4g}"
            interval = figure.get("reason", "") if value == "-" else interval_text(figure, "{:.4g}".format)
            where = f"{figure.get('split', '')}, n = {figure.get('n', '')}"
            rows.append(f"| {_cell(name)} | {value} | {_cell(interval)} | {figure.get('unit', '')} | {where} |")
        else:
            rows.append(f"| {_cell(name)} | {_cell(figure)} | | | |")
    return "\n".join(rows)


def _is_hub_name(name: str) -> bool:
    """ "user/name", and no folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def _require_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository's name ({error}); give user/name.") from error


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")
