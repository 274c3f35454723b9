"""What one layer computes: the target's MLP or the base's, with or without the adapter.

The target's own MLP object becomes a `RoutedMLP` in place (its class changes, its names and weights stay), whatever
library made it: `hooked` does it to a HookedTransformer's, `bridged` to a TransformerBridge's. A `Backend` is such a
model with what a pair must be able to ask of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.adapter_set import TranscoderAdapter
from tl_adapters.errors import UserError


class WeightsProcessedError(UserError, RuntimeError):
    """A model whose weights were processed after adapters were put in: its routes would silently be wrong."""


class Route(NamedTuple):
    """What computes at one layer."""

    base_mlp: bool
    """The base's MLP instead of the target's."""
    adapter: bool
    """The adapter's output is added."""


ROUTES = {
    "target": Route(base_mlp=False, adapter=False),
    "hybrid": Route(base_mlp=True, adapter=False),
    "replacement": Route(base_mlp=True, adapter=True),
    "target+adapter": Route(base_mlp=False, adapter=True),
}


@dataclass(frozen=True)
class MLPWeights:
    """One gated MLP's weights as TransformerLens shapes them, and what it computes; fires no hook."""

    W_gate: Tensor
    """[d_model, d_mlp]"""
    W_in: Tensor
    """[d_model, d_mlp]"""
    W_out: Tensor
    """[d_mlp, d_model]"""
    act_fn: Callable[[Tensor], Tensor]
    """The activation function of the gate."""

    def neurons(self, x: Tensor) -> Tensor:
        """The activations that the rows of W_out are multiplied with, [..., d_mlp]."""
        return self.act_fn(x @ self.W_gate) * (x @ self.W_in)


class RoutedMLP(nn.Module):
    """An MLP that can hand over to the base's and add an adapter. Stands before the MLP class it extends.

    The target's second norm may be folded into the target's MLP, and adapters may read its output before or after
    the weight: ``base_scale`` and ``adapter_scale`` bring what the MLP reads into what base and adapter read.
    ``planted`` is part of the target: known features that its own MLP, being gated, could not hold.
    """

    base: nn.Module | None
    adapter: TranscoderAdapter | None
    planted: TranscoderAdapter | None
    base_scale: Tensor | None
    adapter_scale: Tensor | None
    route: Route

    def install(self, base: nn.Module | None, base_scale: Tensor | None) -> None:
        """Give a freshly re-classed MLP what it needs besides its own weights; it starts on the target's route."""
        self.base = base
        self.adapter = None
        self.planted = None
        self.register_buffer("base_scale", base_scale, persistent=False)
        self.register_buffer("adapter_scale", None, persistent=False)
        self.route = ROUTES["target"]

    def uninstall(self, cls: type[nn.Module]) -> None:
        """Be ``cls`` again, as before `install`."""
        for name in ("base", "adapter", "planted", "base_scale", "adapter_scale", "route"):
            delattr(self, name)
        self.__class__ = cls  # type: ignore[assignment]

    def weights(self) -> tuple[MLPWeights, MLPWeights]:
        """(target's, base's). Only where a base is in place."""
        raise NotImplementedError

    def require_unprocessed(self) -> None:
        """Raises WeightsProcessedError where weights were processed after `install`."""

    @property
    def adapter_point(self) -> nn.Module:
        """The hook point hook_adapter_out, or what another tool has put in its place."""
        raise NotImplementedError

    def enter(self, x: Tensor) -> Tensor:
        """The hook point hook_in, where the surrounding module does not fire it itself."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] to the same shape, along this layer's route."""
        self.require_unprocessed()
        x = self.enter(x)
        if self.route.base_mlp:
            assert self.base is not None  # PairedModel.route_layers has checked
            out = self.base(x if self.base_scale is None else (x * self.base_scale).to(x.dtype))
        else:
            out = super().forward(x)
            if self.planted is not None:
                out = out + self.planted(x)
        if self.route.adapter:
            assert self.adapter is not None
            read = x if self.adapter_scale is None else x * self.adapter_scale
            return out + self.adapter_point(self.adapter(read).to(out.dtype))
        if _is_used(self.adapter_point):
            return out + self.adapter_point(torch.zeros_like(out))
        return out


def _is_used(point: Any) -> bool:
    """A hook hangs there, or another tool has put a module of its own in the point's place."""
    return type(point) is not HookPoint or bool(point._forward_hooks)
