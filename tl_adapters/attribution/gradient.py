"""Gradient times activation by autograd, with the same leaves and targets as `linear`: to compare, and to check.

Nothing is frozen here unless hooks freeze it: patterns, norms and activation functions are differentiated at the point
where they stand, so what targets owe does not add up to their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.attribution.relp import Rows, active_feature_indices
from tl_adapters.models.paired_model import PairedModel

ForwardHook = tuple[str, Callable[..., Tensor | None]]


class GradientModel:
    """One prompt's forward pass on the replacement route with its graph, to go back through for any target.

    Args:
        pair: with adapters on every layer.
        tokens: the prompt, [pos].
        hooks: forward hooks that hold during the pass; RelP's rules as hooks make this RelP (tests/test_linear.py).
    """

    start = 0

    def __init__(self, pair: PairedModel, tokens: Int[Tensor, "pos"], hooks: Sequence[ForwardHook] = ()) -> None:
        self.n_layers, self.n_tokens, self.tokens = pair.n_layers, len(tokens), tokens
        self.dtype = torch.promote_types(pair.model.W_E.dtype, torch.float32)
        acts: dict[int, Tensor] = {}
        read: dict[int, Tensor] = {}
        pre: dict[int, Tensor] = {}
        embedding: list[Tensor] = []

        def leaf(value: Tensor, hook: HookPoint, layer: int) -> Tensor:
            acts[layer] = value.detach().requires_grad_()
            return acts[layer]

        def embed(value: Tensor, hook: HookPoint) -> Tensor:
            embedding.append(value.detach().requires_grad_())
            return embedding[0]

        def keep(value: Tensor, hook: HookPoint, into: dict[int, Tensor], layer: int) -> None:
            into[layer] = value

        points: list[ForwardHook] = [("hook_embed", embed)]
        for layer in range(self.n_layers):
            inside = f"blocks.{layer}.mlp.adapter."
            points.append((f"{inside}hook_sae_input", partial(keep, into=read, layer=layer)))
            points.append((f"{inside}hook_sae_acts_pre", partial(keep, into=pre, layer=layer)))
            points.append((f"{inside}hook_sae_acts_post", partial(leaf, layer=layer)))
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        final: dict[int, Tensor] = {}
        points.append((last, partial(keep, into=final, layer=0)))
        points.append(("ln_final.hook_normalized", partial(keep, into=read, layer=self.n_layers)))
        device = pair.model.W_E.device
        with torch.enable_grad(), pair.routed("replacement"), pair.model.hooks(fwd_hooks=[*points, *hooks]):
            pair.model(tokens[None].to(device))
        weight = pair.backend.norm("ln_final")
        normalized = read[self.n_layers][0]
        self._read = [read[layer][0] for layer in range(self.n_layers)]
        self._read.append(normalized if weight is None else normalized * weight.detach())
        self.final_residual = final[0][0].detach().to(self.dtype)
        self.read_by_unembedding = self._read[-1].detach().to(self.dtype)
        self._embedding, self._acts = embedding[0], [acts[layer] for layer in range(self.n_layers)]
        self.pre_activations = [pre[layer][0].detach().to(self.dtype) for layer in range(self.n_layers)]
        self.active, found = active_feature_indices([a.detach()[0] for a in self._acts])
        self.activations = torch.cat([a.detach()[0][tuple(f.T)] for a, f in zip(self._acts, found, strict=True)])
        self.offsets = [0, *torch.tensor([len(f) for f in found]).cumsum(0).tolist()]
        self._found = found
        self.encoders = [adapter.W_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]
        self.b_enc = [adapter.b_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]

    def rows(self, layer: int, positions: Int[Tensor, "batch"], vectors: Float[Tensor, "batch d_model"]) -> Rows:
        """As `FrozenModel.rows`, by one batched backward pass; gradients without errors and constants."""
        read, leaves, batch = self._read[layer], [*self._acts[:layer], self._embedding], len(positions)
        values = (read[positions] * vectors.to(read.dtype)).sum(-1)
        gradients = torch.autograd.grad(
            values,
            leaves,
            torch.eye(batch, dtype=values.dtype, device=values.device),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        features = vectors.new_zeros(batch, self.offsets[-1])
        for k, gradient in enumerate(gradients[:-1]):
            if gradient is not None:
                share = (gradient * self._acts[k].detach())[:, 0][(slice(None), *self._found[k].T)]
                features[:, self.offsets[k] : self.offsets[k + 1]] = share
        tokens = vectors.new_zeros(batch, self.n_tokens)
        if gradients[-1] is not None:
            tokens += (gradients[-1] * self._embedding.detach())[:, 0].sum(-1)
        errors = vectors.new_zeros(batch, self.n_layers, self.n_tokens)
        return Rows(features, errors, tokens, *vectors.new_zeros(3, batch))
