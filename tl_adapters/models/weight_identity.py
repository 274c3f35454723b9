"""Which model is this? Samples of every weight of a model, and which of them are not those of another.

A model that TransformerLens has processed is known again: where a norm is folded, its weights were multiplied into the
matrices that read through it, and what those must be now follows from what was recorded of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet, SetDescription
from tl_adapters.checkpoints.architectures import Architecture, architecture_name, find_architecture
from tl_adapters.checkpoints.base_mlps import MLPTensors
from tl_adapters.checkpoints.layer_samples import agrees, norm_weights, sample, sample_places
from tl_adapters.checkpoints.model_files import read_tensors, read_values, tensor_shapes
from tl_adapters.models.backend import Backend

_READS_THROUGH = {"q_proj": "ln1", "k_proj": "ln1", "v_proj": "ln1", "gate_proj": "ln2", "up_proj": "ln2"}
"""The norm that stands before a projection."""
_IN_WORDS = {
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


@dataclass(frozen=True)
class ModelSamples:
    """A few values of every matrix of a model in Hugging Face's layout, and its norms and biases whole, on the CPU."""

    values: dict[str, Tensor]
    """By name: "3.self_attn.q_proj", "3.ln1", "3.self_attn.q_proj.bias" (where it is not zero), "unembedding", ...

    An embedding that the library scales is "embedding_scaled". "unembedding_mean" is the mean over the vocabulary,
    [d_model], which centering takes off."""
    columns: dict[str, Tensor]
    """Of the sampled values of each matrix."""
    folded: frozenset[str]
    """Norms whose weights TransformerLens has multiplied into the matrices that read through them."""
    architecture: Architecture
    """Of the model: whether its embedding is scaled, and what its norms are stored without."""
    d_model: int
    """Width of the residual stream."""

    @classmethod
    def of(cls, backend: Backend) -> ModelSamples:
        """Of a model as it is in memory."""
        values: dict[str, Tensor] = {}
        matrices: dict[str, Tensor] = {}
        norms: dict[str, Tensor | None] = {}
        for layer in range(backend.model.cfg.n_layers):
            matrices |= {f"{layer}.{name}": weight for name, weight in backend.named_weights(layer)}
            norms |= {f"{layer}.{name}": weight for name, weight in backend.norms(layer)}
            biases = [(name, bias) for name, bias in backend.projection_biases(layer) if bool(bias.any())]
            values |= {f"{layer}.{name}": _whole(bias) for name, bias in biases}
        norms["ln_final"] = backend.norm("ln_final")
        scaled = backend.embedding_scale != 1
        matrices["embedding_scaled" if scaled else "embedding"] = backend.embedding()
        matrices["unembedding"] = backend.unembedding()
        values |= {name: sample(weight) for name, weight in matrices.items()}
        values |= {name: _whole(weight) for name, weight in norms.items() if weight is not None}
        values["unembedding_mean"] = matrices["unembedding"].detach().mean(0, dtype=torch.float32).cpu()
        return cls(
            values,
            {name: sample_places(w.numel()) % w.shape[-1] for name, w in matrices.items()},
            frozenset(name for name, weight in norms.items() if weight is None),
            backend.architecture,
            backend.model.cfg.d_model,
        )

    @classmethod
    def stored(cls, folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> ModelSamples:
        """Of a checkpoint's files, the weights named and there; of matrices only single values are read.

        Args:
            folder, config: the checkpoint, and what its config.json says.
            names: as in ``values``.

        Raises CheckpointError.
        """
        architecture, there = find_architecture(architecture_name(config)), tensor_shapes(folder)
        values, columns = {}, {}
        for name in names:
            stored = _stored_name(name, architecture)
            stored = stored if stored in there or name != "unembedding" else _EMBEDDING  # tied
            if stored not in there:
                continue
            if len(there[stored]) == 1:
                whole = read_tensors(folder, [stored])[stored].clone()  # may be a view of its whole shard
                values[name] = whole if stored.endswith(".bias") else norm_weights(whole, architecture)
            else:
                name = "embedding" if name == "embedding_scaled" else name
                values[name] = read_values(folder, stored, sample_places)
                columns[name] = sample_places(math.prod(there[stored])) % there[stored][-1]
        return cls(values, columns, frozenset(), architecture, int(config["hidden_size"]))

    def differing(self, recorded: Mapping[str, Tensor]) -> Iterator[str]:
        """Names of the recorded weights that are not this model's, in the order given."""
        for name, values in recorded.items():
            # The mean is there to tell what centering took off; a folded norm is compared where it was folded into.
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
        norm = _READS_THROUGH.get(name.rpartition(".")[2])
        norm = f"{layer}.{norm}" if norm else "ln_final" if name == "unembedding" else ""
        factor = None
        if norm in self.folded:
            if norm not in recorded:
                return False
            factor = recorded[norm][self.columns[name]]
        here = self.values[name]
        offset = self.architecture.norm_offset if norm in self.folded or ".ln" in name or name == "ln_final" else 0.0
        stored_in = self._dtypes(recorded) if offset else frozenset()
        if agrees(values, here, factor, processed=processed, offset=offset, stored_in=stored_in):
            return True
        if name != "unembedding" or not processed or "unembedding_mean" not in recorded:
            return False
        mean = recorded["unembedding_mean"][self.columns[name]]
        return agrees(values, here, factor, processed=True, shift=mean)

    def _dtypes(self, recorded: Mapping[str, Tensor]) -> frozenset[torch.dtype]:
        """The dtypes of this model and of the recorded one, by a matrix of both."""
        return frozenset(
            tensor.dtype
            for tensors in (self.values, recorded)
            for name, tensor in tensors.items()
            if name.endswith("self_attn.o_proj")
        )

    def _same_embedding(self, name: str, values: Tensor, processed: bool) -> bool:
        if name in self.values:
            here = self.values[name]
            product = name == "embedding_scaled" and here.dtype != values.dtype  # rounded as products are
            return agrees(values, here, torch.ones(()) if product else None, processed=processed)
        other = {"embedding": "embedding_scaled", "embedding_scaled": "embedding"}[name]
        scale = self.architecture.embedding_scale(self.d_model)
        scale = scale if other == "embedding_scaled" else 1 / scale
        return agrees(values, self.values[other], torch.tensor(scale, dtype=torch.float64), processed=processed)


_EMBEDDING = "model.embed_tokens.weight"
_STORED = {
    "embedding": _EMBEDDING,
    "embedding_scaled": _EMBEDDING,
    "unembedding": "lm_head.weight",
    "ln_final": "model.norm.weight",
}


def _stored_name(name: str, architecture: Architecture) -> str:
    """What a checkpoint calls the weight that `ModelSamples` calls ``name``."""
    if name in _STORED:
        return _STORED[name]
    layer, _, tail = name.removeprefix("base.").partition(".")
    if tail in architecture.norms:
        return architecture.norm_tensor(tail, int(layer))
    return f"model.layers.{layer}.{tail}" if tail.endswith(".bias") else f"model.layers.{layer}.{tail}.weight"


def base_samples(base_mlps: Sequence[MLPTensors]) -> dict[str, Tensor]:
    """A few values of every matrix of a base's MLPs, by name ("base.3.mlp.gate_proj"), on the CPU."""
    return {
        f"base.{layer}.mlp.{name}": sample(weight)
        for layer, mlp in enumerate(base_mlps)
        for name, weight in mlp.items()
    }


def recorded_samples(adapters: AdapterSet | SetDescription) -> dict[str, Tensor]:
    """All that a set knows of its models' weights, named as in `ModelSamples` and `base_samples`."""
    marks: dict[str, Tensor] = {}
    for layer, known in (adapters.marks or {}).items():
        marks[f"{layer}.ln2"] = known.ln2_w
        marks[f"{layer}.self_attn.o_proj"] = known.attention_out
        marks[f"base.{layer}.mlp.down_proj"] = known.base_mlp_out
    return {**marks, **(adapters.samples or {})}


def layer_and_weight(name: str) -> tuple[int | None, str]:
    """The layer of a weight, None where it is of none, and what a message calls it."""
    layer, _, tail = name.removeprefix("base.").partition(".")
    if not layer.isdecimal():
        return None, _IN_WORDS.get(name, name)
    return int(layer), _IN_WORDS.get(tail, _IN_WORDS.get(tail.rpartition(".")[2], tail))


def _whole(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)
