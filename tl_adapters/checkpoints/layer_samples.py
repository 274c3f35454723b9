"""By what adapters know their target and base again: content, not names; in memory and in files.

A few values of every matrix, and every norm and bias whole. `agrees` compares them with a model's: bit for bit where
both are of one dtype, and else with no more room than the roundings in between leave, which is less than a change of
one unit in the last place of the coarser dtype.
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
"""Relative; what a few operations in float32 leave. A change of one unit in bfloat16's last place is at least 2^-8."""
_ATTENTION_OUT = "model.layers.{}.self_attn.o_proj.weight"


class LayerSamples(NamedTuple):
    """What adapters keep of one layer of their models: to know them again, and to fit models with folded norms."""

    ln2_w: Tensor
    """The target's second-norm weights as TransformerLens has them (Gemma 1 + w), [d_model]."""
    attention_out: Tensor
    """Values of the target's attention output projection, [at most 64]."""
    base_mlp_out: Tensor
    """Values of the base's down projection, [at most 64]."""


def sample(weight: Tensor) -> Tensor:
    """Evenly spaced values of a matrix in Hugging Face's layout, on the CPU."""
    places = sample_places(weight.numel()).to(weight.device)
    return weight.detach()[torch.unravel_index(places, weight.shape)].to("cpu", copy=True)


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
    """Whether ``present`` holds the values that were ``recorded``, as casts and weight processing change them.

    Args:
        recorded, present: values of one weight, on the CPU, [n].
        factor: what the recorded values were multiplied with since (a folded norm's weights at these places).
        processed: TransformerLens processed the model's weights, in float32.
        shift: what was taken off the recorded values before that (their mean, where an unembedding was centered), [n].
        offset: what a norm's weights were stored without (Gemma's 1, where TransformerLens has 1 + w); of ``factor``
            where there is one, else of ``recorded``.
        stored_in: dtypes that weights without the offset went through; with it they are in float32 at least.

    In one dtype and without processing they must be equal. Else each dtype that values went through may have moved
    them by half a unit in the last place, and a product's factors before it; arithmetic in float32 by little more.
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
        size = size.max().expand_as(size)  # a mean is as exact as what it is the mean of is large
        expected = expected - shift.double()
    if factor is None:
        room = _ARITHMETIC * size
        stored = (expected - offset).abs() * (offset != 0)  # rounded itself before the offset was added
    else:
        by = torch.as_tensor(factor, dtype=torch.float64).expand_as(expected)
        stored = size * ((by - offset).abs() * (offset != 0) + 2 * by.abs())  # of both factors
        expected, size = expected * by, size * by.abs()
        room = _ARITHMETIC * (size + stored)
    for dtype in dtypes:
        half = 0.5 * _unit(size, dtype) * (1 if shift is None else 2)
        room = room + half
    for dtype in dtypes | stored_in:
        room = room + 0.5 * torch.finfo(dtype).eps * stored
    fits = expected.abs() <= torch.finfo(present.dtype).max
    return bool(((present.double() - expected).abs() <= room)[fits].all())


def norm_weights(stored: Tensor, architecture: Architecture) -> Tensor:
    """A norm's weights as TransformerLens has them, from those of a checkpoint.

    Gemma's are 1 + w, which it computes in float32 from weights of any dtype; the result is in float32 at least.
    """
    if not architecture.norm_offset:
        return stored
    return (architecture.norm_offset + stored.float()).to(torch.promote_types(stored.dtype, torch.float32))


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of values, which are not negative, in a dtype."""
    about = torch.finfo(dtype)
    return about.eps * torch.exp2(values.clamp(min=about.smallest_normal).log2().floor())


def stored_samples(target: Path, base: Path, architecture: Architecture, layer: int) -> LayerSamples:
    """The samples of a layer in checkpoints' files; of matrices only single values are read. Raises CheckpointError."""
    name = architecture.norm_tensor("ln2", layer)
    ln2_w = read_tensors(target, [name])[name].clone()  # may be a view of its whole shard
    return LayerSamples(
        norm_weights(ln2_w, architecture),
        read_values(target, attention_out_name(layer), sample_places),
        read_values(base, MLP_KEY.format(layer, "down_proj"), sample_places),
    )


def attention_out_name(layer: int) -> str:
    """The tensor of the attention's output projection."""
    return _ATTENTION_OUT.format(layer)


def sample_places(n: int) -> Tensor:
    """Places of the samples in a flattened matrix of so many values."""
    return torch.linspace(0, n - 1, min(SAMPLED_VALUES, n), dtype=torch.float64).round().long()
