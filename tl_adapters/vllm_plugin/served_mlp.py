"""The MLP of a layer in vLLM, which runs every token through the parts that its condition names.

vLLM puts the tokens of all requests of a pass into one list, and requests of one pass may be of several conditions. The
tokens are sorted into groups once per pass (`TokenGroups`), and every layer computes each part for its group only, so a
pass of one condition reads no weights of a part that it does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_adapters.adapters.activation_functions import jumprelu, topk
from tl_adapters.vllm_plugin.served_conditions import Condition, ServedAdapters, ServedModelError, require_indices

Tokens: TypeAlias = slice | Tensor | None
"""Some tokens of a pass: all of them (a slice), those at these indices, or None for none."""
EVERY = slice(None)


@dataclass(frozen=True)
class TokenGroups:
    """The tokens of a pass by the parts that compute them."""

    target: Tokens
    """Tokens of the target's MLP."""
    base: Tokens
    """Tokens of the base's MLP."""
    adapter: Tokens
    """Tokens with adapters."""
    factors: Int[Tensor, "n_adapter"] | int | None
    """Row of the feature factors of every token with adapters, or one for all; None where no token has any. The rows
    of a tensor count from 1, and 0 leaves the features as they are."""
    decoder_bias: Float[Tensor, "n_adapter 1"] | bool
    """1 for every token that gets the decoder bias and 0 for others, or one answer for all."""


class Routing:
    """The groups of the present pass, which the MLPs of all layers share."""

    def __init__(self, served: ServedAdapters) -> None:
        self.served = served
        self.conditions = list(served.conditions)
        self._of_one = [_groups_of_one(condition) for condition in self.conditions]
        self.groups = self._of_one[0]

    def define(self, index: int, condition: Condition) -> None:
        """Define a spare condition. Raises ServedModelError for an index that belongs to none."""
        require_indices([index], self.served)
        if index < len(self.conditions) - self.served.spare:
            raise ServedModelError(f"Condition {self.conditions[index].name} was exported and stays as it is.")
        self.conditions[index], self._of_one[index] = condition, _groups_of_one(condition)

    def route(self, conditions: Int[Tensor, "n_tokens"]) -> None:
        """Set the groups of a pass from every token's condition. Raises ServedModelError for an unknown index."""
        on_host = conditions.cpu()
        present = on_host.unique().tolist()
        require_indices(present, self.served)
        self.groups = self._of_one[present[0]] if len(present) == 1 else self._mixed(on_host, conditions.device)

    def _mixed(self, on_host: Tensor, device: torch.device) -> TokenGroups:
        conditions = self.conditions

        def where(value: Callable[[Any], bool]) -> Tokens:
            chosen = torch.tensor([value(condition) for condition in conditions])[on_host]
            return EVERY if bool(chosen.all()) else chosen.nonzero()[:, 0].to(device) if bool(chosen.any()) else None

        adapter = where(lambda c: c.adapter)
        of_adapter = on_host if adapter is None else on_host[adapter if isinstance(adapter, slice) else adapter.cpu()]
        rows = torch.tensor([0 if c.factors is None else c.factors + 1 for c in conditions])[of_adapter]
        bias = torch.tensor([c.decoder_bias for c in conditions])[of_adapter]
        return TokenGroups(
            target=where(lambda c: not c.base_mlp),
            base=where(lambda c: c.base_mlp),
            adapter=adapter,
            factors=rows.to(device) if bool(rows.any()) else None,
            decoder_bias=True if bool(bias.all()) else bias[:, None].float().to(device),
        )


def _groups_of_one(condition: Condition) -> TokenGroups:
    return TokenGroups(
        target=None if condition.base_mlp else EVERY,
        base=EVERY if condition.base_mlp else None,
        adapter=EVERY if condition.adapter else None,
        factors=condition.factors,
        decoder_bias=condition.decoder_bias,
    )


class ServedAdapter(nn.Module):
    """The adapter of one layer with the feature factors of all conditions, for inference.

    It computes what `adapters.transcoder.TranscoderAdapter` does, which needs TransformerLens.

    Args:
        d_model: width of the residual stream.
        served: width, activation function, dtype and number of rows of factors.
    """

    def __init__(self, d_model: int, served: ServedAdapters) -> None:
        super().__init__()
        self.activation, self.k = served.activation, served.k
        n, dtype = served.n_features, getattr(torch, served.dtype)

        def weight(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        self.W_enc, self.b_enc = weight(d_model, n), weight(n)
        self.W_dec, self.b_dec = weight(n, d_model), weight(d_model)
        if served.activation in ("jumprelu", "batchtopk"):
            self.threshold = weight(n)
        if served.factor_rows:
            self.factors = weight(served.factor_rows, n, dtype=torch.float32)

    def forward(self, x: Float[Tensor, "n_tokens d_model"], groups: TokenGroups) -> Float[Tensor, "n_tokens d_model"]:
        """What the adapter adds to the MLP's output for tokens with adapters, in the dtype of ``x``."""
        acts = self._activate(torch.addmm(self.b_enc, x.to(self.W_enc.dtype), self.W_enc))
        if isinstance(groups.factors, int):
            acts = acts * self.factors[groups.factors].to(acts.dtype)
        elif groups.factors is not None:
            ones = torch.ones_like(self.factors[:1])
            acts = acts * torch.cat([ones, self.factors])[groups.factors].to(acts.dtype)
        if groups.decoder_bias is True:
            out = torch.addmm(self.b_dec, acts, self.W_dec)
        elif groups.decoder_bias is False:
            out = acts @ self.W_dec
        else:
            out = acts @ self.W_dec + self.b_dec * groups.decoder_bias.to(acts.dtype)
        return out.to(x.dtype)

    def set_factors(self, row: int, factors: Sequence[float]) -> None:
        """Set the factors of all features in a row."""
        self.factors[row] = torch.tensor(factors, dtype=self.factors.dtype, device=self.factors.device)

    def _activate(self, pre: Tensor) -> Tensor:
        if self.activation == "relu":
            return torch.relu(pre)
        if self.activation == "topk":
            assert self.k is not None  # the export has checked it
            return topk(pre, self.k)
        return jumprelu(pre, self.threshold, 1.0)  # the width of the kernel changes gradients only


class ServedMLP(nn.Module):
    """An MLP with the base's MLP and the adapter beside it; a mixin before the MLP class of vLLM that it extends."""

    base: nn.Module
    """The base's MLP."""
    adapter: ServedAdapter
    """The adapter."""
    routing: Routing
    """The groups of the present pass."""

    def forward(self, x: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, "n_tokens d_model"]:
        """The MLP's output, for every token by the parts of its condition."""
        groups = self.routing.groups
        if groups.base is None:
            out: Tensor = super().forward(x)
        elif groups.target is None:
            out = self.base(x)
        else:
            out = torch.empty_like(x)
            out[groups.target] = super().forward(x[groups.target])
            out[groups.base] = self.base(x[groups.base])
        if groups.adapter is not None:
            written = self.adapter(x[groups.adapter], groups)
            if isinstance(groups.adapter, slice):
                return out + written
            out.index_add_(0, groups.adapter, written)
        return out


def install(mlp: nn.Module, base: nn.Module, adapter: ServedAdapter, routing: Routing) -> None:
    """Make an MLP of vLLM a `ServedMLP`, in place, so that its weights keep their names."""
    cls = type(mlp)
    mlp.__class__ = type(f"Served{cls.__name__}", (ServedMLP, cls), {})
    mlp.base, mlp.adapter = base, adapter
    mlp.routing = routing  # type: ignore[assignment]  # a plain object beside the modules
