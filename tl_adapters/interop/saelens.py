"""Sets of adapters to and from SAELens.

Our own folders are SAELens folders already (`saelens`), so going there is a question of form: by default the norm's
weight is folded into the encoder and the adapters read ``ln2.hook_normalized``, which is the same tensor in a model
as it is, with folded norms, and fully processed. Coming from there, whatever is not plainly an adapter or a
transcoder of one MLP is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch

from tl_adapters.adapters.adapter_set import METADATA_FILE, SAMPLES_FILE, AdapterMetadata, AdapterSet
from tl_adapters.adapters.saelens_folder import (
    ARCHITECTURES,
    CONFIG_FILE,
    HOOK_IN,
    HOOK_OUT,
    AdapterFormatError,
    read_config,
    read_weights,
)
from tl_adapters.adapters.transcoder import adapter_of
from tl_adapters.checkpoints.model_files import fetch


def to_saelens(
    adapters: AdapterSet, folder: str | Path, *, reads: Literal["normalized", "mlp_input"] = "normalized"
) -> None:
    """Write one SAELens folder per layer, which ``SAE.load_from_disk`` loads as a stock class.

    That is a Transcoder (relu) or a JumpReLUTranscoder (jumprelu, and batchtopk as it evaluates).

    Args:
        adapters: of any form; what `from_saelens` gave is written as it was read.
        folder: must not exist.
        reads: "normalized" (``blocks.N.ln2.hook_normalized``, whatever was processed) or "mlp_input"
            (``blocks.N.mlp.hook_in``, only right on a model without folded norms).

    Raises:
        AdapterFormatError: "mlp_input" of a set in the other form, norms that are not known, or topk, which SAELens
            has no transcoder for.
        FolderExistsError, DiskFullError.
    """
    require_transcoder(adapters)
    if reads == "normalized":
        adapters.normalized().save_pretrained(folder)
    elif adapters.metadata.reads == reads:
        adapters.save_pretrained(folder)
    else:
        raise AdapterFormatError(f"These adapters read {adapters.metadata.reads} already, which is not unfolded again.")


def require_transcoder(adapters: AdapterSet) -> None:
    """Raises AdapterFormatError for adapters that SAELens has no class for."""
    if adapters.metadata.activation == "topk":
        raise AdapterFormatError(
            "SAELens has no transcoder that keeps the k largest features of a token, and as one of another kind these "
            "would be other features. Keep them in our own folder (save_pretrained), or train with batchtopk, which "
            "SAELens reads as a JumpReLU transcoder."
        )


def from_saelens(
    name: str | Path,
    sae_ids: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str = "cpu",
) -> AdapterSet:
    """Read SAELens transcoders, ours or others'.

    Args:
        name: a folder of layer folders, one layer's folder, or a repository of the hub.
        sae_ids: the layer folders to read, as SAELens calls them ("layer_3", "blocks.3/width_16k"); None reads our
            own whole set, or every folder with a cfg.json.
        revision, token, device: as `AdapterSet.from_pretrained`.

    Returns:
        The set in the form in which it was written. A transcoder that stands in place of the MLP keeps its biases and
        its meaning (``metadata.writes`` is "mlp_out"): its features can be read, and `attach` refuses to add it. A
        JumpReLU transcoder of others is jumprelu; a batchtopk of ours is batchtopk again.

    Raises:
        AdapterFormatError: another architecture (a skip connection, ...), normalised inputs, or other hooks;
            nothing is read as something that it is not.
    """
    patterns = [METADATA_FILE, SAMPLES_FILE, CONFIG_FILE, "*.safetensors", f"*/{CONFIG_FILE}", "*/*.safetensors"]
    if sae_ids is not None:
        patterns = [METADATA_FILE, SAMPLES_FILE, *(f"{sae_id}/*" for sae_id in sae_ids)]
    folder = fetch(name, patterns, revision=revision, token=token)
    if sae_ids is None and (folder / METADATA_FILE).is_file():
        return AdapterSet.from_pretrained(folder, device=device)
    if sae_ids is not None:
        found = [folder / sae_id for sae_id in sae_ids]
    else:
        found = sorted({path.parent for path in folder.rglob(CONFIG_FILE)})
    if not found:
        raise AdapterFormatError(f"{name} holds no {CONFIG_FILE}; it is not a SAELens transcoder.")
    layers, forms = {}, []
    for path in found:
        layer, about = _transcoder_form(path)
        if layer in layers:
            raise AdapterFormatError(f"{name} holds several transcoders of layer {layer}; choose with sae_ids=.")
        weights = read_weights(path, about["activation"], device)
        layers[layer] = adapter_of(weights, about["activation"], about["k"])
        forms.append(about)
    n_layers = forms[0].pop("n_layers", None) or max(layers) + 1
    if any({**form, "n_layers": 0} != {**forms[0], "n_layers": 0} for form in forms):
        raise AdapterFormatError(f"The transcoders in {name} do not belong to one set; choose with sae_ids=.")
    result = AdapterSet(layers, None, AdapterMetadata(**forms[0]), n_layers)
    result.require_finite(str(name))
    return result


def _transcoder_form(folder: Path) -> tuple[int, dict[str, Any]]:
    """Layer and metadata of one SAELens folder. Raises AdapterFormatError for what would be misread."""
    config = read_config(folder)
    about = config.get("metadata") or config

    def refuse(what: str, instead: str) -> None:
        raise AdapterFormatError(f"{folder / CONFIG_FILE}: {what}; {instead}.")

    for key, allowed in (
        ("architecture", ("transcoder", "jumprelu_transcoder")),
        ("apply_b_dec_to_input", (False,)),
        ("normalize_activations", ("none", None)),
        ("reshape_activations", ("none", None)),
        ("activation_fn", ("relu", None)),
        ("activation_fn_str", ("relu", None)),
    ):
        if config.get(key) not in allowed:
            refuse(
                f"{key} is {config.get(key)!r}",
                f"supported is {' or '.join(repr(a) for a in allowed if a is not None)}",
            )
    if about.get("hook_head_index") is not None:
        refuse(f"hook_head_index is {about['hook_head_index']}", "an adapter reads the whole stream")
    hook_in, hook_out = str(about.get("hook_name")), str(about.get("hook_name_out"))
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_in)
    reads = {form.partition("{}.")[2]: name for name, form in HOOK_IN.items()}
    if match is None or match[2] not in reads:
        refuse(f"it reads {hook_in}", f"supported are {' and '.join(form.format('N') for form in HOOK_IN.values())}")
    assert match is not None
    layer = int(match[1])
    writes = {form.format(layer): name for name, form in HOOK_OUT.items()}
    writes[f"blocks.{layer}.mlp.hook_out"] = "mlp_out"
    if hook_out not in writes:
        refuse(f"it writes {hook_out}", f"supported are {' and '.join(writes)}")
    ours = about.get("tl_adapters") or {"target": str(about.get("model_name") or "")}
    known = {f.name for f in fields(AdapterMetadata)}
    form = {key: value for key, value in ours.items() if key in known}
    form["fingerprints"] = {k: v for k, v in form.get("fingerprints", {}).items() if k != "adapters"}
    architecture = config["architecture"]
    activation = form.get("activation") or {"transcoder": "relu", "jumprelu_transcoder": "jumprelu"}[architecture]
    if ARCHITECTURES.get(activation) != architecture:
        refuse(f"its metadata says {activation}, its architecture {architecture}", "they contradict each other")
    form |= {"activation": activation, "k": form.get("k")}
    form |= {"reads": reads[match[2]], "writes": writes[hook_out], "n_layers": ours.get("n_layers")}
    return layer, form
