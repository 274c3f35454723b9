"""The local objective of one layer: an adapter is regressed on the difference of the two MLPs, without the model.

    d(x) = MLP_target(x) - MLP_base(x)
    loss = sum |T(x) - d(x)|^2 / sum |d(x)|^2  +  weight * sparsity / mean |d(x)|^2

x is what the MLP reads in the target. The adapter is trained on whitened inputs and on d in units of its root mean
square, so that one learning rate fits every layer; `LocalLayer.write_to` converts its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.adapters.activation_functions import smallest_active, step, times_active
from tl_adapters.adapters.active_features import Activations, ActiveFeatures
from tl_adapters.adapters.transcoder import TranscoderAdapter, unit_rows
from tl_adapters.config import LocalConfig, Penalty, TrainingConfig
from tl_adapters.local_stage.encoder_fit import Encoder
from tl_adapters.local_stage.schedules import linear_warmup, warmup_cosine
from tl_adapters.local_stage.whitening import LayerCoordinates, Whitening

TANH_SCALE, LOG_SCALE = 3.0, 0.1
"""Scales of the penalties tanh and log, in units of the root mean square of the difference."""
THRESHOLD_RATE = 0.05
"""Share of a batch in the running mean that batchtopk's threshold is."""


class LocalTerms(NamedTuple):
    """The terms of a local step, as tensors on the layer's device."""

    error: Tensor
    """Share of the difference's energy that the adapter leaves."""
    sparsity: Tensor
    """Sparsity penalty per token, before its weight."""
    l0: Tensor
    """Active features per token."""
    active: Tensor
    """Which features are active on some token of the step, [n_features]."""


def penalty(size: Float[Tensor, "*n"], kind: Penalty) -> Float[Tensor, "*n"]:
    """The penalty of activations in decoder-norm units: the activations (L1), or a function that grows more slowly.

    tanh and log have slope 1 at 0, as L1 has, and hardly shrink large activations.
    """
    if kind == "tanh":
        return torch.tanh(TANH_SCALE * size) / TANH_SCALE
    if kind == "log":
        return torch.log1p(size / LOG_SCALE) * LOG_SCALE
    return size


class LocalLayer:
    """One layer's adapter in whitened coordinates, with its optimizer.

    Args:
        whitening: of this layer's inputs.
        size: root mean square of |d(x)| over tokens; 0 where there is nothing to explain, so that no feature is active.
        config: width and activation function of the adapter.
        local: options of the local stage.
        generator: source of the random encoder, whose columns have norm 1.
        device: where the layer trains.
    """

    def __init__(
        self,
        whitening: Whitening,
        size: float,
        config: TrainingConfig,
        local: LocalConfig,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.coordinates = LayerCoordinates(whitening.to(device), size)
        self.local, self.device = local, device
        d_model = len(whitening.mean)
        self.adapter = TranscoderAdapter(d_model, config.n_features, device=device, **config.adapter_options)
        columns = unit_rows(torch.randn(config.n_features, d_model, generator=generator)).T
        with torch.no_grad():
            self.adapter.W_enc.copy_(columns)
        self.optimizer = torch.optim.Adam(
            self.adapter.parameters(), lr=local.lr, betas=(config.beta1, config.beta2), fused=True
        )
        for parameter in self.adapter.parameters():  # as Adam begins; here already, so that every state has all names
            zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=device), **zeros}
        if not size:
            self.silence(torch.arange(config.n_features))

    @property
    def size(self) -> float:
        """Root mean square of the difference's length."""
        return self.coordinates.size

    def step(self, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"], index: int) -> LocalTerms:
        """One optimizer step on tokens in this layer's coordinates.

        Args:
            x: whitened inputs.
            d: differences in units of their root mean square.
            index: number of the step, from 0.
        """
        local = self.local
        for group in self.optimizer.param_groups:
            group["lr"] = local.lr * warmup_cosine(index, local.steps, local.warmup_fraction)
        weight = local.sparsity_weight * linear_warmup(index, local.steps, local.sparsity_warmup_fraction)
        terms, loss, acts = self._loss(x, d, weight)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        real = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.adapter.settle_threshold(smallest_active(acts, real), THRESHOLD_RATE)
        return terms

    def _loss(self, x: Tensor, d: Tensor, weight: float) -> tuple[LocalTerms, Tensor, Activations]:
        adapter, energy = self.adapter, d.square().sum(1).mean()
        with _training(adapter, len(x)):
            acts, output = adapter.run(x)
        error = (output - d).square().sum(1).mean() / energy
        if adapter.activation == "relu":
            norms = adapter.decoder_norms(acts)
            written = acts.values * norms[acts.features] if isinstance(acts, ActiveFeatures) else acts * norms
            sparsity = penalty(written, self.local.penalty).sum() / (len(x) * energy)
        elif adapter.activation == "jumprelu":
            pre = torch.addmm(adapter.b_enc, x, adapter.W_enc)
            sparsity = step(pre, adapter.threshold, adapter.bandwidth).sum(1).mean()
        else:
            sparsity = torch.zeros_like(error)
        firings = times_active(acts)
        terms = LocalTerms(error.detach(), sparsity.detach(), firings.sum() / len(x), firings > 0)
        return terms, error + weight * sparsity, acts

    # -- single features ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def replace(self, feature: int, encoder: Encoder, direction: Float[Tensor, "d_model"]) -> None:
        """Give a feature this encoder and decoder; its moments in the optimizer become zero."""
        self.adapter.W_enc[:, feature], self.adapter.b_enc[feature] = encoder.w, encoder.b
        self.adapter.W_dec[feature] = direction
        self._forget(torch.tensor([feature]))

    @torch.no_grad()
    def silence(self, features: Int[Tensor, "n"]) -> None:
        """Make features inactive on every token and give them no decoder; they can be replaced later."""
        self.adapter.W_enc[:, features], self.adapter.b_enc[features], self.adapter.W_dec[features] = 0.0, -1.0, 0.0
        self._forget(features)

    def _forget(self, features: Int[Tensor, "n"]) -> None:
        adapter = self.adapter
        for parameter, axis in ((adapter.W_enc, 1), (adapter.b_enc, 0), (adapter.W_dec, 0)):
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][key].index_fill_(axis, features.to(self.device), 0.0)

    # -- results ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write_to(self, adapter: TranscoderAdapter) -> None:
        """Copy the weights to an adapter that reads inputs as they are; its output is that of this one times size."""
        self.coordinates.write(self.adapter, adapter)

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name, from which `restore` continues bit for bit."""
        return {**self.adapter.state_dict(), **self._moments()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights and moments of an earlier `state` in the same coordinates."""
        self.adapter.load_state_dict({name: state[name] for name in self.adapter.state_dict()})
        for name, value in self._moments().items():
            value.copy_(state[name])

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, parameter in self.adapter.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }


@contextmanager
def _training(adapter: TranscoderAdapter, n: int) -> Iterator[None]:
    """The adapter trains on n tokens, which batchtopk chooses among; products may run over active features alone."""
    adapter.training_tokens = torch.ones(n, dtype=torch.bool, device=adapter.W_enc.device)
    adapter.n_training_tokens, adapter.over_active = n, True
    try:
        yield
    finally:
        adapter.training_tokens, adapter.n_training_tokens, adapter.over_active = None, None, False
