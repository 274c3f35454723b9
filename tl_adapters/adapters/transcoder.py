"""The transcoder adapter of one layer (arXiv 2602.20904, section 3), with any of four activation functions.

    MLP_target(x) ~ MLP_base(x) + T(x)          T(x) = act(x @ W_enc + b_enc) @ W_dec + b_dec

x is what the MLP itself reads: the residual stream after the second norm, with that norm's weight. The decoder
starts at zero, so an untrained adapter changes nothing.

An adapter trains only within `AdapterSet.training_on`, which the training objective enters; everywhere else it
evaluates. nn.Module's train() and eval() change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.activation_functions import batch_topk, jumprelu, topk
from tl_adapters.adapters.active_features import ACTS_AT_ONCE, Activations, ActiveFeatures, run_over_active
from tl_adapters.config import ActivationName, ConfigError, TrainingConfig
from tl_adapters.utils.precision import at_least_float32


class TranscoderAdapter(nn.Module):
    """The adapter T of one layer. Its hook points have the names of SAELens's.

    Args:
        d_model: width of the residual stream.
        n_features: width of the adapter.
        activation: "relu" (the paper's), "jumprelu", "topk" or "batchtopk" (`activations`).
        k: active features per token of topk and batchtopk; None for the others.
        bandwidth: width of jumprelu's straight-through kernel, in units of the pre-activation; thresholds start at it.
        generator: source of the random encoder, uniform in +-1/sqrt(d_model); None leaves every weight zero.
        dtype, device: of the weights; inputs are cast to this dtype, or to ``compute_dtype``, and outputs back to the
            input's.

    Raises ConfigError for another activation, or a k that it does not take.
    """

    threshold: Tensor
    """[n_features], of jumprelu (learned) and batchtopk (the same for all; 0 until a batch has been seen) only."""
    training_tokens: Tensor | None
    """The tokens of the present batch that are not padding, while the adapter trains; None while it evaluates."""

    n_training_tokens: int | None
    """Their number, which batchtopk reads."""
    over_active: bool
    """Whether products may be restricted to active features, where few are; only training does so."""
    on_acts: Callable[[Activations], None] | None
    """Called in every pass with the activations and their graph; None where nobody asks."""
    compute_dtype: torch.dtype | None
    """The dtype of products and activations, to which the weights are cast in every pass; None is the weights' own."""

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        activation: ActivationName = "relu",
        k: int | None = None,
        bandwidth: float = TrainingConfig.bandwidth,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        require_activation(activation, k, n_features)
        self.activation, self.k, self.bandwidth = activation, k, bandwidth
        self.training_tokens = self.n_training_tokens = self.compute_dtype = self.on_acts = None
        self.over_active = False
        self.W_enc = nn.Parameter(torch.zeros(d_model, n_features, dtype=dtype, device=device))
        self.b_enc = nn.Parameter(torch.zeros(n_features, dtype=dtype, device=device))
        self.W_dec = nn.Parameter(torch.zeros(n_features, d_model, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_model, dtype=dtype, device=device))
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.full((n_features,), bandwidth, dtype=dtype, device=device))
        elif activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(n_features, dtype=dtype, device=device))
        self.hook_sae_input = HookPoint()  # [batch, pos, d_model]
        self.hook_sae_acts_pre = HookPoint()  # [batch, pos, n_features]
        self.hook_sae_acts_post = HookPoint()  # [batch, pos, n_features]
        self.hook_sae_recons = HookPoint()  # [batch, pos, d_model]
        if generator is not None:
            bound = d_model**-0.5
            # Drawn on the generator's device: the same seed gives the same encoder wherever the adapter lives.
            uniform = torch.rand(d_model, n_features, generator=generator, device=generator.device)
            with torch.no_grad():
                self.W_enc.copy_((2 * uniform - 1) * bound)

    @property
    def n_features(self) -> int:
        """Width of the adapter."""
        return self.W_enc.shape[1]

    @property
    def acts_dtype(self) -> torch.dtype:
        """The dtype of activations: ``compute_dtype``, or the weights' own."""
        return self.compute_dtype or self.W_enc.dtype

    @contextmanager
    def computing_in(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Within this context ``compute_dtype`` is ``dtype``."""
        before, self.compute_dtype = self.compute_dtype, dtype
        try:
            yield
        finally:
            self.compute_dtype = before

    def decoder_norms(self, of_pass: Activations | None = None) -> Float[Tensor, "n_features"]:
        """`row_norms` of the decoder, with gradients: an activation times its norm is what the feature writes.

        Args:
            of_pass: activations of a pass; those of `run` over active features have the norms already.
        """
        return of_pass.decoder_norms if isinstance(of_pass, ActiveFeatures) else row_norms(self.W_dec)

    def lay_out_by_feature(self) -> None:
        """Keep W_enc feature by feature in memory, as W_dec is, so that its gradients over active features are, too."""
        self.W_enc.data = self.W_enc.data.T.contiguous().T

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        """Feature activations of what the MLP reads: the pre-activation where a feature is active, 0 where not."""
        x = self.hook_sae_input(x.to(self.acts_dtype))
        pre = self._product(x, self.W_enc, self.b_enc)
        return self.hook_sae_acts_post(self._activate(self.hook_sae_acts_pre(pre)))

    def _activate(self, pre: Tensor) -> Tensor:
        if self.activation == "relu":
            return torch.relu(pre)
        if self.activation == "topk":
            assert self.k is not None  # require_activation has checked
            return topk(pre, self.k)
        if self.activation == "batchtopk" and self.training_tokens is not None:
            assert self.k is not None
            return batch_topk(pre, self.k, self.training_tokens, self.n_training_tokens)
        return jumprelu(pre, self.threshold, self.bandwidth)

    def decode(self, acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_model"]:
        """What the activations add to the MLP's output."""
        return self.hook_sae_recons(self._product(acts, self.W_dec, self.b_dec))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = self.acts_dtype
        product = torch.addmm(bias.to(dtype), x.flatten(0, -2).to(dtype), weight.to(dtype))
        return product.unflatten(0, x.shape[:-1])

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """T(x), in the dtype of x."""
        acts, output = self.run(x)
        if self.on_acts is not None:
            self.on_acts(acts)
        return output.to(x.dtype)

    def run(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Activations, Float[Tensor, "*batch d_model"]]:
        """`encode` and `decode` of what the MLP reads.

        Where ``over_active`` is set, few features are active and no hook reads inputs or activations, products run over
        active features alone, and the activations are given as a list of these.
        """
        if self._may_run_over_active(x) and (found := self._run_over_active(x)) is not None:
            return found[0], self.hook_sae_recons(found[1])
        acts = self.encode(x)
        return acts, self.decode(acts)

    def _run_over_active(self, x: Tensor) -> tuple[ActiveFeatures, Tensor] | None:
        x, weights = x.to(self.acts_dtype), (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        if self.activation == "batchtopk":  # which features are active depends on all tokens together
            of_batch = lambda pre: self._activate(pre.unflatten(0, x.shape[:-1])).flatten(0, -2)  # noqa: E731
            return run_over_active(x, weights, of_batch, max(1, x.shape[:-1].numel()))
        activate = None if self.activation == "relu" else self._activate
        return run_over_active(x, weights, activate, max(1, ACTS_AT_ONCE // self.n_features))

    def _may_run_over_active(self, x: Tensor) -> bool:
        """Whether a pass with gradients is asked for that `run_over_active` computes as `encode` and `decode` do."""
        if not (self.over_active and torch.is_grad_enabled()) or self.activation == "jumprelu":
            return False  # jumprelu's thresholds learn from features that are not active
        own = type(self).encode is TranscoderAdapter.encode and type(self).decode is TranscoderAdapter.decode
        dtype = self.W_enc.dtype
        kernels = x.device.type == "cpu" and self.acts_dtype == dtype and dtype in (torch.float32, torch.float64)
        points = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post)
        hooked = any(p._forward_hooks or p._backward_hooks or p._backward_pre_hooks for p in points)
        return own and kernels and not hooked

    @torch.no_grad()
    def settle_threshold(self, smallest: Float[Tensor, ""] | None, rate: float) -> None:
        """Updates thresholds after an optimizer step: jumprelu's stay >= 0, batchtopk's follows ``smallest``.

        Args:
            smallest: smallest activation that the step's batch let through; only batchtopk reads it.
            rate: share of this batch in the running mean, above 0 to 1.
        """
        if self.activation == "jumprelu":
            self.threshold.clamp_(min=0)
        elif self.activation == "batchtopk":
            assert smallest is not None
            first = self.threshold == 0
            smallest = smallest.to(self.threshold.dtype)
            self.threshold.copy_(torch.where(first, smallest, self.threshold.lerp(smallest, rate)))


def row_norms(rows: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n"]:
    """The Euclidean norm of every row, in float32 at least; 0 for a feature or neuron that writes nothing."""
    return at_least_float32(rows).norm(dim=-1)


def unit_rows(rows: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """Every row divided by its norm, in the dtype of ``rows``; a row of zeros stays zeros."""
    norms = row_norms(rows).to(rows.dtype)
    return rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)[..., None]


def require_activation(activation: str, k: int | None, n_features: int) -> None:
    """Raises ConfigError for an unknown activation, or a k that it does not take with this many features."""
    if activation not in get_args(ActivationName):
        raise ConfigError(f"activation is {activation!r}; allowed is one of {', '.join(get_args(ActivationName))}.")
    takes_k = activation in ("topk", "batchtopk")
    if takes_k != (k is not None) or (k is not None and not 1 <= k <= n_features):
        allowed = f"a whole number from 1 to n_features ({n_features})" if takes_k else "None"
        raise ConfigError(f"k is {k!r} for the activation {activation!r}; allowed is {allowed}.")


def adapter_of(
    tensors: dict[str, Tensor], activation: ActivationName = "relu", k: int | None = None
) -> TranscoderAdapter:
    """An adapter around the given tensors; nothing is copied. Raises ConfigError."""
    with torch.device("meta"):
        adapter = TranscoderAdapter(*tensors["W_enc"].shape, activation=activation, k=k, dtype=tensors["W_enc"].dtype)
    adapter.load_state_dict(tensors, assign=True)
    return adapter.requires_grad_(True)
