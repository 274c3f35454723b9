"""Backend: what a pair needs of a TransformerLens model, whether HookedTransformer or TransformerBridge.

`hooked_transformer.HookedBackend` and `transformer_bridge.BridgedBackend` implement it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tl_adapters.checkpoints.architectures import Architecture
from tl_adapters.models.routed_mlp import RoutedMLP


class Backend(ABC):
    """Access to the weights of a TransformerLens model, its routed MLPs, and its parts run alone."""

    model: Any
    """The TransformerLens model itself."""
    name: str
    """ "hooked" or "bridge"."""
    architecture: Architecture
    """The record of the model's architecture."""

    @property
    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The options that base and adapters must share with the model, under config.json's names."""

    @property
    @abstractmethod
    def mlps(self) -> list[RoutedMLP]:
        """The routed MLP of every layer, after `install`."""

    @abstractmethod
    def second_norm(self, layer: int) -> Tensor | None:
        """Weights of the second norm as TransformerLens has them (Gemma 1 + w), [d_model]; None where folded."""

    @abstractmethod
    def named_weights(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of a layer's attention and MLP in Hugging Face's names and layout."""

    @abstractmethod
    def attention_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """b_V [n_kv_heads, d_head] and b_O [d_model], where the layer has them."""

    @abstractmethod
    def projection_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Biases of q, k, v and o in Hugging Face's names and layout, where the layer has them."""

    @abstractmethod
    def norm(self, name: str) -> Tensor | None:
        """Weights of a norm ("ln_final", "blocks.3.ln1") as TransformerLens has them; None where they are folded."""

    def norms(self, layer: int) -> Iterator[tuple[str, Tensor | None]]:
        """Every norm of a layer: its name within the block, and its weights as `norm` returns them."""
        block = self.model.blocks[layer]
        for name in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm"):
            outer, _, inner = name.rpartition(".")
            if getattr(getattr(block, outer) if outer else block, inner, None) is not None:
                yield name, self.norm(f"blocks.{layer}.{name}")

    @property
    @abstractmethod
    def embedding_scale(self) -> float:
        """The factor by which `embedding` differs from the stored embedding."""

    def embedding(self) -> Tensor:
        """The embedding matrix, [d_vocab, d_model]."""
        return self.model.W_E

    @abstractmethod
    def unembedding(self) -> Tensor:
        """The unembedding matrix, [d_vocab, d_model]."""

    @property
    def device(self) -> torch.device:
        """The device on which the model takes its tokens."""
        return self.model.W_E.device

    def layer_device(self, layer: int) -> torch.device:
        """The device on which the MLP of ``layer`` computes."""
        return self.device

    @abstractmethod
    def install(self, layer: int, base: dict[str, Tensor] | None, base_scale: Tensor | None) -> None:
        """Turn the MLP of ``layer`` into a `RoutedMLP` in place.

        Args:
            layer: the layer's index.
            base: weights of the base's MLP in Hugging Face's names and layout; None for a model without a base.
            base_scale: the factor from the MLP's input to the base's, [d_model]; None where they are the same.
        """

    @abstractmethod
    def uninstall(self, layer: int) -> None:
        """Restore the MLP of ``layer`` to what it was before `install`."""

    @abstractmethod
    def name_hooks(self) -> None:
        """Register new hook points with the model under their names, and remove those that are gone."""

    @abstractmethod
    def embed(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream before block 0."""

    @abstractmethod
    def run_blocks(self, resid: Tensor, start: int, stop: int, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream after blocks start..stop-1 have run on ``resid``, on the present routes."""

    @abstractmethod
    def unembed(self, resid: Tensor) -> Tensor:
        """Final norm and unembedding, [batch, pos, d_model] to [batch, pos, d_vocab]."""
