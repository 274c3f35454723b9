"""Gradient times activation by autograd, with the sources and targets of `relp`: for comparison and for tests.

Nothing is held constant unless hooks do so: attention patterns, norms and activation functions are differentiated at
the point where they are. The contributions to a target therefore do not add up to its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.attribution.relp import LinearizedModel, Rows, with_layers
from tl_adapters.models.paired_model import PairedModel

ForwardHook = tuple[str, Callable[..., Tensor | None]]
"""The name of a hook point, and the function that is called there."""


class GradientModel:
    """One prompt's forward pass on the replacement route with its autograd graph, differentiated for any target.

    Args:
        pair: a pair with adapters on every layer.
        tokens: the prompt, [pos].
        hooks: forward hooks that are active during the pass. With RelP's rules as hooks, the rows are those of
            `LinearizedModel` (tests/attribution/test_relp.py).
    """

    start = 0
    linearization = "gradient"

    def __init__(self, pair: PairedModel, tokens: Int[Tensor, "pos"], hooks: Sequence[ForwardHook] = ()) -> None:
        self.n_layers, self.n_tokens, self.tokens = pair.n_layers, len(tokens), tokens
        self.dtype = torch.promote_types(pair.model.W_E.dtype, torch.float32)
        acts: dict[int, Tensor] = {}
        inputs: dict[int, Tensor] = {}
        pre: dict[int, Tensor] = {}
        final: dict[int, Tensor] = {}
        embedding: list[Tensor] = []

        def detach_acts(value: Tensor, hook: HookPoint, layer: int) -> Tensor:
            acts[layer] = value.detach().requires_grad_()
            return acts[layer]

        def detach_embedding(value: Tensor, hook: HookPoint) -> Tensor:
            embedding.append(value.detach().requires_grad_())
            return embedding[0]

        def record(value: Tensor, hook: HookPoint, into: dict[int, Tensor], layer: int) -> None:
            into[layer] = value

        recording: list[ForwardHook] = [("hook_embed", detach_embedding)]
        for layer in range(self.n_layers):
            adapter = f"blocks.{layer}.mlp.adapter."
            recording.append((f"{adapter}hook_sae_input", partial(record, into=inputs, layer=layer)))
            recording.append((f"{adapter}hook_sae_acts_pre", partial(record, into=pre, layer=layer)))
            recording.append((f"{adapter}hook_sae_acts_post", partial(detach_acts, layer=layer)))
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        recording.append((last, partial(record, into=final, layer=0)))
        recording.append(("ln_final.hook_normalized", partial(record, into=inputs, layer=self.n_layers)))
        device = pair.device
        with torch.enable_grad(), pair.routed("replacement"), pair.model.hooks(fwd_hooks=[*recording, *hooks]):
            pair.model(tokens[None].to(device))
        weight = pair.backend.norm("ln_final")
        normalized = inputs[self.n_layers][0]
        self._inputs = [inputs[layer][0] for layer in range(self.n_layers)]
        self._inputs.append(normalized if weight is None else normalized * weight.detach())
        self.final_residual = final[0][0].detach().to(self.dtype)
        self.read_by_unembedding = self._inputs[-1].detach().to(self.dtype)
        self._embedding, self._acts = embedding[0], [acts[layer] for layer in range(self.n_layers)]
        self.pre_activations = [pre[layer][0].detach().to(self.dtype) for layer in range(self.n_layers)]
        detached = [a.detach()[0] for a in self._acts]
        self._by_layer = [(a > 0).nonzero() for a in detached]
        self.active = with_layers(self._by_layer)
        self.activations = torch.cat([a[tuple(i.T)] for a, i in zip(detached, self._by_layer, strict=True)])
        self.offsets = [0, *torch.tensor([len(indices) for indices in self._by_layer]).cumsum(0).tolist()]
        self.encoders = [adapter.W_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]
        self.b_enc = [adapter.b_enc.detach().to(self.dtype) for adapter in pair.installed_adapters()]

    def rows(
        self, layers: Sequence[int], positions: Int[Tensor, "batch"], vectors: Float[Tensor, "batch d_model"]
    ) -> Rows:
        """As `LinearizedModel.rows`, by one batched backward pass; errors and constants are zero."""
        leaves, batch = [*self._acts[: max(layers)], self._embedding], len(positions)
        read = [self._inputs[layer][position] for layer, position in zip(layers, positions, strict=True)]
        values = (torch.stack(read) * vectors.to(read[0].dtype)).sum(-1)
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
                product = (gradient * self._acts[k].detach())[:, 0]
                features[:, self.offsets[k] : self.offsets[k + 1]] = product[(slice(None), *self._by_layer[k].T)]
        tokens = vectors.new_zeros(batch, self.n_tokens)
        if gradients[-1] is not None:
            tokens += (gradients[-1] * self._embedding.detach())[:, 0].sum(-1)
        errors = vectors.new_zeros(batch, self.n_layers, self.n_tokens)
        return Rows(features, errors, tokens, *vectors.new_zeros(3, batch))


PromptModel = LinearizedModel | GradientModel
"""A model of one prompt whose ``rows`` give the contributions of every source to a target."""
