"""Samples of weights that identify base and target by content instead of by name, and their comparison.

Adapters record a few values of every matrix, and every norm and bias completely. `agrees` compares them with those of a
model: for equality where both have one dtype, otherwise with a tolerance for the roundings in between, which is less
than a change of one unit in the last place of the coarser dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tl_adapters.checkpoints.architectures import Architecture
from tl_adapters.checkpoints.model_files import MLP_KEY, read_tensors, read_values

SAMPLED_VALUES = 64
_ARITHMETIC = 2.0**-20
"""Relative error of a few float32 operations. A change of one unit in bfloat16's last place is at least 2^-8."""
_ATTENTION_OUT = "model.layers.{}.self_attn.o_proj.weight"


class LayerSamples(NamedTuple):
    """Samples of one layer of target and base, which identify the two and fit adapters to models with folded norms."""

    ln2_w: Tensor
    """The target's second-norm weights as TransformerLens has them (Gemma 1 + w), [d_model]."""
    attention_out: Tensor
    """Sampled values of the target's attention output projection, [at most 64]."""
    base_mlp_out: Tensor
    """Sampled values of the base's down projection, [at most 64]."""


def sample(weight: Tensor) -> Tensor:
    """Evenly spaced values of a matrix in Hugging Face's layout, on the CPU."""
    positions = sample_positions(weight.numel()).to(weight.device)
    return weight.detach()[torch.unravel_index(positions, weight.shape)].to("cpu", copy=True)


def agrees(
    recorded: Tensor,
    present: Tensor,
    factor: Tensor | float | None = None,
    *,
    processed: bool = False,
    shift: Tensor | None = None,
    offset: float = 0.0,
    stored_in: frozenset[torch.dtype] = frozenset(),
) -> bool:
    """Whether ``present`` holds the values that were ``recorded``, up to casts and weight processing.

    In one dtype and without processing, the values must be equal. Otherwise each dtype that values went through may
    have changed them, and the factors of a product, by half a unit in the last place; float32 arithmetic adds little.

    Args:
        recorded, present: values of one weight, on the CPU, [n].
        factor: what the recorded values were multiplied by since: the weights of a folded norm at these positions.
        processed: whether TransformerLens processed the model's weights, in float32.
        shift: what was subtracted from the recorded values before, [n]: their mean, where an unembedding was centered.
        offset: what is added to a norm's stored weights (1 for Gemma, for which TransformerLens has 1 + w); it refers
            to ``factor`` if that is given, otherwise to ``recorded``.
        stored_in: dtypes of the weights before the offset was added; after it they are in float32 at least.
    """
    if recorded.shape != present.shape:
        return False
    same_model = recorded.dtype == present.dtype and len(stored_in) < 2
    if same_model and not processed and factor is None:
        return torch.equal(recorded, present)
    dtypes = {present.dtype, *([recorded.dtype] if recorded.dtype != present.dtype else [])}
    if processed:
        dtypes.add(torch.float32)
    expected = recorded.double()
    size = expected.abs()
    if shift is not None:
        size = size.max().expand_as(size)  # the error of a mean is relative to the largest value
        expected = expected - shift.double()
    if factor is None:
        tolerance = _ARITHMETIC * size
        stored = (expected - offset).abs() * (offset != 0)  # was rounded before the offset was added
    else:
        scale = torch.as_tensor(factor, dtype=torch.float64).expand_as(expected)
        stored = size * ((scale - offset).abs() * (offset != 0) + 2 * scale.abs())  # of both factors
        expected, size = expected * scale, size * scale.abs()
        tolerance = _ARITHMETIC * (size + stored)
    for dtype in dtypes:
        half_unit = 0.5 * unit_in_last_place(size, dtype) * (1 if shift is None else 2)
        tolerance = tolerance + half_unit
    for dtype in dtypes | stored_in:
        tolerance = tolerance + 0.5 * torch.finfo(dtype).eps * stored
    representable = expected.abs() <= torch.finfo(present.dtype).max
    return bool(((present.double() - expected).abs() <= tolerance)[representable].all())


def norm_weights(stored: Tensor, architecture: Architecture) -> Tensor:
    """The weights of a norm as TransformerLens has them, from those stored in a checkpoint.

    Gemma's are 1 + w, which the model computes in float32 from weights of any dtype; here they are in float32 at least.
    """
    if not architecture.norm_offset:
        return stored
    return (architecture.norm_offset + stored.float()).to(torch.promote_types(stored.dtype, torch.float32))


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place, in a dtype, of values that are not negative."""
    limits = torch.finfo(dtype)
    return limits.eps * torch.exp2(values.clamp(min=limits.smallest_normal).log2().floor())


def stored_samples(target: Path, base: Path, architecture: Architecture, layer: int) -> LayerSamples:
    """The samples of a layer, read from the models' files; of matrices only single values. Raises CheckpointError."""
    return LayerSamples(
        stored_second_norm(target, architecture, layer),
        read_values(target, attention_out_name(layer), sample_positions),
        read_values(base, MLP_KEY.format(layer, "down_proj"), sample_positions),
    )


def stored_second_norm(folder: Path, architecture: Architecture, layer: int) -> Tensor:
    """A layer's second-norm weights as TransformerLens has them, read from a model's files. Raises CheckpointError."""
    name = architecture.norm_tensor("ln2", layer)
    return norm_weights(read_tensors(folder, [name])[name].clone(), architecture)  # may be a view of its whole shard


def attention_out_name(layer: int) -> str:
    """The name of the attention's output projection in a checkpoint."""
    return _ATTENTION_OUT.format(layer)


def sample_positions(n: int) -> Tensor:
    """Positions of the samples in a flattened matrix of ``n`` values."""
    return torch.linspace(0, n - 1, min(SAMPLED_VALUES, n), dtype=torch.float64).round().long()
