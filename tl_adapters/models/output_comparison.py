"""The tolerance within which two outputs agree, and the error where they do not.

Outputs of a Hugging Face model are compared with those of the stock model of its class (`hf_outputs`), and outputs of a
TransformerLens model with those of its Hugging Face model (`output_agreement`). Both comparisons use `compare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.layer_samples import dtype_name


class DisagreementError(UnsupportedModelError):
    """A model computes something else than the model it should equal; the message says where and by how much."""


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The allowed difference of one block's output, relative to the norm of the output at a position.

    In low precision this is eight units in the last place (measured on random models: one for a block, a tenth for an
    MLP). In full precision it is 1e-4 (measured: 1e-6), unless torch was told to multiply float32 matrices in less.
    """
    if is_low_precision(dtype):
        return 8 * torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and device.type != "cpu":
        return 8 * torch.finfo(torch.bfloat16).eps
    return 1e-4


def compare(
    subject: str,
    expected: Tensor,
    actual: Tensor,
    *,
    residual: Tensor | None = None,
    rounding: Tensor | None = None,
    tolerance_factor: float = 1.0,
    exact: bool = False,
    computed_by: tuple[str, str] = ("in TransformerLens", "transformers"),
    modifications: Sequence[str] = (),
) -> None:
    """Raises DisagreementError where two outputs differ at some position by more than the tolerance.

    Args:
        subject: the subject of the message: which part of which model.
        expected, actual: the two outputs, [1, pos, d] each.
        residual: the residual stream that went in, where the output is that stream and something added. The tolerance
            is then relative to what was added, and the rounding of the sums is allowed as well.
        rounding: a further allowed difference, relative like the tolerance, [1, pos].
        tolerance_factor: multiplies the tolerance.
        exact: allow no difference.
        computed_by: where the message says that ``actual`` was computed, and what computed ``expected``.
        modifications: possible causes, which the message lists.
    """
    coarser = max(expected.dtype, actual.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    allowed = tolerance_factor * tolerance(coarser, actual.device)
    size = position_norms(expected if residual is None else expected - residual)
    rounding_of_sums = 0.0 if residual is None else 2 * torch.finfo(coarser).eps * position_norms(expected)
    difference = position_norms(actual.to(expected.device) - expected)
    limit = (allowed + (0.0 if rounding is None else 4 * rounding)) * size + rounding_of_sums
    if exact:
        allowed, limit = 0.0, torch.zeros_like(difference)
    if bool((difference <= limit).all()):
        return
    position = int((difference - limit).nan_to_num(torch.inf).flatten().argmax())
    row, actual_row = expected.flatten(0, -2)[position].float(), actual.flatten(0, -2)[position].float()
    dimension = int((row - actual_row).abs().nan_to_num(torch.inf).argmax())
    cause = f" Besides its class the model has: {'; '.join(modifications[:3])}." if modifications else ""
    raise DisagreementError(
        f"{subject} computes {float(actual_row[dimension]):.6g} {computed_by[0]} where {computed_by[1]} computes "
        f"{float(row[dimension]):.6g} (token {position} of {difference.numel()}, dimension {dimension}; the outputs "
        f"differ by {float(difference.flatten()[position] / size.flatten()[position]):.2g} of their norm, allowed are "
        f"{allowed:.2g} in {dtype_name(coarser)}). A pair of it would be another model.{cause} "
        f"Installed: {library_versions()}."
    )


def library_versions() -> str:
    """The installed releases of torch, transformers and transformer-lens, for messages."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether a dtype has fewer digits than float32."""
    return dtype in (torch.float16, torch.bfloat16)


def position_norms(x: Tensor) -> Tensor:
    """The L2 norm at each position, [..., d] to [...], in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1)
