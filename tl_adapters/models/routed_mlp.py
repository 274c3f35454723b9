"""Routes, and the MLP of one layer that follows them: the target's MLP or the base's, with or without the adapter.

The target's own MLP object becomes a `RoutedMLP` in place: its class changes, its names and weights stay.
`hooked_transformer` and `transformer_bridge` hold the subclasses for MLPs of the two kinds of model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.errors import UserError
from tl_adapters.utils.precision import CAST_ELEMENTS, at_least_float32, product_in_float32


class WeightsProcessedError(UserError, RuntimeError):
    """Weights were processed after adapters were installed, so the routes would silently compute something else."""


class Route(NamedTuple):
    """Which parts of a layer's MLP compute."""

    base_mlp: bool
    """Whether the base's MLP computes instead of the target's."""
    adapter: bool
    """Whether the adapter's output is added."""


ROUTES = {
    "target": Route(base_mlp=False, adapter=False),
    "hybrid": Route(base_mlp=True, adapter=False),
    "replacement": Route(base_mlp=True, adapter=True),
    "target+adapter": Route(base_mlp=False, adapter=True),
}
"""The routes by name."""


@dataclass(frozen=True)
class MLPWeights:
    """The weights of one gated MLP as TransformerLens shapes them, to compute its neurons without firing hooks."""

    W_gate: Tensor
    """[d_model, d_mlp]"""
    W_in: Tensor
    """[d_model, d_mlp]"""
    W_out: Tensor
    """[d_mlp, d_model]"""
    act_fn: Callable[[Tensor], Tensor]
    """The activation function of the gate."""

    def neurons(self, x: Tensor) -> Tensor:
        """The neurons' activations, which multiply the rows of W_out, for inputs [..., d_model]; [..., d_mlp]."""
        return self.act_fn(x @ self.W_gate) * (x @ self.W_in)

    def output(self, x: Tensor) -> Tensor:
        """The MLP's output for inputs [..., d_model], computed in float32 at least, whatever the dtype of the weights.

        Weights that have to be cast are cast in slices, so that no whole copy of one is in memory.
        """
        # The GPU's fast kernels need slices whose widths are multiples of 8.
        width = max(8, CAST_ELEMENTS // self.W_in.shape[0] // 8 * 8)
        out = torch.zeros_like(at_least_float32(x))
        parts = (w.split(width, axis) for w, axis in ((self.W_gate, 1), (self.W_in, 1), (self.W_out, 0)))
        for W_gate, W_in, W_out in zip(*parts, strict=True):
            neurons = self.act_fn(product_in_float32(x, W_gate)) * product_in_float32(x, W_in)
            out = out + product_in_float32(neurons, W_out)
        return out


class RoutedMLP(nn.Module):
    """An MLP that can run the base's MLP in its place and add an adapter; a mixin before the MLP class it extends.

    The target's second norm may be folded into the target's MLP, and adapters may read its output before or after
    the norm's weight is applied, so the inputs of the MLP, of the base's MLP and of the adapter may differ by a factor.
    """

    base: nn.Module | None
    """The base's MLP; None in a model without a base."""
    adapter: TranscoderAdapter | None
    """The adapter; None where there is none of this layer."""
    planted: TranscoderAdapter | None
    """Known features that are part of the target, which its own MLP, being gated, could not represent."""
    base_scale: Tensor | None
    """The factor from the MLP's input to the base's, [d_model]; None where they are the same."""
    adapter_scale: Tensor | None
    """The factor from the MLP's input to the adapter's, [d_model]; None where they are the same."""
    route: Route
    """Which parts compute."""

    def install(self, base: nn.Module | None, base_scale: Tensor | None) -> None:
        """Set up an MLP whose class was just changed to this one. It starts on the route "target"."""
        self.base = base
        self.adapter = None
        self.planted = None
        self.register_buffer("base_scale", base_scale, persistent=False)
        self.register_buffer("adapter_scale", None, persistent=False)
        self.route = ROUTES["target"]

    def uninstall(self, cls: type[nn.Module]) -> None:
        """Change back to the class ``cls``, as before `install`."""
        for name in ("base", "adapter", "planted", "base_scale", "adapter_scale", "route"):
            delattr(self, name)
        self.__class__ = cls  # type: ignore[assignment]

    def weights(self) -> tuple[MLPWeights, MLPWeights]:
        """The target's and the base's weights. Only for an MLP with a base."""
        raise NotImplementedError

    def difference(
        self, x: Float[Tensor, "*batch d_model"], output: Float[Tensor, "*batch d_model"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """MLP_target(x) - MLP_base(x), with planted features as part of the target's MLP.

        It is small beside either output and is computed in float32 at least, whatever the dtype of the weights.

        Args:
            x: inputs of the MLP.
            output: what the MLP has written there on the route "target", if it is known. It spares the target's part,
                unless it is in bfloat16 or float16, whose rounding would be a large part of the difference.
        """
        target, base = self.weights()
        for_base = x if self.base_scale is None else at_least_float32(x) * self.base_scale
        if output is not None and output.dtype == at_least_float32(output).dtype:
            return output - base.output(for_base)
        out = target.output(x) - base.output(for_base)
        return out if self.planted is None else out + self.planted(at_least_float32(x))

    def adapter_input(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the adapter reads where the MLP reads ``x``."""
        return x if self.adapter_scale is None else x * self.adapter_scale

    def require_unprocessed(self) -> None:
        """Raises WeightsProcessedError where weights were processed after `install`."""

    @property
    def adapter_out_hook(self) -> nn.Module:
        """The hook point hook_adapter_out, or the module that another tool has put in its place."""
        raise NotImplementedError

    def apply_hook_in(self, x: Tensor) -> Tensor:
        """``x`` through the hook point hook_in, where the surrounding module does not apply it itself."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output on this layer's route, [batch, pos, d_model] to the same shape."""
        self.require_unprocessed()
        x = self.apply_hook_in(x)
        if self.route.base_mlp:
            assert self.base is not None  # RoutedModel.route_layers has checked
            out = self.base(x if self.base_scale is None else (x * self.base_scale).to(x.dtype))
        else:
            out = super().forward(x)
            if self.planted is not None:
                out = out + self.planted(x)
        if self.route.adapter:
            assert self.adapter is not None
            return out + self.adapter_out_hook(self.adapter(self.adapter_input(x)).to(out.dtype))
        if _is_used(self.adapter_out_hook):
            return out + self.adapter_out_hook(torch.zeros_like(out))
        return out


def require_unrouted(mlp: Any) -> None:
    """Raises UnsupportedModelError where adapters were attached to the model of this MLP before."""
    if isinstance(mlp, RoutedMLP):
        raise UnsupportedModelError(
            "This model has adapters attached already; detach those first, or use their PairedModel."
        )


def _is_used(point: Any) -> bool:
    """Whether a hook point has hooks, or was replaced by a module of another tool."""
    return type(point) is not HookPoint or bool(point._forward_hooks)
