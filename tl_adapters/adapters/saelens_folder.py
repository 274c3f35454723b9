"""The SAELens folder of one transcoder: cfg.json and sae_weights.safetensors, as SAELens 6 reads and writes them.

Only files and JSON: sae_lens itself is not needed to write what `sae_lens.SAE.load_from_disk` loads as a stock
Transcoder (relu) or JumpReLUTranscoder (jumprelu, batchtopk). An adapter differs from other transcoders in that it
*adds* to the MLP's output: its output hook is ``blocks.N.mlp.hook_adapter_out``, which a model has only while adapters
are attached to it.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_adapters.checkpoints.tensor_fields import floats, require_tensors
from tl_adapters.errors import UserError
from tl_adapters.utils.files import plain_file, write_tensors, write_text
from tl_adapters.utils.reading import Record, read_record, read_tensors, unreadable_as
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
COPY_AGAIN = "Copy the whole folder again."
"""The way out for a damaged folder of adapters."""
_TESTED_WITH = "6.54.12"


class AdapterFormatError(UserError, ValueError):
    """Files that are not a set of adapters, or only a part of one."""


class SaelensMetadata(Record, extra="ignore"):
    """What we read of the metadata in SAELens's cfg.json. The other keys are SAELens's."""

    model_name: str | None = None
    """Id or folder of the model."""
    hook_name: str | None = None
    """The hook point that the transcoder reads."""
    hook_name_out: str | None = None
    """The hook point that it writes to."""
    hook_head_index: int | None = None
    """An attention head, for SAEs of one."""
    tl_adapters: dict[str, Any] | None = None
    """Our own metadata (`AdapterMetadata`), in a folder that this package wrote."""


class SaelensConfig(SaelensMetadata, extra="ignore"):
    """What we read of SAELens's cfg.json. Versions before 6 had the metadata among the other keys."""

    architecture: str | None = None
    """SAELens's name of the class."""
    apply_b_dec_to_input: bool | None = None
    """Whether the decoder's bias is subtracted from the input."""
    normalize_activations: str | None = None
    """How the input is normalized."""
    reshape_activations: str | None = None
    """How the input is reshaped."""
    activation_fn: str | None = None
    """The activation function, in versions that did not name it by the architecture."""
    activation_fn_str: str | None = None
    """The same in still older versions."""
    metadata: SaelensMetadata | None = None
    """Where the transcoder belongs."""

    @property
    def about(self) -> SaelensMetadata:
        """The metadata, wherever this version keeps it."""
        return self.metadata or self


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


def read_config(folder: Path) -> SaelensConfig:
    """cfg.json. Raises AdapterFormatError, and UnsafeFileError for a link that leads out of the folder."""
    with unreadable_as(AdapterFormatError):
        return read_record(SaelensConfig, plain_file(folder, SAELENS_CONFIG_FILE), COPY_AGAIN)


def read_weights(folder: Path, activation: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The weights of one layer: W_enc [d_model, n_features], b_enc, W_dec [n_features, d_model], b_dec, and threshold
    [n_features] where the activation has one, all of one dtype. They may be NaN or infinite.

    Raises AdapterFormatError, and UnsafeFileError for a link that leads out of the folder.
    """
    fields = {
        "W_enc": floats("d_model", "n_features", finite=False),
        "b_enc": floats("n_features", finite=False),
        "W_dec": floats("n_features", "d_model", finite=False),
        "b_dec": floats("d_model", finite=False),
    }
    if activation in THRESHOLDED:
        fields["threshold"] = floats("n_features", finite=False)
    path = plain_file(folder, SAELENS_WEIGHTS_FILE)
    with unreadable_as(AdapterFormatError):
        tensors = read_tensors(path, device, COPY_AGAIN)
        require_tensors(tensors, fields, path, advice=COPY_AGAIN)
    if len(dtypes := {str(tensor.dtype) for tensor in tensors.values()}) > 1:
        raise AdapterFormatError(f"{path} holds weights of several dtypes: {', '.join(sorted(dtypes))}. {COPY_AGAIN}")
    if not tensors["W_enc"].numel():
        raise AdapterFormatError(f"{path} holds no features: W_enc is {list(tensors['W_enc'].shape)}. {COPY_AGAIN}")
    return tensors
