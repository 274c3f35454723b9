"""Adam on adapters: on their own weights, or in the coordinates of the local stage.

After the local stage an adapter is trained in that stage's coordinates, in which its encoder reads whitened inputs and
its decoder writes in units of the layer's difference. Neither the model nor the objective changes: gradients are
converted before every step, and weights after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import TrainingConfig
from tl_adapters.local_stage.whitening import LayerCoordinates
from tl_adapters.processes import processes


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter in the coordinates of its layer, as the local stage leaves it."""

    adapter: TranscoderAdapter
    """The adapter; its inputs are whitened, and its outputs are in units of the layer's difference."""
    coordinates: LayerCoordinates
    """The coordinates."""

    def to(self, device: torch.device) -> PlacedAdapter:
        """The same adapter on a device."""
        return PlacedAdapter(self.adapter.to(device), self.coordinates.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and coordinates, from which `of_tensors` makes the adapter again."""
        return {**self.adapter.state_dict(), **self.coordinates.tensors()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], like: TranscoderAdapter) -> PlacedAdapter:
        """The inverse of `tensors`, for an adapter of the kind and on the device of another one."""
        device = like.W_enc.device
        adapter = TranscoderAdapter(
            *like.W_enc.shape, activation=like.activation, k=like.k, bandwidth=like.bandwidth, device=device
        )
        adapter.load_state_dict({name: tensors[name] for name in adapter.state_dict()})
        return cls(adapter, LayerCoordinates.of_tensors(tensors, device))


class AdapterAdam:
    """Adam on the adapters of a pair, whose weights it changes.

    Args:
        adapters: the adapters to which the objective gives gradients.
        config: learning rate and decay rates.
        placed: the same adapters in the coordinates in which they are trained; none where their own weights are.
    """

    def __init__(self, adapters: AdapterSet, config: TrainingConfig, placed: Sequence[PlacedAdapter] = ()) -> None:
        if all(adapter.W_enc.device.type == "cpu" for adapter in adapters):
            for adapter in adapters:
                adapter.lay_out_by_feature()
        self._adapters = list(adapters)
        self._pairs = list(zip(placed, adapters, strict=True)) if placed else []
        self.trained = [each.adapter for each in placed] or list(adapters)
        """The adapters whose parameters Adam moves."""
        self.parameters = [parameter for adapter in self.trained for parameter in adapter.parameters()]
        self._moved = [_contiguous(parameter) for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self._moved, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
        self._shrinks_in_step = all(p.dtype == torch.float32 and p.device.type != "mps" for p in self.parameters)
        self._write()

    def add_up(self) -> None:
        """Give every process the sum of the gradients that the objective has left in each of them."""
        if processes().count > 1:
            for parameter in (parameter for adapter in self._adapters for parameter in adapter.parameters()):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                processes().add_up([parameter.grad])

    def clip(self, largest: float) -> Tensor:
        """Let the next step scale the gradient of all trained parameters together to a norm of at most ``largest``.

        Returns its norm before, in the coordinates in which the adapters are trained.
        """
        for placed, adapter in self._pairs:
            placed.coordinates.take_gradients(adapter, placed.adapter)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        shrink = (norm + 1e-6) / largest  # torch's own small number, in `clip_grad_norm_`
        if not self._shrinks_in_step:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, largest, norm)
        else:
            # Adam divides by it while it reads the gradient, which is then not read and written once more before.
            scale = shrink.float() if bool(shrink > 1) else None
            self.optimizer.grad_scale = scale  # type: ignore[attr-defined]  # as torch's GradScaler does
        return norm

    def step(self, lr: float, smallest_active: Sequence[Tensor] | None, threshold_rate: float) -> None:
        """Take a step by the gradients that `clip` has left, then update the thresholds.

        Args:
            lr: learning rate.
            smallest_active: smallest activation that batchtopk let through at each layer; None for other activations.
            threshold_rate: as ``rate`` of `TranscoderAdapter.settle_threshold`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for moved, parameter in zip(self._moved, self.parameters, strict=True):
            assert moved.data_ptr() == parameter.data_ptr(), (
                "the weights were moved, and Adam would change the old ones"
            )
            if moved is not parameter and parameter.grad is not None:
                moved.grad = parameter.grad.T.contiguous()
        self.optimizer.step()
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.zero_grad()
        for adapter in (*self.trained, *(adapter for _, adapter in self._pairs)):
            adapter.zero_grad()
        for index, adapter in enumerate(self.trained):
            adapter.settle_threshold(None if smallest_active is None else smallest_active[index], threshold_rate)
        self._write()

    def _write(self) -> None:
        for placed, adapter in self._pairs:
            placed.coordinates.write(placed.adapter, adapter)

    # -- state --------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Moments and step counts, named "parameter index.key", and placed adapters, "layer.L.name"."""
        moments = {
            f"{index}.{key}": self._turned(index, value)
            for index, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }
        placed = {
            f"layer.{layer}.{name}": value
            for layer, (placed, _) in enumerate(self._pairs)
            for name, value in placed.tensors().items()
        }
        return moments | placed

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the moments of `tensors`; adapters are made from the same tensors by `placed_adapters`."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if not name.startswith("layer."):
                index, key = name.split(".", 1)
                moments.setdefault(int(index), {})[key] = self._turned(int(index), value).contiguous()
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _turned(self, index: int, value: Tensor) -> Tensor:
        """A moment of a parameter, in its shape or in that which Adam moves."""
        return value if self._moved[index] is self.parameters[index] or value.dim() != 2 else value.T


def _contiguous(parameter: nn.Parameter) -> nn.Parameter:
    """What Adam is given in a parameter's place, on the same memory: the parameter or its transpose, as is contiguous.

    torch's fused Adam changes other parameters wrongly, and says nothing.
    """
    if parameter.is_contiguous():
        return parameter
    assert parameter.data.T.is_contiguous()
    return nn.Parameter(parameter.data.T)


def placed_adapters(tensors: Mapping[str, Tensor], like: AdapterSet) -> list[PlacedAdapter]:
    """The placed adapters in `AdapterAdam.tensors`; none where the adapters' own weights were trained."""
    by_layer: list[dict[str, Tensor]] = [{} for _ in like]
    for name, value in tensors.items():
        if name.startswith("layer."):
            _, layer, key = name.split(".", 2)
            by_layer[int(layer)][key] = value
    if not any(by_layer):
        return []
    return [PlacedAdapter.of_tensors(layer, adapter) for layer, adapter in zip(by_layer, like, strict=True)]
