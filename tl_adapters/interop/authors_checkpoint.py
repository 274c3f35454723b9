"""Reads and writes the checkpoints of the paper's authors: a replacement model as one Hugging Face checkpoint.

It holds the target's attention, embeddings and norms, the base's MLPs, and inside each MLP the adapter:

    model.layers.N.mlp.transcoder_enc.weight [n_features, d_model]     .bias [n_features]
    model.layers.N.mlp.transcoder_dec.weight [d_model, n_features]     .bias [d_model], if transcoder_dec_bias

config.json holds transcoder_n_features, transcoder_dec_bias and an architecture that ends in WithTranscoder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import COPY_AGAIN, AdapterFormatError
from tl_adapters.adapters.transcoder import adapter_of
from tl_adapters.checkpoints.architectures import (
    AUTHORS_CHECKPOINT_SUFFIX,
    Architecture,
    architecture_name,
    find_architecture,
)
from tl_adapters.checkpoints.base_mlps import read_base_mlps
from tl_adapters.checkpoints.compatibility import compare_configs, require_fit
from tl_adapters.checkpoints.hf_model import load_hf_model
from tl_adapters.checkpoints.hub_client import hub_token
from tl_adapters.checkpoints.layer_samples import attention_out_name, stored_samples
from tl_adapters.checkpoints.model_files import (
    DESCRIPTION_FILES,
    PROJECTIONS,
    SHARD_INDEX_FILE,
    at_revision,
    fetch,
    locate,
    read_config,
    read_tensors,
    shard_files,
)
from tl_adapters.checkpoints.tensor_fields import floats, require_tensors
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.models.build import build_model
from tl_adapters.models.hf_outputs import record_hf_outputs
from tl_adapters.models.output_agreement import require_hybrid
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.devices import GivenDevice, GivenDtype, resolve_device
from tl_adapters.utils.reading import Record, as_record, unreadable_as

_ENCODER, _DECODER = "model.layers.{}.mlp.transcoder_enc.{}", "model.layers.{}.mlp.transcoder_dec.{}"
_PUBLISHED_NAME = "transcoder-adapters-R1-Distill-Qwen-7B"
_PUBLISHED_PAIR = ("Qwen/Qwen2.5-Math-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
"""Base and target of the published checkpoints, whose config.json does not name them."""


def from_authors(
    name: str | Path,
    *,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str = "cpu",
) -> AdapterSet:
    """Read the adapters of a checkpoint of the paper's authors.

    From its shards only the adapters' tensors, the second norms and samples of the attention's output weights are read,
    so a 7B model is never in memory. From a repository the shards that hold them are downloaded, which is all of them.

    Args:
        name: folder or hub name, such as "nathu0/transcoder-adapters-R1-Distill-Qwen-7B-l1w0.001-l0-1.4".
        layers: the layers to read; None reads all.
        revision, token, device: as in `AdapterSet.from_pretrained`.

    Raises:
        AdapterFormatError: not a checkpoint of this kind, or layers that it does not have.
        CheckpointError: missing or damaged files, or a name that the hub does not know.
        NotFiniteError: weights that are NaN or infinite.
    """
    folder = fetch(name, DESCRIPTION_FILES, revision=revision, token=token)
    config = read_config(folder)
    architecture, described = _authors_architecture(name, config, folder)
    n_features, n_layers = described.transcoder_n_features, described.num_hidden_layers
    selected = list(range(n_layers)) if layers is None else list(layers)
    if absent := [layer for layer in selected if not 0 <= layer < n_layers]:
        raise AdapterFormatError(f"{name} has {n_layers} layers; there are no layers {absent}.")
    has_decoder_bias = described.transcoder_dec_bias
    names = [tensor for layer in selected for tensor in _adapter_tensor_names(layer, has_decoder_bias)]
    names += [
        tensor for layer in selected for tensor in (architecture.norm_tensor("ln2", layer), attention_out_name(layer))
    ]
    if not Path(name).is_dir():
        shards = shard_files(folder, names) if (folder / SHARD_INDEX_FILE).is_file() else ["*.safetensors"]
        folder = fetch(name, [*DESCRIPTION_FILES, *shards], revision=revision, token=token)
    adapters, samples = {}, {}
    for layer in selected:
        weights = _read_weights(folder, layer, has_decoder_bias, device)
        if weights["W_enc"].shape[1] != n_features:
            raise AdapterFormatError(
                f"{name} says transcoder_n_features {n_features}; layer {layer} has {weights['W_enc'].shape[1]}."
            )
        adapters[layer] = adapter_of(weights)
        samples[layer] = stored_samples(folder, folder, architecture, layer)
        of_samples = {"ln2_w": floats("d_model"), "attention_out": floats("n"), "base_mlp_out": floats("m")}
        with unreadable_as(AdapterFormatError):
            sizes = {"d_model": weights["W_enc"].shape[0]}
            require_tensors(samples[layer]._asdict(), of_samples, f"{folder}, layer {layer}", sizes, COPY_AGAIN)
    base, target = _PUBLISHED_PAIR if _PUBLISHED_NAME in str(name) else ("", "")
    metadata = AdapterMetadata(base=base, target=target, figures=_named_l0(name))
    result = AdapterSet(adapters, samples, metadata, n_layers)
    result.require_finite(str(name))
    return result


def _named_l0(name: str | Path) -> dict[str, Any]:
    """The L0 that the authors write into the names of their repositories, such as ...-l0-1.4, as a figure."""
    found = re.search(r"-l0-([0-9]+(?:\.[0-9]+)?)$", str(name).partition("@")[0])
    if found is None:
        return {}
    return {
        "L0, mean over layers": {"value": float(found[1]), "unit": "features per token", "split": "as its name says"}
    }


def _adapter_tensor_names(layer: int, has_decoder_bias: bool) -> list[str]:
    """Return the names of W_enc, b_enc, W_dec and, if there is one, b_dec of one layer."""
    names = [_ENCODER.format(layer, "weight"), _ENCODER.format(layer, "bias"), _DECODER.format(layer, "weight")]
    return [*names, _DECODER.format(layer, "bias")] if has_decoder_bias else names


def _read_weights(folder: Path, layer: int, has_decoder_bias: bool, device: torch.device | str) -> dict[str, Tensor]:
    """Return W_enc, b_enc, W_dec and b_dec of one layer as `TranscoderAdapter` has them.

    All of them are copies, since a tensor that was read may be a view of its whole shard.
    """
    names = _adapter_tensor_names(layer, has_decoder_bias)
    tensors = read_tensors(folder, names, device)
    of_encoder, of_decoder = ("n_features", "d_model"), ("d_model", "n_features")
    shapes = (of_encoder, of_encoder[:1], of_decoder, of_decoder[:1])
    fields = {tensor: floats(*shape, finite=False) for tensor, shape in zip(names, shapes, strict=False)}
    with unreadable_as(AdapterFormatError):
        require_tensors(tensors, fields, folder, advice=COPY_AGAIN)
    if len({tensor.dtype for tensor in tensors.values()}) > 1 or not tensors[names[0]].numel():
        raise AdapterFormatError(f"{folder}: the adapter of layer {layer} is empty or of several dtypes. {COPY_AGAIN}")
    encoder, b_enc, decoder, *b_dec = (tensors[name] for name in names)
    n_features, d_model = (*encoder.shape, 0, 0)[:2]
    expected = [(n_features, d_model), (n_features,), (d_model, n_features), (d_model,)]
    for name, shape in zip(names, expected, strict=False):
        if tuple(tensors[name].shape) != shape or not tensors[name].is_floating_point():
            raise AdapterFormatError(
                f"{name} of {folder} has shape {list(tensors[name].shape)} and dtype {tensors[name].dtype}; by its "
                f"encoder it has {list(shape)} floating-point numbers. Copy or download the checkpoint again."
            )
    return {
        "W_enc": encoder.T.clone(memory_format=torch.contiguous_format),
        "b_enc": b_enc.clone(),
        "W_dec": decoder.T.clone(memory_format=torch.contiguous_format),
        "b_dec": b_dec[0].clone() if b_dec else torch.zeros(encoder.shape[1], dtype=encoder.dtype, device=device),
    }


class _AuthorsConfig(Record, extra="ignore"):
    """What we read of the config.json of an authors' checkpoint."""

    num_hidden_layers: int = Field(ge=1)
    transcoder_n_features: int = Field(ge=1)
    transcoder_dec_bias: bool = True


def _authors_architecture(
    name: str | Path, config: dict[str, Any], folder: Path
) -> tuple[Architecture, _AuthorsConfig]:
    """Return the architecture of the model around the adapters, and what config.json says of them."""
    architecture = architecture_name(config)
    if not architecture.endswith(AUTHORS_CHECKPOINT_SUFFIX) or config.get("transcoder_n_features") is None:
        raise AdapterFormatError(
            f"{name} is of architecture {architecture}, or lacks transcoder_n_features, so it is not a checkpoint of "
            f"the paper's authors, whose architecture ends in {AUTHORS_CHECKPOINT_SUFFIX}. Our own folders are read by "
            "AdapterSet.from_pretrained."
        )
    with unreadable_as(AdapterFormatError):
        described = as_record(_AuthorsConfig, config, str(folder / "config.json"), COPY_AGAIN)
    return find_architecture(architecture), described


def to_authors(adapters: AdapterSet, folder: str | Path, *, base: str | Path, target: str | Path) -> None:
    """Write the replacement model as a checkpoint of the authors' kind, which their vLLM class serves.

    Args:
        adapters: adapters of all layers that read the MLP's input, with the activation relu.
        folder: must not exist.
        base, target: folders or hub names; their shards are copied one at a time.

    Raises:
        AdapterFormatError: adapters of some layers only, in the other form, or with another activation.
        CheckpointError, PairMismatchError: files of base or target that are damaged or do not fit.
        UnsupportedModelError: a target that `write_hybrid` does not support.
        FolderExistsError, DiskFullError: the folder cannot be made.
    """
    if adapters.metadata.activation != "relu":
        raise AdapterFormatError(
            f"The authors' model class computes relu, and these adapters are {adapters.metadata.activation}: they "
            "would have other features there. Export them to SAELens (--to saelens), or keep them in our own folder."
        )
    if adapters.metadata.reads != "mlp_input" or adapters.layer_indices != list(range(adapters.n_layers)):
        raise AdapterFormatError(
            f"The authors' checkpoints hold adapters of every layer that read mlp_input; these read "
            f"{adapters.metadata.reads} and are of {len(adapters)} of {adapters.n_layers} layers. Give the set as it "
            "was trained."
        )
    config = read_config(locate(target, weights=False))
    has_decoder_bias = any(bool(adapter.b_dec.any()) for adapter in adapters)
    tensors: dict[str, Tensor] = {}
    for layer in adapters.layer_indices:
        adapter = adapters[layer]
        tensors[_ENCODER.format(layer, "weight")] = adapter.W_enc.detach().T
        tensors[_ENCODER.format(layer, "bias")] = adapter.b_enc.detach()
        tensors[_DECODER.format(layer, "weight")] = adapter.W_dec.detach().T
        if has_decoder_bias:
            tensors[_DECODER.format(layer, "bias")] = adapter.b_dec.detach()
    write_hybrid(
        folder,
        base=base,
        target=target,
        beside_mlps=tensors,
        config={
            "architectures": [f"{architecture_name(config)}{AUTHORS_CHECKPOINT_SUFFIX}"],
            "transcoder_n_features": adapters.n_features,
            "transcoder_dec_bias": has_decoder_bias,
        },
    )


def authors_pair(
    name: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: GivenDtype | None = None,
    device: GivenDevice = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str | None = None,
) -> PairedModel:
    """Return the pair of one of the authors' checkpoints, with its adapters loaded.

    Attention, embeddings, norms and the base's MLPs are read from the checkpoint, and only the MLPs from ``target``.

    Args:
        name: folder or hub name of the checkpoint.
        target: folder or hub name of the target.
        revision: branch, tag or commit of the checkpoint's repository; a folder has none.
        token: for private or gated repositories; None takes HF_TOKEN or the stored login.
        dtype, device, tokenizer, backend: as in `PairedModel.from_pretrained`.

    Raises:
        AdapterFormatError, CheckpointError: files that are missing or damaged, or that hold no adapters.
        PairMismatchError, UnsupportedModelError: models that do not fit together, or that are not supported.
        UserError: whatever else `from_authors` and `PairedModel.from_pretrained` raise.
    """
    adapters = from_authors(name, revision=revision, token=token)
    source = at_revision(name, revision)
    base_mlps = []
    with hub_token(token):
        configs = (read_config(locate(model, weights=False)) for model in (source, target))
        require_fit(compare_configs(*configs))
        hf_model, tokenizer = load_hf_model(
            source, dtype=dtype, device=resolve_device(device), tokenizer=tokenizer, without_adapters=True
        )
        # The checkpoint's MLPs are the base's; read_base_mlps reads the MLPs of any folder, here those of the target.
        for layer, target_mlp in zip(hf_model.model.layers, read_base_mlps(target, adapters.n_layers), strict=True):
            base_mlps.append({projection: getattr(layer.mlp, projection).weight.detach() for projection in PROJECTIONS})
            for projection, weight in target_mlp.items():
                linear = getattr(layer.mlp, projection)
                linear.weight = torch.nn.Parameter(
                    weight.to(linear.weight.device, linear.weight.dtype), requires_grad=False
                )
    hf_outputs = record_hf_outputs(hf_model, tokenizer, base_mlps=base_mlps)
    pair = PairedModel(
        build_model(hf_model, tokenizer, backend, hf_outputs),
        base_mlps,
        base=adapters.metadata.base or str(source),
        target=str(target),
    )
    require_hybrid(pair.mlps, hf_outputs)
    pair.hf_probe = None if hf_outputs is None else hf_outputs.probe
    pair.load_adapters(adapters)
    return pair
