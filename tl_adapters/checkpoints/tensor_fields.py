"""What the tensors of a safetensors file should be: their names, dtypes, shapes and ranges, checked before use.

An index out of range, a transposed matrix or a missing row would otherwise end in an error far from the file, or in
numbers of another feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_adapters.utils.reading import WRITE_AGAIN, UnreadableFileError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of measured values and weights."""
WHOLE_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
"""Dtypes of counts, ids and indices."""


@dataclass(frozen=True)
class TensorField:
    """One tensor of a file. `floats` and `whole_numbers` make fields."""

    shape: tuple[int | str, ...]
    """A size per dimension; a name stands for one size, which is the same wherever the name occurs."""
    dtypes: tuple[torch.dtype, ...]
    """Allowed dtypes."""
    lowest: int | None = None
    """Smallest allowed value; None allows all."""
    below: int | str | None = None
    """Values are smaller than this number, or than the size of this name; None allows all."""
    finite: bool = True
    """Whether NaN and infinities are refused."""


def floats(*shape: int | str, finite: bool = True) -> TensorField:
    """A field of floating-point values."""
    return TensorField(shape, FLOAT_DTYPES, finite=finite)


def whole_numbers(*shape: int | str, lowest: int | None = 0, below: int | str | None = None) -> TensorField:
    """A field of whole numbers from ``lowest`` to before ``below``."""
    return TensorField(shape, WHOLE_DTYPES, lowest, below)


def require_tensors(
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, TensorField],
    source: object,
    sizes: Mapping[str, int] | None = None,
    advice: str = WRITE_AGAIN,
) -> dict[str, int]:
    """Check the tensors of a file, and return the sizes of all names.

    Args:
        tensors: the tensors by name.
        fields: what they should be; there are no others.
        source: the file, for the error.
        sizes: sizes that are known beforehand; others are those of the first tensor that has them.
        advice: a sentence that says what to do where a tensor cannot be used.

    Raises UnreadableFileError, which names the tensor.
    """
    known = dict(sizes or {})
    for name in fields.keys() - tensors.keys():
        raise UnreadableFileError(f"{source} holds no tensor {name}. {advice}")
    for name in tensors.keys() - fields.keys():
        raise UnreadableFileError(
            f"{source} holds an unknown tensor {name[:60]!r}; known are {', '.join(fields)}. {advice}"
        )
    for name, field in fields.items():
        if problem := _problem(tensors[name], field, known):
            raise UnreadableFileError(f"{source}: the tensor {name} {problem}. {advice}")
    return known


def _problem(tensor: Tensor, field: TensorField, sizes: dict[str, int]) -> str | None:
    """What is wrong with a tensor; None if nothing is. Adds the sizes of names that were not known."""
    if tensor.dtype not in field.dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in field.dtypes)
        return f"is of dtype {str(tensor.dtype).removeprefix('torch.')}; allowed is one of {allowed}"
    if tensor.ndim == len(field.shape):
        for size, expected in zip(tensor.shape, field.shape, strict=True):
            if isinstance(expected, str):
                sizes.setdefault(expected, size)
    shape = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in field.shape)
    if tuple(tensor.shape) != shape:
        return f"has the shape {list(tensor.shape)}; expected [{', '.join(map(str, shape))}]"
    if not tensor.numel():
        return None
    if tensor.is_floating_point():
        return "holds NaN or infinity" if field.finite and not bool(torch.isfinite(tensor).all()) else None
    smallest, largest = (int(value) for value in tensor.aminmax())
    below = sizes[field.below] if isinstance(field.below, str) else field.below
    if (field.lowest is not None and smallest < field.lowest) or (below is not None and largest >= below):
        return f"holds values from {smallest} to {largest}; allowed are {_range(field.lowest, below)}"
    return None


def _range(lowest: int | None, below: int | None) -> str:
    if lowest is None:
        return f"values below {below}"
    return f"values from {lowest}" + ("" if below is None else f" to {below - 1}")
