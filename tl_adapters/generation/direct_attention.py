"""Attention of one new token per row, from the weights and cached keys and values, without modules.

A `Step` holds what all layers share in a decoding step. `DirectAttention` is used by `direct_layers` for a
HookedTransformer and by `direct_bridge` for a TransformerBridge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What all layers share in one decoding step."""

    mask: Int[Tensor, "batch pos"]
    """1 at real tokens and 0 at padding, for all tokens so far and the new one."""
    added_mask: Float[Tensor, "batch 1 1 pos"] | None
    """0 at real tokens and -inf at padding, which is added to scores; None where there is no padding."""
    positions: Int[Tensor, "batch"]
    """Position of the new token in its row, padding not counted."""
    rotations: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What layers read of the rotary tables at these positions, by the id of the attention that holds the tables."""

    @classmethod
    def after(cls, mask: Int[Tensor, "batch pos"], dtype: torch.dtype, padded: bool) -> Step:
        """The step whose new token is the mask's last; ``padded`` says whether the mask has a 0."""
        positions = mask.sum(-1) - 1
        if not padded:
            return cls(mask, None, positions)
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask == 0, -torch.inf)
        return cls(mask, added[:, None, None], positions)


@dataclass(frozen=True)
class DirectAttention:
    """The weights of one layer's attention, and what it computes from them."""

    projections: Sequence[tuple[Tensor, Tensor | None]]
    """Weights [heads x d_head, d_model] and biases of queries, keys and values."""
    output: tuple[Tensor, Tensor | None]
    """Weight [d_model, heads x d_head] and bias of the output."""
    head_norms: Sequence[Callable[[Tensor], Tensor]]
    """The norms of queries and keys, where the model has them."""
    d_head: int
    """Width of a head."""
    scale: float
    """The factor of the scores."""
    soft_cap: float
    """The soft cap of the scores; 0 is none."""

    def project(
        self, x: Float[Tensor, "batch d_model"], cos: Float[Tensor, "batch d_head"], sin: Float[Tensor, "batch d_head"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, [batch, heads, d_head]; cos and sin are as in `rotate`."""
        q, k, v = (F.linear(x, weight, bias).view(len(x), -1, self.d_head) for weight, bias in self.projections)
        if self.head_norms:
            q, k = (norm(heads) for norm, heads in zip(self.head_norms, (q, k), strict=True))
        q, k = rotate(torch.cat([q, k], 1), cos[:, None], sin[:, None]).split([q.shape[1], k.shape[1]], 1)
        return q, k, v

    def attend(
        self,
        q: Float[Tensor, "batch heads d_head"],
        keys: Float[Tensor, "batch kv_heads pos d_head"],
        values: Float[Tensor, "batch kv_heads pos d_head"],
        step: Step,
    ) -> Float[Tensor, "batch 1 d_model"]:
        """The attention's output; keys and values are those of the last positions of the step's mask."""
        added = None if step.added_mask is None else step.added_mask[..., -keys.shape[2] :]
        # Heads that share keys are rows of one product, so the keys need not be repeated.
        grouped = q.unflatten(1, (keys.shape[1], -1))
        if self.soft_cap > 0:
            scores = self.soft_cap * torch.tanh(grouped @ keys.mT * self.scale / self.soft_cap)
            z = (scores if added is None else scores + added).softmax(-1) @ values
        else:
            z = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=added, scale=self.scale)
        return F.linear(z.flatten(1), *self.output)[:, None]


def signed(sin: Float[Tensor, "*batch d_head"]) -> Float[Tensor, "*batch d_head"]:
    """Sines whose first half is negated, as `rotate` takes them."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of [..., d_head]: x cos + (second half, first half) sin, with sines from `signed`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
