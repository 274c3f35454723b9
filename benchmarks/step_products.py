"""The matrix products that a step of the objective cannot avoid, alone: the time that a step is measured against.

With the cut k of L layers: the target runs forward through L layers, the replacement through L, and each bridge through
the L - k above the cut, since the rest of a bridge is a part of the other two. Backward, the replacement has L layers
and each bridge L - k, with gradients of inputs only, as the model's weights are frozen. Of the adapters, the encoder's
forward product is dense; every other product can be restricted to active features. The vocabulary costs one product for
the target, and two for each KL: three KLs, and one at the cut L, where the forward bridge is the replacement and the
backward bridge the target. Elementwise work, softmax, norms and Adam are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config


class StepProducts:
    """The products of a step on one document, on random matrices of the sizes of a model."""

    def __init__(self, config: Qwen2Config, n_features: int, density: float, tokens: int) -> None:
        d, d_mlp = config.hidden_size, config.intermediate_size
        self.n_layers = config.num_hidden_layers
        d_head, heads = d // config.num_attention_heads, config.num_attention_heads
        keys = config.num_key_value_heads * d_head
        shapes = [(d, d), (d, keys), (d, keys), (d, d), (d, d_mlp), (d, d_mlp), (d_mlp, d)]
        self.weights = [torch.randn(shape) for shape in shapes]
        self.inputs = [torch.randn(tokens, read) for read, _ in shapes]
        self.gradients = [torch.randn(tokens, written) for _, written in shapes]
        self.queries = torch.randn(1, heads, tokens, d_head)
        self.x, self.acts = torch.randn(tokens, d), torch.randn(tokens, max(1, round(density * n_features)))
        n_active = self.acts.shape[1]
        self.W_enc, self.W_dec = torch.randn(d, n_features), torch.randn(n_active, d)
        self.W_U, self.logits = torch.randn(d, config.vocab_size), torch.randn(tokens, config.vocab_size)

    @torch.no_grad()
    def run(self, cut: int) -> None:
        """All products of a step with this cut."""
        n, above = self.n_layers, self.n_layers - cut
        for _ in range(2 * n + 2 * above):
            self._forward()
        for _ in range(n + 2 * above):
            self._backward()
        for _ in range(n + above):  # the replacement, and the backward bridge
            self._adapter()
        self.x @ self.W_U
        for _ in range(1 if cut == n else 3):
            self.x @ self.W_U
            self.logits @ self.W_U.T

    def _forward(self) -> None:
        for inputs, weight in zip(self.inputs, self.weights, strict=True):
            inputs @ weight
        self._attention()

    def _backward(self) -> None:
        for gradient, weight in zip(self.gradients, self.weights, strict=True):
            gradient @ weight.T
        for _ in range(2):
            self._attention()

    def _attention(self) -> Tensor:
        return F.scaled_dot_product_attention(self.queries, self.queries, self.queries, is_causal=True)

    def _adapter(self) -> None:
        self.x @ self.W_enc
        self.acts @ self.W_dec
        self.x @ self.W_dec.T  # gradients of the activations, of the input, of the decoder and of the encoder
        self.acts @ self.W_dec
        self.acts.T @ self.x
        self.x.T @ self.acts
