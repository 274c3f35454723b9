"""Samples and fingerprints of a model's weights, and the comparison that tells one model from another.

`ModelSamples` answers the question "are these the weights that the adapters were trained with?" weight by weight. A
model that TransformerLens has processed is recognized, too: where a norm is folded, its weights were multiplied into
the matrices that read through it, so the expected values of those matrices follow from the recorded values of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.set_folder import SetDescription
from tl_adapters.checkpoints.architectures import Architecture, architecture_name, find_architecture
from tl_adapters.checkpoints.base_mlps import MLPTensors, base_fingerprint
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.fingerprints import fingerprints
from tl_adapters.checkpoints.layer_samples import (
    LayerSamples,
    agrees,
    dtype_name,
    norm_weights,
    sample,
    sample_positions,
)
from tl_adapters.checkpoints.model_files import read_config, read_tensors, read_values, tensor_shapes
from tl_adapters.models.backend import Backend

_NORM_BEFORE = {"q_proj": "ln1", "k_proj": "ln1", "v_proj": "ln1", "gate_proj": "ln2", "up_proj": "ln2"}
"""The norm that stands before a projection."""
_WEIGHT_TITLES = {
    "ln1": "first norm",
    "ln1_post": "norm after the attention",
    "ln2": "second norm",
    "ln2_post": "norm after the MLP",
    "o_proj": "attention's output",
    "embedding": "embedding",
    "embedding_scaled": "embedding",
    "unembedding": "unembedding",
    "ln_final": "final norm",
}
"""What messages call a weight."""


@dataclass(frozen=True)
class ModelSamples:
    """A few values of every matrix of a model in Hugging Face's layout, and its norms and biases whole, on the CPU."""

    values: dict[str, Tensor]
    """By name: "3.self_attn.q_proj", "3.ln1", "3.self_attn.q_proj.bias" (where it is not zero), "unembedding", ...

    An embedding that the library scales is "embedding_scaled". "unembedding_mean" is the mean over the vocabulary,
    [d_model], which centering subtracts."""
    columns: dict[str, Tensor]
    """The column of each sampled value, by the name of its matrix."""
    folded: frozenset[str]
    """Norms whose weights TransformerLens has multiplied into the matrices that read through them."""
    architecture: Architecture
    """The record of the model's architecture: whether its embedding is scaled, and the offset of its stored norms."""
    d_model: int
    """Width of the residual stream."""

    @classmethod
    def of(cls, backend: Backend) -> ModelSamples:
        """The samples of a model in memory."""
        values: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        norms: dict[str, Tensor | None] = {}
        for layer in range(backend.model.cfg.n_layers):
            norms |= {f"{layer}.{name}": weight for name, weight in backend.norms(layer)}
            biases = [(name, bias) for name, bias in backend.projection_biases(layer) if bool(bias.any())]
            values |= {f"{layer}.{name}": _whole(bias) for name, bias in biases}
        norms["ln_final"] = backend.norm("ln_final")
        for name, weight in _matrices(backend):  # one at a time, as offloaded ones are in memory only until the next
            values[name], columns[name] = sample(weight), sample_positions(weight.numel()) % weight.shape[-1]
        values |= {name: _whole(weight) for name, weight in norms.items() if weight is not None}
        values["unembedding_mean"] = backend.unembedding().detach().mean(0, dtype=torch.float32).cpu()
        return cls(
            values,
            columns,
            frozenset(name for name, weight in norms.items() if weight is None),
            backend.architecture,
            backend.model.cfg.d_model,
        )

    @classmethod
    def stored(cls, folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> ModelSamples:
        """The samples of the named weights that a checkpoint's files hold; of matrices only single values are read.

        Args:
            folder: the checkpoint.
            config: the content of its config.json.
            names: names of weights, as in ``values``.

        Raises CheckpointError.
        """
        architecture, shapes = find_architecture(architecture_name(config)), tensor_shapes(folder)
        values, columns = {}, {}
        for name in names:
            tensor = _checkpoint_name(name, architecture)
            tensor = tensor if tensor in shapes or name != "unembedding" else _EMBEDDING  # tied
            if tensor not in shapes:
                continue
            if len(shapes[tensor]) == 1:
                stored = read_tensors(folder, [tensor])[tensor].clone()  # may be a view of its whole shard
                values[name] = stored if tensor.endswith(".bias") else norm_weights(stored, architecture)
            else:
                name = "embedding" if name == "embedding_scaled" else name
                values[name] = read_values(folder, tensor, sample_positions)
                columns[name] = sample_positions(math.prod(shapes[tensor])) % shapes[tensor][-1]
        return cls(values, columns, frozenset(), architecture, int(config["hidden_size"]))

    def differing(self, recorded: Mapping[str, Tensor]) -> Iterator[str]:
        """Names of the recorded weights that differ from this model's, in the order given."""
        for name, values in recorded.items():
            # The mean only tells what centering subtracted; a folded norm is compared where it was folded into.
            if name == "unembedding_mean" or name in self.folded:
                continue
            if not self._agrees(name, values, recorded):
                yield name

    def _agrees(self, name: str, values: Tensor, recorded: Mapping[str, Tensor]) -> bool:
        processed = bool(self.folded)
        if processed and name.endswith(("v_proj.bias", "o_proj.bias")):
            return True  # the values' bias may have been folded into the output's
        if name.startswith("embedding"):
            return self._same_embedding(name, values, processed)
        if name not in self.values:
            return False
        layer, _, _ = name.partition(".")
        norm = _NORM_BEFORE.get(name.rpartition(".")[2])
        norm = f"{layer}.{norm}" if norm else "ln_final" if name == "unembedding" else ""
        factor = None
        if norm in self.folded:
            if norm not in recorded:
                return False
            factor = recorded[norm][self.columns[name]]
        present = self.values[name]
        is_norm = norm in self.folded or ".ln" in name or name == "ln_final"
        offset = self.architecture.norm_offset if is_norm else 0.0
        stored_in = self._dtypes(recorded) if offset else frozenset()
        if agrees(values, present, factor, processed=processed, offset=offset, stored_in=stored_in):
            return True
        if name != "unembedding" or not processed or "unembedding_mean" not in recorded:
            return False
        mean = recorded["unembedding_mean"][self.columns[name]]
        return agrees(values, present, factor, processed=True, shift=mean)

    def _dtypes(self, recorded: Mapping[str, Tensor]) -> frozenset[torch.dtype]:
        """The dtypes of this model and of the recorded one, read from a matrix of both."""
        return frozenset(
            tensor.dtype
            for tensors in (self.values, recorded)
            for name, tensor in tensors.items()
            if name.endswith("self_attn.o_proj")
        )

    def _same_embedding(self, name: str, values: Tensor, processed: bool) -> bool:
        if name in self.values:
            present = self.values[name]
            product = name == "embedding_scaled" and present.dtype != values.dtype  # rounded as products are
            return agrees(values, present, torch.ones(()) if product else None, processed=processed)
        other = {"embedding": "embedding_scaled", "embedding_scaled": "embedding"}[name]
        scale = self.architecture.embedding_scale(self.d_model)
        scale = scale if other == "embedding_scaled" else 1 / scale
        return agrees(values, self.values[other], torch.tensor(scale, dtype=torch.float64), processed=processed)


def _matrices(backend: Backend) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a model by their names in `ModelSamples`, one at a time."""
    for layer in range(backend.model.cfg.n_layers):
        yield from ((f"{layer}.{name}", weight) for name, weight in backend.named_weights(layer))
    yield "embedding_scaled" if backend.embedding_scale != 1 else "embedding", backend.embedding()
    yield "unembedding", backend.unembedding()


_EMBEDDING = "model.embed_tokens.weight"
_CHECKPOINT_NAMES = {
    "embedding": _EMBEDDING,
    "embedding_scaled": _EMBEDDING,
    "unembedding": "lm_head.weight",
    "ln_final": "model.norm.weight",
}


def _checkpoint_name(name: str, architecture: Architecture) -> str:
    """A checkpoint's name of the weight that `ModelSamples` calls ``name``."""
    if name in _CHECKPOINT_NAMES:
        return _CHECKPOINT_NAMES[name]
    layer, _, tail = name.removeprefix("base.").partition(".")
    if tail in architecture.norms:
        return architecture.norm_tensor(tail, int(layer))
    return f"model.layers.{layer}.{tail}" if tail.endswith(".bias") else f"model.layers.{layer}.{tail}.weight"


@dataclass(frozen=True)
class BaseIdentity:
    """By what a pair identifies the base whose MLPs it holds, taken before they are cast."""

    fingerprint: str
    """Content hash of the base's MLPs."""
    samples: dict[str, Tensor]
    """A few values of every matrix of the base's MLPs, by name ("base.3.mlp.gate_proj"), on the CPU."""

    @classmethod
    def of(cls, base_mlps: Sequence[MLPTensors]) -> BaseIdentity:
        """The identity of the base with these MLPs."""
        samples = {
            f"base.{layer}.mlp.{name}": sample(weight)
            for layer, mlp in enumerate(base_mlps)
            for name, weight in mlp.items()
        }
        return cls(base_fingerprint(base_mlps), samples)

    @property
    def dtype(self) -> str:
        """The dtype of the base's weights, as configurations write it."""
        return dtype_name(next(iter(self.samples.values())).dtype)


def recorded_samples(adapters: AdapterSet | SetDescription) -> dict[str, Tensor]:
    """All samples that a set holds of its models' weights, with the names of `ModelSamples` and `BaseIdentity`."""
    from_layers: dict[str, Tensor] = {}
    for layer, samples in (adapters.layer_samples or {}).items():
        from_layers[f"{layer}.ln2"] = samples.ln2_w
        from_layers[f"{layer}.self_attn.o_proj"] = samples.attention_out
        from_layers[f"base.{layer}.mlp.down_proj"] = samples.base_mlp_out
    return {**from_layers, **(adapters.samples or {})}


def trained_on(adapters: AdapterSet | SetDescription, role: str, folder: Path) -> bool | None:
    """Whether the weights in a model's folder are those that adapters record of their base or target, by samples.

    Args:
        adapters: the set, or its description.
        role: "base" or "target".
        folder: the model's folder with its weights.

    Returns None where no samples are recorded. Raises CheckpointError.
    """
    recorded = {n: t for n, t in recorded_samples(adapters).items() if n.startswith("base.") == (role == "base")}
    if not recorded:
        return None
    return not any(ModelSamples.stored(folder, read_config(folder), recorded).differing(recorded))


def layer_samples(backend: Backend, samples: Mapping[str, Tensor], has_base: bool) -> list[LayerSamples]:
    """The samples of each layer that adapters keep.

    Args:
        backend: the model.
        samples: those of the model and of the base's MLPs.
        has_base: whether there is a base.

    Raises PairMismatchError for a model that adapters cannot be trained on.
    """
    if not has_base:
        raise PairMismatchError("This model was given no base; train adapters on a pair that has one.")
    norms = [backend.second_norm(layer) for layer in range(backend.model.cfg.n_layers)]
    if None in norms:
        raise PairMismatchError(
            "The model's second norms are folded into its MLPs; train adapters on one that is loaded with "
            "from_pretrained_no_processing."
        )
    return [
        LayerSamples(norm, samples[f"{layer}.self_attn.o_proj"], samples[f"base.{layer}.mlp.down_proj"])
        for layer, norm in enumerate(norms)
        if norm is not None
    ]


def target_fingerprints(backend: Backend, planted: AdapterSet | None) -> dict[str, str]:
    """Content hashes of a target's present weights, and their "dtype".

    "target" covers projections and unembedding, "target_embedding_and_norms" all other weights. In a target whose norms
    are folded these are "target_processed" and "target_processed_embedding_and_norms". Planted features count as the
    target's weights, and have a hash of their own, "planted".
    """
    layers = range(backend.model.cfg.n_layers)
    weights = (item for item in _matrices(backend) if not item[0].startswith("embedding"))
    of_planted = [] if planted is None else [(f"planted.{name}", p) for name, p in planted.state_dict().items()]
    unprocessed = all(backend.second_norm(layer) is not None for layer in layers)
    name = "target" if unprocessed else "target_processed"
    groups = {
        name: chain(weights, of_planted),
        f"{name}_embedding_and_norms": _embedding_and_norms(backend),
        **({"planted": of_planted} if of_planted else {}),
    }
    return {**fingerprints(groups), "dtype": dtype_name(backend.model.cfg.dtype)}


def _embedding_and_norms(backend: Backend) -> Iterator[tuple[str, Tensor]]:
    """The weights that the fingerprint "target" leaves out; the same for one model in both libraries."""
    if not backend.architecture.scales_embedding:  # else tied, and scaled in one of the two libraries
        yield "embedding", backend.embedding()
    biases = [list(backend.projection_biases(layer)) for layer in range(backend.model.cfg.n_layers)]
    nonzero_flags = [bias.any().to(backend.device) for of_layer in biases for _, bias in of_layer]
    # One copy from the device for all biases.
    nonzero = iter(torch.stack(nonzero_flags).tolist() if nonzero_flags else ())
    for layer, of_layer in enumerate(biases):
        yield from ((f"{layer}.{name}", weight) for name, weight in backend.norms(layer) if weight is not None)
        yield from ((f"{layer}.{name}", bias) for name, bias in of_layer if next(nonzero))
    if (final := backend.norm("ln_final")) is not None:
        yield "ln_final", final


def layer_and_title(name: str) -> tuple[int | None, str]:
    """The layer of a sampled weight, None for one outside the layers, and what messages call the weight."""
    layer, _, tail = name.removeprefix("base.").partition(".")
    if not layer.isdecimal():
        return None, _WEIGHT_TITLES.get(name, name)
    return int(layer), _WEIGHT_TITLES.get(tail, _WEIGHT_TITLES.get(tail.rpartition(".")[2], tail))


def _whole(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)
