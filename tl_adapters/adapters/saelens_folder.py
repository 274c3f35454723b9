"""The SAELens folder of one transcoder: cfg.json and sae_weights.safetensors, as SAELens 6 reads and writes them.

Only files and JSON: sae_lens itself is not needed to write what `sae_lens.SAE.load_from_disk` loads as a stock
Transcoder (relu) or JumpReLUTranscoder (jumprelu, batchtopk). An adapter differs from other transcoders in that it
*adds* to the MLP's output: its output hook is ``blocks.N.mlp.hook_adapter_out``, which a model has only while adapters
are attached to it.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tl_adapters.errors import UserError
from tl_adapters.utils.files import plain_file, write_tensors, write_text
from tl_adapters.utils.strict_json import dumps

SAELENS_FILES = SAELENS_CONFIG_FILE, SAELENS_WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
INPUT_HOOKS = {"mlp_input": "blocks.{}.mlp.hook_in", "normalized": "blocks.{}.ln2.hook_normalized"}
"""Hook points of an adapter's input: the MLP's input, or the same before the second norm's weight. The second is the
same tensor in a model whose norms are folded into its MLPs, the first is not."""
OUTPUT_HOOKS = {"adapter_out": "blocks.{}.mlp.hook_adapter_out", "mlp_out": "blocks.{}.hook_mlp_out"}
"""Hook points of an adapter's output, which is added to the MLP's output, or (other transcoders) replaces it."""
ADDITIVE_NOTE = (
    "Additive: what it writes is added to the MLP's output of a model with the target's attention and the base's MLPs "
    "(tl_adapters.attach makes that model). On a model without blocks.N.mlp.hook_adapter_out, add_sae changes nothing."
)
SAELENS_ARCHITECTURES = {
    "relu": "transcoder",
    "jumprelu": "jumprelu_transcoder",
    "batchtopk": "jumprelu_transcoder",
    "topk": "topk_transcoder",
}
"""What cfg.json calls a transcoder with an activation. A trained batchtopk computes what a jumprelu computes. SAELens
has no topk_transcoder, and refuses one by its name: better than features of a relu that nobody trained."""
THRESHOLDED = ("jumprelu", "batchtopk")
"""The activations whose weights include a threshold, [n_features]."""
_TESTED_WITH = "6.54.12"


class AdapterFormatError(UserError, ValueError):
    """Files that are not a set of adapters, or only a part of one."""


def sae_lens_version() -> str:
    """The installed version of SAELens, or the one this layout was tested with; loaders drop metadata without one."""
    try:
        return metadata.version("sae-lens")
    except metadata.PackageNotFoundError:
        return _TESTED_WITH


def transcoder_config(layer: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> dict[str, Any]:
    """cfg.json of one layer; ``about`` (AdapterMetadata's fields) goes where SAELens keeps foreign keys."""
    additive = about["writes"] == "adapter_out"
    d_in, d_sae = tensors["W_enc"].shape
    return {
        "architecture": SAELENS_ARCHITECTURES[about["activation"]],
        "d_in": d_in,
        "d_sae": d_sae,
        "d_out": tensors["W_dec"].shape[1],
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,  # SAELens's own default for SAEs, which it refuses in transcoders
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": sae_lens_version(),
            "sae_lens_training_version": None,
            "model_name": about["target"],
            "model_class_name": "HookedTransformer",
            "hook_name": INPUT_HOOKS[about["reads"]].format(layer),
            "hook_name_out": OUTPUT_HOOKS[about["writes"]].format(layer),
            "hook_head_index": None,
            "prepend_bos": False,
            "tl_adapters": {
                "additive": additive,
                "layer": layer,
                **({"note": ADDITIVE_NOTE} if additive else {}),
                **about,
            },
        },
    }


def write_transcoder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write cfg.json and weights into a fresh ``folder``."""
    write_tensors(folder / SAELENS_WEIGHTS_FILE, tensors)
    write_text(folder / SAELENS_CONFIG_FILE, dumps(config, indent=1) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """cfg.json. Raises AdapterFormatError."""
    return read_json(folder / SAELENS_CONFIG_FILE)


def read_weights(folder: Path, activation: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The weights of one layer: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_out], b_dec, and threshold [d_sae] where
    the activation has one. Raises AdapterFormatError."""
    tensors = read_safetensors(folder / SAELENS_WEIGHTS_FILE, device)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    d_in, d_sae = found.get("W_enc", (0, 0))
    d_out = found.get("W_dec", (0, 0))[-1]
    expected: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
    }
    if activation in THRESHOLDED:
        expected["threshold"] = (d_sae,)
    if found != expected:
        raise AdapterFormatError(f"{folder / SAELENS_WEIGHTS_FILE} holds {found}; expected {expected}.")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises AdapterFormatError."""
    try:
        record = json.loads(plain_file(path.parent, path.name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} is missing or unreadable ({error}); copy the whole folder again.") from error
    if not isinstance(record, dict):
        raise AdapterFormatError(f"{path} is not a mapping; copy the whole folder again.")
    return record


def read_safetensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a file. Raises AdapterFormatError."""
    try:
        return load_file(plain_file(path.parent, path.name), device=str(device))
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path} is missing or damaged ({error}); copy the whole folder again.") from error
