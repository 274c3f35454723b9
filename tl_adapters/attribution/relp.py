"""The replacement on one prompt as a linear model: RelP's backward pass by hand (arXiv 2508.21258; 2602.20904, app.).

One forward pass is kept as coefficients, and what a target owes to its sources is read off by going back through them:

1. attention patterns are constants, so attention is a linear map of its values;
2. a norm's scale is a constant, so a norm is a factor per channel (post-norms too; QK norms vanish with the patterns);
3. the MLP's activation function is a constant factor, act(z) = z * c with c = act(z) / z, and of gate * up each factor
   gets half: the base MLP stays in the path, its effect is folded into the edges;
4. adapter features and embedded tokens are leaves: the pass reads their share and does not go through features.

A feature's encoder direction enters at resid_mid, divided by the second norm's scale, and then passes this layer's own
attention. So target value = sum over leaves + constants (biases of values, outputs and decoders), exactly: `rows`
returns the constants too, and a test holds the sum to 1e-10 in float64 on every architecture.

No autograd graph: memory is the coefficients plus batch x (positions x d_model + active features).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.models.paired_model import PairedModel

Linearization = Literal["relp", "frozen_mlp"]


class Rows(NamedTuple):
    """What each target of a batch owes to every leaf."""

    features: Float[Tensor, "batch n_active"]
    """To the active features, in `FrozenModel.active`'s order."""
    errors: Float[Tensor, "batch n_layers pos"]
    """To the outputs of frozen base MLPs; zero for RelP."""
    tokens: Float[Tensor, "batch pos"]
    """To the embedded tokens."""
    decoder_biases: Float[Tensor, "batch"]
    """To the adapters' b_dec."""
    biases: Float[Tensor, "batch"]
    """To the attention's value and output biases."""
    outside: Float[Tensor, "batch"]
    """To everything that comes in from positions before the window."""


@dataclass(frozen=True)
class _Layer:
    """Coefficients and weights of one layer; vectors are rows. Weights are the model's own, in Hugging Face's layout:
    a bfloat16 model's are cast where they are used, one at a time."""

    pattern: Tensor  # [head, query, key]
    values: Tensor  # [key, kv_head, d_head]
    into_attention: Tensor  # [pos, d_model]: first norm's weight over its scale
    out_of_attention: Tensor | None  # [pos, d_model]: of a post-norm
    into_base: Tensor  # [pos, d_model]: second norm's weight over its scale, as the base's MLP reads it
    into_adapter: Tensor  # [pos, d_model]: likewise for the adapter
    out_of_mlp: Tensor | None  # [pos, d_model]: of a post-norm
    gate: Tensor  # [pos, d_mlp]: what multiplies the gate's gradient
    up: Tensor  # [pos, d_mlp]
    base_out: Tensor  # [pos, d_model]
    w_v: Tensor
    w_o: Tensor
    b_v: Tensor | None  # [kv_head, d_head]
    b_o: Tensor | None  # [d_model]
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    positions: Tensor  # [n]: of this layer's active features
    decoders: Tensor  # [n, d_model]: activation times decoder row
    b_dec: Tensor  # [d_model]


class LinearizedModel:
    """The linear model of one prompt on the pair's replacement route.

    Args:
        pair: with adapters on every layer.
        tokens: the prompt, [pos].
        linearisation: "relp", or "frozen_mlp": base MLPs are constants, and leaves ("errors") of their own.
        start: the first position of the window; what comes from before it is summed in `Rows.outside`.
    """

    @torch.no_grad()
    def __init__(
        self, pair: PairedModel, tokens: Int[Tensor, "pos"], linearisation: Linearization = "relp", start: int = 0
    ) -> None:
        self.n_layers, self.n_tokens, self.start = pair.n_layers, len(tokens), start
        self.linearisation = linearisation
        self.tokens = tokens
        device = pair.model.W_E.device
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        with pair.routed("replacement"):
            _, cache = pair.model.run_with_cache(
                tokens[None].to(device), names_filter=lambda name: name == last or _is_needed(name), return_type=None
            )
        self.dtype = torch.promote_types(pair.model.W_E.dtype, torch.float32)
        self._cache = {name: value[0] if value.shape[0] == 1 else value for name, value in cache.items()}
        self.embedding = self._cached("hook_embed")
        final = pair.backend.norm("ln_final")
        self.out_of_model = self._factor("ln_final.hook_scale", final)
        acts = [self._cached(f"blocks.{layer}.mlp.adapter.hook_sae_acts_post") for layer in range(self.n_layers)]
        self.pre_activations = [
            self._cached(f"blocks.{layer}.mlp.adapter.hook_sae_acts_pre") for layer in range(self.n_layers)
        ]
        self.active, found = active_feature_indices(acts)
        self.activations = torch.cat([a[tuple(f.T)] for a, f in zip(acts, found, strict=True)])
        self.offsets = [0, *torch.tensor([len(f) for f in found]).cumsum(0).tolist()]
        self._first_of = _first_of_position(self.active, self.n_layers, self.n_tokens)
        self.layers = [self._layer(pair, layer, acts[layer], found[layer]) for layer in range(self.n_layers)]
        self.encoders = [adapter.W_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]
        self.b_enc = [adapter.b_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]
        self.final_residual = self._cached(last)
        self.read_by_unembedding = self.final_residual * self.out_of_model
        del self._cache

    def _cached(self, name: str) -> Tensor:
        return self._cache[name].to(self.dtype)

    def _factor(self, scale: str, weight: Tensor | None) -> Tensor:
        """[pos, d_model] or [pos, 1]: what a norm multiplies its input by."""
        inverse = 1 / self._cached(scale)
        return inverse if weight is None else inverse * weight.detach().to(self.dtype)

    def _layer(self, pair: PairedModel, layer: int, acts: Tensor, found: Tensor) -> _Layer:
        name, mlp, backend = f"blocks.{layer}.", pair.mlps[layer], pair.backend
        weights = {key: w.detach() for key, w in backend.named_weights(layer)}
        biases = {key: b.detach().to(self.dtype) for key, b in backend.attention_biases(layer)}
        _, base = mlp.weights()
        gate, up = self._cached(f"{name}mlp.hook_pre"), self._cached(f"{name}mlp.hook_pre_linear")
        act = base.act_fn(gate)
        # act(z) / z, which tends to 1/2 for SiLU and GELU; where z is 0 it multiplies 0
        slope = torch.where(gate == 0, torch.full_like(gate, 0.5), act / gate)
        into_mlp = self._factor(f"{name}ln2.hook_scale", backend.norm(f"{name}ln2"))
        scale = [s if s is None else s.to(self.dtype) for s in (mlp.base_scale, mlp.adapter_scale)]
        post = {
            norm: self._factor(f"{name}{norm}.hook_scale", backend.norm(f"{name}{norm}"))
            for norm in ("ln1_post", "ln2_post")
            if f"{name}{norm}.hook_scale" in self._cache
        }
        adapter = pair.installed_adapters()[layer]
        positions, index = found[:, 0], found[:, 1]
        w_down = base.W_out.detach().T
        return _Layer(
            pattern=self._cached(f"{name}attn.hook_pattern"),
            values=self._cached(f"{name}attn.hook_v"),
            into_attention=self._factor(f"{name}ln1.hook_scale", backend.norm(f"{name}ln1")),
            out_of_attention=post.get("ln1_post"),
            into_base=into_mlp if scale[0] is None else into_mlp * scale[0],
            into_adapter=into_mlp if scale[1] is None else into_mlp * scale[1],
            out_of_mlp=post.get("ln2_post"),
            gate=0.5 * slope * up,
            up=0.5 * act,
            base_out=(act * up) @ w_down.T.to(self.dtype),
            w_v=weights["self_attn.v_proj"],
            w_o=weights["self_attn.o_proj"],
            b_v=biases.get("b_V"),
            b_o=biases.get("b_O"),
            w_gate=base.W_gate.detach().T,
            w_up=base.W_in.detach().T,
            w_down=w_down,
            positions=positions,
            decoders=adapter.W_dec.detach().to(self.dtype)[index] * acts[positions, index][:, None],
            b_dec=adapter.b_dec.detach().to(self.dtype),
        )

    # -- the backward pass ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def rows(self, layer: int, positions: Int[Tensor, "batch"], vectors: Float[Tensor, "batch d_model"]) -> Rows:
        """What targets at one layer owe to every leaf.

        Args:
            layer: whose adapter reads the targets' vectors; n_layers for what the unembedding reads.
            positions: of the targets.
            vectors: encoder columns, or unembedding columns.
        """
        batch, first, stop = len(positions), self.start, int(positions.max()) + 1
        at = (torch.arange(batch, device=vectors.device), positions - first)
        grad = vectors.new_zeros(batch, stop - first, vectors.shape[1])
        out = Rows(
            vectors.new_zeros(batch, self.offsets[-1]),
            vectors.new_zeros(batch, self.n_layers, self.n_tokens),
            vectors.new_zeros(batch, self.n_tokens),
            *vectors.new_zeros(3, batch),
        )
        if layer == self.n_layers:
            grad[at] = vectors * self.out_of_model[positions]
        for k in range(min(layer, self.n_layers - 1), -1, -1):
            if k == layer:
                grad[at] += vectors * self.layers[k].into_adapter[positions]
            else:
                grad = self._through_mlp(k, grad, stop, out)
            grad = self._through_attention(self.layers[k], grad, stop, out)
        out.tokens[:, first:stop] = torch.einsum("btd,td->bt", grad, self.embedding[first:stop])
        return out

    def _through_mlp(self, k: int, grad: Tensor, stop: int, out: Rows) -> Tensor:
        """From resid_post of layer k to its resid_mid; reads off its features, its b_dec and, where frozen, its MLP."""
        c, window = self.layers[k], slice(self.start, stop)
        write = grad if c.out_of_mlp is None else grad * c.out_of_mlp[window]
        inside = slice(self._first_of[k][self.start], self._first_of[k][stop])  # a layer's features come by position
        where = slice(self.offsets[k] + inside.start, self.offsets[k] + inside.stop)
        out.features[:, where] = torch.einsum(
            "bnd,nd->bn", write[:, c.positions[inside] - self.start], c.decoders[inside]
        )
        out.decoder_biases.add_(write.sum(1) @ c.b_dec)
        if self.linearisation == "frozen_mlp":
            out.errors[:, k, window] = torch.einsum("btd,td->bt", write, c.base_out[window])
            return grad
        hidden = write @ c.w_down.to(self.dtype)
        into = (hidden * c.gate[window]) @ c.w_gate.to(self.dtype) + (hidden * c.up[window]) @ c.w_up.to(self.dtype)
        return grad + into * c.into_base[window]

    def _through_attention(self, c: _Layer, grad: Tensor, stop: int, out: Rows) -> Tensor:
        """From resid_mid to resid_pre; reads off the biases, and what the values before the window bring in."""
        window = slice(self.start, stop)
        write = grad if c.out_of_attention is None else grad * c.out_of_attention[window]
        if c.b_o is not None:
            out.biases.add_(write.sum(1) @ c.b_o)
        heads, (_, kv_heads, d_head) = c.pattern.shape[0], c.values.shape
        z = (write @ c.w_o.to(self.dtype)).unflatten(-1, (heads, d_head))
        mixed = torch.einsum("hqk,bqhd->bkhd", c.pattern[:, window, :stop], z)
        mixed = mixed.unflatten(2, (kv_heads, heads // kv_heads)).sum(3)  # heads share keys and values
        if self.start:
            out.outside.add_(torch.einsum("bkhd,khd->b", mixed[:, : self.start], c.values[: self.start]))
            mixed = mixed[:, self.start :]
        if c.b_v is not None:
            out.biases.add_(torch.einsum("bkhd,hd->b", mixed, c.b_v))
        return grad + (mixed.flatten(2) @ c.w_v.to(self.dtype)) * c.into_attention[window]


def active_feature_indices(acts: Sequence[Float[Tensor, "pos n_features"]]) -> tuple[Int[Tensor, "n 3"], list[Tensor]]:
    """What fires as (layer, position, index), sorted, and the same by layer as [n, 2]; the device is waited for once.

    Args:
        acts: of every layer.
    """
    active = torch.stack([a > 0 for a in acts]).nonzero()
    sizes = torch.bincount(active[:, 0].cpu(), minlength=len(acts)).tolist()
    return active, list(active[:, 1:].split(sizes))


def _first_of_position(active: Int[Tensor, "n 3"], n_layers: int, n_tokens: int) -> list[list[int]]:
    """Per layer and position (and one more): how many of the layer's active features stand before it."""
    counts = torch.zeros(n_layers, n_tokens + 1, dtype=torch.long)
    layer, position, _ = active.cpu().T
    counts.index_put_((layer, position + 1), torch.ones_like(layer), accumulate=True)
    return counts.cumsum(1).tolist()


_NEEDED = (
    "hook_embed",
    "hook_scale",
    "attn.hook_pattern",
    "attn.hook_v",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "adapter.hook_sae_acts_pre",
    "adapter.hook_sae_acts_post",
)


def _is_needed(name: str) -> bool:
    return name.endswith(_NEEDED) and ".q_norm." not in name and ".k_norm." not in name
