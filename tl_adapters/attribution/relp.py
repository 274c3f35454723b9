"""The linearized replacement model of one prompt: RelP's backward pass, written out (arXiv 2508.21258).

The coefficients of one forward pass are kept. The contribution of every source to a target is computed by going back
through them, under these rules (arXiv 2602.20904, appendix):

1. Attention patterns are constants, so attention is a linear map of its values.
2. The scale of a norm is a constant, so a norm is one factor per channel (post-norms included; QK norms affect the
   patterns only).
3. The activation function of the MLP is a constant factor, act(z) = z * c with c = act(z) / z, and each factor of
   gate * up gets half of the product: the base MLP stays in the path, and its effect is part of the edges.
4. Adapter features and embedded tokens are sources: their contribution is recorded, and the pass does not continue
   through features.

A feature's encoder direction enters at resid_mid, divided by the scale of the second norm, and then passes through the
attention of its own layer. The value of a target equals the sum of all contributions and constants (biases of values,
outputs and decoders) exactly: `LinearizedModel.rows` returns the constants too, and a test checks the sum to 1e-10 in
float64 on every architecture.

There is no autograd graph: memory is the coefficients plus batch x (positions x d_model + active features). Attention
patterns and the coefficients of gates grow fastest with the prompt and the model; beyond `KEPT_BYTES` they are not
kept, and a layer's are computed again from its residual stream whenever rows pass through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.precision import product_in_float32

KEPT_BYTES = 2**31
"""Most bytes of attention patterns and gate coefficients that are kept for all layers."""
HIDDEN_AT_ONCE = 2**28
"""Most numbers of an MLP's hidden layer that are computed at a time (1 GB in float32)."""


class Rows(NamedTuple):
    """The contributions of every source to each target of a batch."""

    features: Float[Tensor, "batch n_active"]
    """Contributions of the active features, in the order of `LinearizedModel.active`."""
    errors: Float[Tensor, "batch n_layers pos"]
    """Contributions of the outputs of frozen base MLPs; zero for RelP."""
    tokens: Float[Tensor, "batch pos"]
    """Contributions of the embedded tokens."""
    decoder_biases: Float[Tensor, "batch"]
    """Contribution of the adapters' b_dec."""
    biases: Float[Tensor, "batch"]
    """Contribution of the value and output biases of attention."""
    outside: Float[Tensor, "batch"]
    """Contribution of everything at positions before the window."""

    def first(self, n: int) -> Rows:
        """Views of the rows of the first ``n`` targets."""
        return Rows(*(values[:n] for values in self))


class _Coefficients(NamedTuple):
    """The large coefficients of one layer."""

    pattern: Tensor  # [head, query, key]
    gate: Tensor  # [pos, d_mlp]: of the gate's pre-activation
    up: Tensor  # [pos, d_mlp]: of the linear branch


@dataclass(frozen=True)
class _Layer:
    """The other coefficients of one layer, and its weights; vectors are rows. Weights are the model's own, in the
    layout of Hugging Face. Those of a bfloat16 model are cast where they are used, one at a time."""

    values: Tensor  # [key, kv_head, d_head]
    into_attention: Tensor  # [pos, d_model]: weight of the first norm / its scale
    out_of_attention: Tensor | None  # [pos, d_model]: the same for a post-norm
    into_base: Tensor  # [pos, d_model]: weight of the second norm / its scale, for the base MLP
    into_adapter: Tensor  # [pos, d_model]: the same for the adapter
    out_of_mlp: Tensor | None  # [pos, d_model]: the same for a post-norm
    base_out: Tensor | None  # [pos, d_model]: output of the base MLP; None where it is not frozen
    w_v: Tensor
    w_o: Tensor
    b_v: Tensor | None  # [kv_head, d_head]
    b_o: Tensor | None  # [d_model]
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    positions: Tensor  # [n]: positions of this layer's active features
    decoders: Tensor  # [n, d_model]: activation times decoder row
    b_dec: Tensor  # [d_model]


class LinearizedModel:
    """The linearized replacement model of one prompt.

    Args:
        pair: a pair with adapters on every layer.
        tokens: the prompt, [pos].
        linearization: "relp", or "frozen_mlp": the outputs of base MLPs are constants, and sources of their own
            (errors).
        start: the first position of the window; contributions from before it are summed in `Rows.outside`.
    """

    @torch.no_grad()
    def __init__(
        self,
        pair: PairedModel,
        tokens: Int[Tensor, "pos"],
        linearization: Literal["relp", "frozen_mlp"] = "relp",
        start: int = 0,
    ) -> None:
        self.n_layers, self.n_tokens, self.start = pair.n_layers, len(tokens), start
        self.linearization = linearization
        self.tokens = tokens
        self.dtype = torch.promote_types(pair.model.W_E.dtype, torch.float32)
        self._pair = pair
        keeps_all = large_coefficient_bytes(pair, self.n_tokens) <= KEPT_BYTES
        hooks = _CACHED_HOOKS + (_LARGE_HOOKS if keeps_all else ("hook_resid_pre",))
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        by_layer, activations = list[Tensor](), list[Tensor]()

        def keep_active(acts: Tensor, hook: HookPoint) -> None:
            by_layer.append((acts[0] > 0).nonzero())
            activations.append(acts[0][tuple(by_layer[-1].T)].to(self.dtype))

        layers = range(self.n_layers)
        recording = [(f"blocks.{layer}.mlp.adapter.hook_sae_acts_post", keep_active) for layer in layers]
        with pair.routed("replacement"), pair.model.hooks(fwd_hooks=recording):
            _, cache = pair.model.run_with_cache(
                tokens[None].to(pair.device),
                names_filter=lambda name: name == last or _is_one_of(hooks, name),
                return_type=None,
            )
        self._cache = {name: value[0] if value.shape[0] == 1 else value for name, value in cache.items()}
        self.embedding = self._cached("hook_embed")
        final = pair.backend.norm("ln_final")
        self.out_of_model = self._factor("ln_final.hook_scale", final)
        self.pre_activations = [self._cached(f"blocks.{layer}.mlp.adapter.hook_sae_acts_pre") for layer in layers]
        self.active, self.activations = with_layers(by_layer), torch.cat(activations)
        self.offsets = [0, *torch.tensor([len(indices) for indices in by_layer]).cumsum(0).tolist()]
        self._before_position = _counts_before_position(self.active, self.n_layers, self.n_tokens)
        self._recorded, self._kept = self._cache, list[_Coefficients]()
        self._residuals = [] if keeps_all else [self._cache[f"blocks.{i}.hook_resid_pre"] for i in layers]
        self.layers = [self._layer(pair, layer, activations[layer], by_layer[layer]) for layer in layers]
        if keeps_all:
            self._kept = [self._large(layer) for layer in layers]
        self.encoders = [adapter.W_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]
        self.b_enc = [adapter.b_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]
        self.final_residual = self._cached(last)
        self.read_by_unembedding = self.final_residual * self.out_of_model
        self._recorded = {}
        del self._cache

    def _cached(self, name: str) -> Tensor:
        return self._cache[name].to(self.dtype)

    def _factor(self, scale: str, weight: Tensor | None) -> Tensor:
        """The factor by which a norm multiplies its input, [pos, d_model] or [pos, 1]."""
        inverse = 1 / self._cached(scale)
        return inverse if weight is None else inverse * weight.detach().to(self.dtype)

    def _large_values(self, layer: int) -> list[Tensor]:
        """The values of `_LARGE_HOOKS` of a layer: recorded, or computed again from its residual stream.

        The adapter of the layer has no part in them.
        """
        names, values = [f"blocks.{layer}.{hook}" for hook in _LARGE_HOOKS], self._recorded

        def keep(value: Tensor, hook: Any, name: str) -> None:
            values[name] = value[0]

        if names[0] not in values:
            values, hooks = {}, [(name, partial(keep, name=name)) for name in names]
            with self._pair.routed("hybrid"), self._pair.model.hooks(fwd_hooks=hooks):
                self._pair.run_blocks(self._residuals[layer][None], layer, layer + 1)
        return [values[name].to(self.dtype) for name in names]

    def _large(self, layer: int) -> _Coefficients:
        """The large coefficients of a layer."""
        if layer < len(self._kept):
            return self._kept[layer]
        pattern, gate, up = self._large_values(layer)
        act = self._pair.mlps[layer].weights()[1].act_fn(gate)
        # act(z) / z tends to 1/2 at z = 0 for SiLU and GELU; there it multiplies 0.
        slope = torch.where(gate == 0, torch.full_like(gate, 0.5), act / gate)
        return _Coefficients(pattern, 0.5 * slope * up, 0.5 * act)

    def _base_out(self, layer: int) -> Tensor:
        """The output of the base's MLP of a layer."""
        _, gate, up = self._large_values(layer)
        _, base = self._pair.mlps[layer].weights()
        return product_in_float32(base.act_fn(gate) * up, base.W_out.detach())

    def _layer(
        self, pair: PairedModel, layer: int, activations: Float[Tensor, "n"], active: Int[Tensor, "n 2"]
    ) -> _Layer:
        name, mlp, backend = f"blocks.{layer}.", pair.mlps[layer], pair.backend
        weights = {key: w.detach() for key, w in backend.named_weights(layer)}
        biases = {key: b.detach().to(self.dtype) for key, b in backend.attention_biases(layer)}
        _, base = mlp.weights()
        into_mlp = self._factor(f"{name}ln2.hook_scale", backend.norm(f"{name}ln2"))
        scale = [s if s is None else s.to(self.dtype) for s in (mlp.base_scale, mlp.adapter_scale)]
        post = {
            norm: self._factor(f"{name}{norm}.hook_scale", backend.norm(f"{name}{norm}"))
            for norm in ("ln1_post", "ln2_post")
            if f"{name}{norm}.hook_scale" in self._cache
        }
        adapter = pair.installed_adapters()[layer]
        positions, index = active[:, 0], active[:, 1]
        return _Layer(
            values=self._cached(f"{name}attn.hook_v"),
            into_attention=self._factor(f"{name}ln1.hook_scale", backend.norm(f"{name}ln1")),
            out_of_attention=post.get("ln1_post"),
            into_base=into_mlp if scale[0] is None else into_mlp * scale[0],
            into_adapter=into_mlp if scale[1] is None else into_mlp * scale[1],
            out_of_mlp=post.get("ln2_post"),
            base_out=self._base_out(layer) if self.linearization == "frozen_mlp" else None,
            w_v=weights["self_attn.v_proj"],
            w_o=weights["self_attn.o_proj"],
            b_v=biases.get("b_V"),
            b_o=biases.get("b_O"),
            w_gate=base.W_gate.detach().T,
            w_up=base.W_in.detach().T,
            w_down=base.W_out.detach().T,
            positions=positions,
            decoders=adapter.W_dec.detach().to(self.dtype)[index] * activations[:, None],
            b_dec=adapter.b_dec.detach().to(self.dtype),
        )

    # -- the backward pass ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def rows(
        self, layers: Sequence[int], positions: Int[Tensor, "batch"], vectors: Float[Tensor, "batch d_model"]
    ) -> Rows:
        """The contributions of every source to targets, in one backward pass, which each target joins at its layer.

        Args:
            layers: the layer whose adapter has each target as a feature, descending; n_layers for logits.
            positions: the position of each target.
            vectors: the encoder column or unembedding column of each target.
        """
        assert list(layers) == sorted(layers, reverse=True), "targets are given from the last layer to the first"
        batch, first, stop = len(positions), self.start, int(positions.max()) + 1
        at = (torch.arange(batch, device=vectors.device), positions - first)
        grad = vectors.new_zeros(batch, stop - first, vectors.shape[1])
        out = Rows(
            vectors.new_zeros(batch, self.offsets[-1]),
            vectors.new_zeros(batch, self.n_layers, self.n_tokens),
            vectors.new_zeros(batch, self.n_tokens),
            *vectors.new_zeros(3, batch),
        )
        done = sum(layer == self.n_layers for layer in layers)
        grad[tuple(index[:done] for index in at)] = vectors[:done] * self.out_of_model[positions[:done]]
        for k in range(min(layers[0], self.n_layers - 1), -1, -1):
            large, earlier = self._large(k), done
            if earlier:
                grad[:earlier] = self._through_mlp(k, large, grad[:earlier], stop, out.first(earlier))
            done += sum(layer == k for layer in layers)
            joining = slice(earlier, done)
            read = self.layers[k].into_adapter[positions[joining]]
            grad[tuple(index[joining] for index in at)] = vectors[joining] * read
            grad[:done] = self._through_attention(self.layers[k], large.pattern, grad[:done], stop, out.first(done))
        out.tokens[:, first:stop] = torch.einsum("btd,td->bt", grad, self.embedding[first:stop])
        return out

    def _through_mlp(self, k: int, large: _Coefficients, grad: Tensor, stop: int, out: Rows) -> Tensor:
        """From resid_post of layer k to its resid_mid; records its features, b_dec and, if frozen, its base MLP."""
        c, window = self.layers[k], slice(self.start, stop)
        write = grad if c.out_of_mlp is None else grad * c.out_of_mlp[window]
        before = self._before_position[k]
        inside = slice(before[self.start], before[stop])  # the features of a layer are sorted by position
        columns = slice(self.offsets[k] + inside.start, self.offsets[k] + inside.stop)
        out.features[:, columns] = torch.einsum(
            "bnd,nd->bn", write[:, c.positions[inside] - self.start], c.decoders[inside]
        )
        out.decoder_biases.add_(write.sum(1) @ c.b_dec)
        if c.base_out is not None:
            out.errors[:, k, window] = torch.einsum("btd,td->bt", write, c.base_out[window])
            return grad
        at_once = max(1, HIDDEN_AT_ONCE // (write.shape[1] * len(c.w_gate)))
        into = [self._through_base(c, large, part, window) for part in write.split(at_once)]
        return grad + torch.cat(into) * c.into_base[window]

    def _through_base(self, c: _Layer, large: _Coefficients, write: Tensor, window: slice) -> Tensor:
        """From the output of the base's MLP to its input."""
        hidden = product_in_float32(write, c.w_down)
        into = product_in_float32(hidden * large.gate[window], c.w_gate)
        return into + product_in_float32(hidden * large.up[window], c.w_up)

    def _through_attention(self, c: _Layer, pattern: Tensor, grad: Tensor, stop: int, out: Rows) -> Tensor:
        """From resid_mid to resid_pre; records the biases, and the contribution of values before the window."""
        window = slice(self.start, stop)
        write = grad if c.out_of_attention is None else grad * c.out_of_attention[window]
        if c.b_o is not None:
            out.biases.add_(write.sum(1) @ c.b_o)
        heads, (_, kv_heads, d_head) = pattern.shape[0], c.values.shape
        z = product_in_float32(write, c.w_o).unflatten(-1, (heads, d_head))
        mixed = torch.einsum("hqk,bqhd->bkhd", pattern[:, window, :stop], z)
        mixed = mixed.unflatten(2, (kv_heads, heads // kv_heads)).sum(3)  # query heads of a group share keys and values
        if self.start:
            out.outside.add_(torch.einsum("bkhd,khd->b", mixed[:, : self.start], c.values[: self.start]))
            mixed = mixed[:, self.start :]
        if c.b_v is not None:
            out.biases.add_(torch.einsum("bkhd,hd->b", mixed, c.b_v))
        return grad + product_in_float32(mixed.flatten(2), c.w_v) * c.into_attention[window]


def with_layers(by_layer: Sequence[Int[Tensor, "_ 2"]]) -> Int[Tensor, "n_active 3"]:
    """The active features as rows (layer, position, index), from rows (position, index) of each layer."""
    sizes = torch.tensor([len(indices) for indices in by_layer])
    layer = torch.arange(len(by_layer)).repeat_interleave(sizes).to(by_layer[0].device)
    return torch.cat([layer[:, None], torch.cat(list(by_layer))], 1)


def _counts_before_position(active: Int[Tensor, "n 3"], n_layers: int, n_tokens: int) -> list[list[int]]:
    """For each layer and position (and the end): how many of the layer's active features are at earlier positions."""
    counts = torch.zeros(n_layers, n_tokens + 1, dtype=torch.long)
    layer, position, _ = active.cpu().T
    counts.index_put_((layer, position + 1), torch.ones_like(layer), accumulate=True)
    return counts.cumsum(1).tolist()


_CACHED_HOOKS = (
    "hook_embed",
    "hook_scale",
    "attn.hook_v",
    "adapter.hook_sae_acts_pre",
)
_LARGE_HOOKS = ("attn.hook_pattern", "mlp.hook_pre", "mlp.hook_pre_linear")


def _is_one_of(hooks: tuple[str, ...], name: str) -> bool:
    return name.endswith(hooks) and ".q_norm." not in name and ".k_norm." not in name


def large_coefficient_bytes(pair: PairedModel, n_tokens: int) -> int:
    """Bytes of the attention patterns and the gates' coefficients of all layers, for a prompt of so many tokens."""
    cfg = pair.model.cfg
    width = torch.promote_types(cfg.dtype, torch.float32).itemsize
    return int(width * cfg.n_layers * n_tokens * (cfg.n_heads * n_tokens + 2 * cfg.d_mlp))
