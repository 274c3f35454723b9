"""The layers of a HookedTransformer in a decoding step, computed without their modules where no hook looks inside.

A decoding step reads one token per row, so that calling the modules takes longer than what they compute: a block of
TransformerLens normalizes its input three times, rotates the keys of all earlier tokens and copies them. A
`DirectLayer` computes the same from the same weights, with keys kept rotated. It calls the block itself in every step
in which a hook is on the block, its norms or its attention, and the MLP in every step in which a hook is inside it.
Hooks on the residual stream and on the outputs of attention and MLP (hook_resid_pre, hook_resid_mid, hook_resid_post,
hook_attn_out, hook_mlp_out) cost only their own calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.components import RMSNorm, RMSNormPre, TransformerBlock
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.generation.direct_attention import DirectAttention, Step, rotate, signed
from tl_adapters.models.components import FusedAttention, FusedBlock, FusedRMSNorm, OffsetRMSNorm, is_plain
from tl_adapters.models.hooked_transformer import RoutedGatedMLP
from tl_adapters.models.routed_mlp import MLPWeights
from tl_adapters.utils.precision import at_least_float32

FREE_POINTS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
"""Hook points of a block whose hooks a direct layer calls."""
KNOWN_MODULES = {
    FusedAttention,
    FusedBlock,
    FusedRMSNorm,
    GatedMLP,
    HookPoint,
    OffsetRMSNorm,
    RMSNorm,
    RMSNormPre,
    RoutedGatedMLP,
    TranscoderAdapter,
}
LEAST_GROWTH, GROWTH_SHARE = 32, 8
"""A full cache is copied into one for 32 more tokens, or for an eighth more than it holds, whichever is larger."""


class RotatedKeys:
    """Rotated keys, and values, of the tokens that one layer has read, in tensors that may be longer."""

    def __init__(self, keys: Float[Tensor, "batch heads pos d_head"], values: Float[Tensor, "batch heads pos d_head"]):
        self.keys, self.values, self.length = keys, values, keys.shape[2]

    def append(self, key: Float[Tensor, "batch heads d_head"], value: Float[Tensor, "batch heads d_head"]) -> None:
        """Add one token."""
        if self.length == self.keys.shape[2]:
            self.keys, self.values = self._enlarged(self.keys), self._enlarged(self.values)
        self.keys[:, :, self.length] = key
        self.values[:, :, self.length] = value
        self.length += 1

    def _enlarged(self, old: Tensor) -> Tensor:
        longer = self.length + max(LEAST_GROWTH, self.length // GROWTH_SHARE)
        new = old.new_empty(*old.shape[:2], longer, old.shape[3])
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def read(self, last: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values, [batch, heads, pos, d_head], of all tokens or of the last ones."""
        start = 0 if last is None else max(0, self.length - last)
        return self.keys[:, :, start : self.length], self.values[:, :, start : self.length]

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep only these rows."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class DirectLayer:
    """One layer in decoding steps.

    Args:
        block: the layer's block, for which `is_direct` holds.
        entry: its entry of the model's cache, which the pass over the prompts has filled.
        rotary: the attention of the first layer, whose rotary tables are read once in a step for all layers that have
            equal ones.
    """

    def __init__(
        self, block: TransformerBlock, entry: TransformerLensKeyValueCacheEntry, rotary: FusedAttention
    ) -> None:
        self.block, self.entry = block, entry
        self.rotated: RotatedKeys | None = None
        attn = block.attn
        tables = ((attn.rotary_cos, rotary.rotary_cos), (attn.rotary_sin, rotary.rotary_sin))
        self.rotary = rotary if all(torch.equal(*pair) for pair in tables) else attn
        inside = [module for name, module in block.named_children() if name not in (*FREE_POINTS, "mlp")]
        self.hooks = _hooks_of([block, *(m for child in inside for m in child.modules())])
        self.mlp_hooks = _hooks_of([*block.mlp.modules()])
        self.neurons = {module: _neurons(module) for module in (block.mlp, getattr(block.mlp, "base", None)) if module}
        names = ("ln1", "ln2", "ln1_post", "ln2_post")
        self.norms = {name: _norm(getattr(block, name)) for name in names if hasattr(block, name)}
        self.attention = _attention_of(attn)
        self.window = attn.cfg.window_size if attn.attn_type == "local" else None

    def __call__(self, resid: Float[Tensor, "batch 1 d_model"], step: Step) -> Float[Tensor, "batch 1 d_model"]:
        """The residual stream after this layer, whose keys and values of the new token are cached."""
        block, norms = self.block, self.norms
        if any(self.hooks) or step.mask.shape[1] > len(self.rotary.rotary_cos):  # the block extends the rotary tables
            entry = self._unrotated(step)
            return block(resid, past_kv_cache_entry=entry, attention_mask=step.mask)
        resid = _through(block.hook_resid_pre, resid)
        attn_out = self._attention(norms["ln1"](resid), step)
        if "ln1_post" in norms:
            attn_out = norms["ln1_post"](attn_out)
        resid = _through(block.hook_resid_mid, resid + _through(block.hook_attn_out, attn_out))
        mlp_out = self._mlp(norms["ln2"](resid))
        if "ln2_post" in norms:
            mlp_out = norms["ln2_post"](mlp_out)
        return _through(block.hook_resid_post, resid + _through(block.hook_mlp_out, mlp_out))

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep only these rows of the batch in the cache."""
        if self.rotated is not None:
            self.rotated.select(rows)
        else:
            self.entry.past_keys, self.entry.past_values = self.entry.past_keys[rows], self.entry.past_values[rows]

    # -- the cache ------------------------------------------------------------------------------------------------

    def _rotated(self, step: Step) -> RotatedKeys:
        """The cache with rotated keys, which takes the place of the model's own."""
        if self.rotated is None:
            cos, sin = self._rotations(self._positions(step))
            keys, values = (t.transpose(1, 2) for t in (self.entry.past_keys, self.entry.past_values))
            self.rotated = RotatedKeys(rotate(keys, cos[:, None], sin[:, None]), values.contiguous())
            self.entry.past_keys, self.entry.past_values = keys.new_empty(0), values.new_empty(0)
        return self.rotated

    def _unrotated(self, step: Step) -> TransformerLensKeyValueCacheEntry:
        """The model's own cache, whose keys are not rotated."""
        if self.rotated is not None:
            cos, sin = self._rotations(self._positions(step))
            keys, values = self.rotated.read(None)
            self.entry.past_keys = rotate(keys, cos[:, None], -sin[:, None]).transpose(1, 2)
            self.entry.past_values, self.rotated = values.transpose(1, 2), None
        return self.entry

    def _positions(self, step: Step) -> Int[Tensor, "batch pos"]:
        """Positions of the tokens before the new one in their rows."""
        return (step.mask[:, :-1].cumsum(-1) - 1).clamp(min=0)

    def _rotations(self, positions: Int[Tensor, "*batch"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [*batch, d_head], as `rotate` takes them."""
        return self.rotary.rotary_cos[positions], signed(self.rotary.rotary_sin[positions])

    # -- attention and MLP ----------------------------------------------------------------------------------------

    def _attention(self, normed: Float[Tensor, "batch 1 d_model"], step: Step) -> Float[Tensor, "batch 1 d_model"]:
        if id(self.rotary) not in step.rotations:
            step.rotations[id(self.rotary)] = self._rotations(step.positions)
        q, k, v = self.attention.project(normed[:, 0], *step.rotations[id(self.rotary)])
        cache = self._rotated(step)
        cache.append(k, v)
        return self.attention.attend(q, *cache.read(self.window), step)

    def _mlp(self, x: Float[Tensor, "batch 1 d_model"]) -> Float[Tensor, "batch 1 d_model"]:
        mlp = self.block.mlp
        routed = isinstance(mlp, RoutedGatedMLP)
        chosen = mlp.base if routed and mlp.route.base_mlp else mlp
        weights = self.neurons.get(chosen)
        extra = routed and (mlp.planted is not None or (mlp.base_scale is not None and mlp.route.base_mlp))
        if weights is None or extra or any(self.mlp_hooks):
            return mlp(x)
        out = weights.neurons(x) @ weights.W_out
        if routed and mlp.route.adapter:
            out = out + mlp.adapter(mlp.adapter_input(x)).to(out.dtype)
        return out


def is_direct(block: Any) -> bool:
    """Whether a `DirectLayer` computes what this block does: one that `build_hooked_transformer` made, unchanged."""
    attn = getattr(block, "attn", None)
    if type(block) is not FusedBlock or type(attn) is not FusedAttention or not is_plain(block.cfg):
        return False
    modules = [*block.modules()]
    views = (
        attn.W_Q.permute(0, 2, 1),
        attn._W_K.permute(0, 2, 1),
        attn._W_V.permute(0, 2, 1),
        attn.W_O.permute(2, 0, 1),
    )
    return (
        all(type(module) in KNOWN_MODULES and "forward" not in module.__dict__ for module in modules)
        and all(view.is_contiguous() for view in views)  # else every step would copy the weights
        and _neurons(block.mlp) is not None
    )


def _attention_of(attn: FusedAttention) -> DirectAttention:
    """The weights of an attention, as views in the layout of Hugging Face."""
    projections = [
        (weight.permute(0, 2, 1).flatten(0, 1), bias.flatten())
        for weight, bias in ((attn.W_Q, attn.b_Q), (attn._W_K, attn._b_K), (attn._W_V, attn._b_V))
    ]
    return DirectAttention(
        projections,
        output=(attn.W_O.permute(2, 0, 1).flatten(1), attn.b_O),
        head_norms=[_norm(norm) for norm in (attn.q_norm, attn.k_norm) if norm is not None],
        d_head=attn.cfg.d_head,
        scale=1.0 / attn.attn_scale,
        soft_cap=max(0.0, attn.cfg.attn_scores_soft_cap),
    )


def _neurons(mlp: Any) -> MLPWeights | None:
    """The weights of a gated MLP; None where it has biases, which no supported model has."""
    if bool(mlp.b_in.any()) or bool(mlp.b_out.any()):
        return None
    return MLPWeights(mlp.W_gate, mlp.W_in, mlp.W_out, mlp.act_fn)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """What a norm computes, without its hooks; multiplied by its weight before or after the cast, as in the module."""
    dtype, eps = norm.cfg.dtype, norm.eps
    weight = getattr(norm, "w", None)

    def normalize(x: Tensor) -> Tensor:
        x = at_least_float32(x)
        if weight is None or weight.dtype == x.dtype:
            return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype)
        return F.rms_norm(x, x.shape[-1:], None, eps).to(dtype) * weight

    return normalize


def _hooks_of(modules: list[nn.Module]) -> list[Any]:
    """The dictionaries of forward hooks of these modules, which stay the same objects when hooks are added."""
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def _through(point: HookPoint, value: Tensor) -> Tensor:
    """The value after a hook point's hooks, if it has any."""
    return point(value) if point._forward_hooks or point._forward_pre_hooks else value
