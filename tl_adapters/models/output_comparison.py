"""Two outputs that should be the same: how far they may be apart, and what is said where they are further."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from tl_adapters.checkpoints.architectures import UnsupportedModelError


class DisagreementError(UnsupportedModelError):
    """A model of TransformerLens that computes something else than its Hugging Face model; says where and how much."""


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What one block may be off by, relative to the norm of its output at a position.

    In low precision eight units in the last place (measured on random models: one for a block, a tenth for an MLP).
    In full precision 1e-4 (measured: 1e-6), unless torch was told to multiply float32 matrices in less.
    """
    if is_low(dtype):
        return 8 * torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and device.type != "cpu":
        return 8 * torch.finfo(torch.bfloat16).eps
    return 1e-4


def compare(
    what: str,
    theirs: Tensor,
    ours: Tensor,
    *,
    given: Tensor | None = None,
    rounding: Tensor | None = None,
    times: float = 1.0,
    exact: bool = False,
    where: tuple[str, str] = ("in TransformerLens", "transformers"),
    peculiar: Sequence[str] = (),
) -> None:
    """Raises DisagreementError where ``ours`` differs from ``theirs`` at some position by more than the tolerance.

    Args:
        what: subject of the message.
        theirs, ours: [1, pos, d] each.
        given: the residual stream that went in, where the output is that and something added; the tolerance is then
            relative to what was added, and the rounding of the sums is allowed for.
        rounding: what is allowed besides, relative like the tolerance.
        times: a factor on the tolerance.
        exact: nothing is allowed.
        where: how the message calls the places where ``ours`` and ``theirs`` were computed.
        peculiar: what may be the cause.
    """
    coarser = max(theirs.dtype, ours.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    allowed = times * tolerance(coarser, ours.device)
    added = norm(theirs if given is None else theirs - given)
    sums = 0.0 if given is None else 2 * torch.finfo(coarser).eps * norm(theirs)
    off = norm(ours.to(theirs.device) - theirs)
    limit = (allowed + (0.0 if rounding is None else 4 * rounding)) * added + sums
    if exact:
        allowed, limit = 0.0, torch.zeros_like(off)
    if bool((off <= limit).all()):
        return
    at = int((off - limit).nan_to_num(torch.inf).flatten().argmax())
    a, b = theirs.flatten(0, -2)[at].float(), ours.flatten(0, -2)[at].float()
    place = int((a - b).abs().nan_to_num(torch.inf).argmax())
    cause = f" What it has besides its class: {'; '.join(peculiar[:3])}." if peculiar else ""
    raise DisagreementError(
        f"{what} computes {float(b[place]):.6g} {where[0]} where {where[1]} computes {float(a[place]):.6g} "
        f"(token {at} of {off.numel()}, dimension {place}; the outputs differ by "
        f"{float(off.flatten()[at] / added.flatten()[at]):.2g} of their norm, allowed are {allowed:.2g} in "
        f"{named(coarser)}). A pair of it would be another model.{cause} Installed: {versions()}."
    )


def versions() -> str:
    """Installed releases of the libraries that compute."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))


def is_low(dtype: torch.dtype) -> bool:
    """The dtype has fewer digits than float32."""
    return dtype in (torch.float16, torch.bfloat16)


def norm(x: Tensor) -> Tensor:
    """[..., d] to [...], in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1)


def named(dtype: torch.dtype) -> str:
    """ "bfloat16" and the like."""
    return str(dtype).removeprefix("torch.")
