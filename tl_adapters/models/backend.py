"""What a TransformerLens model must answer to carry a pair, whichever of the two kinds it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tl_adapters.checkpoints.architectures import Architecture
from tl_adapters.models.routed_mlp import RoutedMLP


class Backend(ABC):
    """What `PairedModel` asks of the library that runs the model: TransformerLens, of one kind or another."""

    model: Any
    """The TransformerLens model itself."""
    name: str
    """ "hooked" or "bridge"."""
    architecture: Architecture
    """The record of the model's architecture."""

    @property
    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The facts that base and adapters must share, under config.json's names."""

    @property
    @abstractmethod
    def mlps(self) -> list[RoutedMLP]:
        """The routed MLP of every layer, once installed."""

    @abstractmethod
    def second_norm(self, layer: int) -> Tensor | None:
        """The second norm's weights as TransformerLens has them, [d_model]; None where they are folded."""

    @abstractmethod
    def named_weights(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Attention's and MLP's weights of a layer in Hugging Face's names and layout."""

    @abstractmethod
    def attention_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """b_V [n_kv_heads, d_head] and b_O [d_model], where the layer has them."""

    @abstractmethod
    def projection_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Biases of q, k, v and o in Hugging Face's names and layout, where the layer has them."""

    @abstractmethod
    def norm(self, name: str) -> Tensor | None:
        """Weights of the norm of that name ("ln_final", "blocks.3.ln1") as TransformerLens has them; None: folded."""

    def norms(self, layer: int) -> Iterator[tuple[str, Tensor | None]]:
        """Every norm of a layer, by its name within the block, and its weights (`norm`)."""
        block = self.model.blocks[layer]
        for name in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm"):
            outer, _, inner = name.rpartition(".")
            if getattr(getattr(block, outer) if outer else block, inner, None) is not None:
                yield name, self.norm(f"blocks.{layer}.{name}")

    @property
    @abstractmethod
    def embedding_scale(self) -> float:
        """What `embedding` is multiplied with here already; 1 for the model's own weights."""

    def embedding(self) -> Tensor:
        """[d_vocab, d_model]"""
        return self.model.W_E

    @abstractmethod
    def unembedding(self) -> Tensor:
        """[d_vocab, d_model]"""

    @abstractmethod
    def install(self, layer: int, base: dict[str, Tensor] | None, base_scale: Tensor | None) -> None:
        """Make the MLP of ``layer`` a routed one in place."""

    @abstractmethod
    def uninstall(self, layer: int) -> None:
        """Give the MLP of ``layer`` back as `install` found it."""

    @abstractmethod
    def name_hooks(self) -> None:
        """Make new hook points known to the model under their names, and forget those that are gone."""

    @abstractmethod
    def embed(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream before block 0."""

    @abstractmethod
    def run_blocks(self, resid: Tensor, start: int, stop: int, attention_mask: Tensor | None = None) -> Tensor:
        """Blocks start..stop-1 on the present routes."""

    @abstractmethod
    def unembed(self, resid: Tensor) -> Tensor:
        """Final norm and unembedding, [batch, pos, d_model] to [batch, pos, d_vocab]."""
