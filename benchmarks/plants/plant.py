"""A pair whose difference is known: its true features, and what they are made of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.feature_matching import target_inputs
from tl_adapters.evaluation.planted_features import FIRING_RATES
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import RoutedMLP


@dataclass(frozen=True)
class Ground:
    """What a family plants in, and how much."""

    base: PreTrainedModel
    """The base, which stays as it is."""
    calibration: Sequence[Trace]
    """Text on which rates and sizes are set; for learned features also the text that they are learned on."""
    other: PreTrainedModel
    """A model of the base's shape, whose attention the family "attention" takes."""
    tokenizer: PreTrainedTokenizerBase | None = None
    per_layer: int = 20
    """Features (or edited neurons) of every layer."""
    rates: tuple[float, ...] = FIRING_RATES
    """Firing rates, used in turn."""
    strength: float = 0.5
    """Size of a feature where it is active, in units of the base MLP's output (root mean squares of both)."""

    @property
    def n_layers(self) -> int:
        return self.base.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.base.config.hidden_size

    def plant(self, features: AdapterSet, target: PreTrainedModel | None = None) -> PairedModel:
        """The pair of the base and ``target`` (None: the base) with features added."""
        return PairedModel.plant(copy.deepcopy(self.base), features, target=target, tokenizer=self.tokenizer)

    def pair(self, target: PreTrainedModel) -> PairedModel:
        """The pair of the base and another model."""
        return PairedModel.from_pretrained(copy.deepcopy(self.base), target, tokenizer=self.tokenizer)


@dataclass(frozen=True)
class Plant:
    """A pair whose difference is known."""

    pair: PairedModel
    truth: AdapterSet
    """The true features: what each is active on (`encode`) and what it writes (rows of ``W_dec``)."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the family measured while planting, as JSON values."""


def layer_inputs(pair: PairedModel, traces: Sequence[Trace], layer: int) -> Float[Tensor, "n d_model"]:
    """What one layer's MLP reads in the target at all tokens."""
    return torch.cat([inputs[layer] for inputs in target_inputs(pair, traces)])


def output_size(mlp: RoutedMLP, x: Float[Tensor, "n d_model"]) -> float:
    """Root mean square of the length of the base MLP's output."""
    _, base = mlp.weights()
    return float(base.output(x).square().sum(1).mean().sqrt())
