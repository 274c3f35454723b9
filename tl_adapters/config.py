"""Every option of training, documented under its field; frozen; YAML and JSON both ways.

An unknown key is an error that names the nearest known one, an impossible value one that says what is allowed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from tl_adapters.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message says which key, what was given and what is allowed."""


def _require(condition: bool, name: str, given: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {given!r}; allowed is {allowed}.")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four reconstruction terms, and where the cut of the bridges is drawn from."""

    output_kl: float = 1.0
    """Weight of KL(target || replacement)."""
    forward_bridge: float = 1.0
    """Weight of KL(target || replacement below the cut, target above it)."""
    backward_bridge: float = 1.0
    """Weight of KL(target || target below the cut, replacement above it)."""
    nmse: float = 1.0
    """Weight of the normalised squared error of the residual stream."""
    lowest_cut: int = 1
    """The cut is drawn uniformly from lowest_cut..n_layers: 1 in the paper, 0 in its public code."""

    def __post_init__(self) -> None:
        for name in ("output_kl", "forward_bridge", "backward_bridge", "nmse"):
            _require(getattr(self, name) >= 0, f"loss_weights.{name}", getattr(self, name), "a number >= 0")
        _require(self.lowest_cut in (0, 1), "loss_weights.lowest_cut", self.lowest_cut, "0 or 1")


LOSS_WEIGHTS = {
    "paper": LossWeights(),
    "public_code": LossWeights(forward_bridge=2.0, backward_bridge=2.0, lowest_cut=0),
}
"""The paper states weight 1 for every term; its public code doubles both bridges and may draw cut 0."""


@dataclass(frozen=True)
class TrainingConfig:
    """Options of one training run. The defaults are tuned on the built-in pair (its tune split)."""

    n_features: int = 512
    """Features per layer (8,192 in the paper, at d_model 3,584)."""
    steps: int = 700
    """Optimiser steps."""
    tokens_per_batch: int = 1024
    """Tokens per step, padding included; documents of similar length are batched together."""
    lr: float = 0.012
    """Peak learning rate of Adam (8e-4 in the paper, for a model a thousand times larger)."""
    beta1: float = 0.9
    """Adam's decay rate of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay rate of the squared gradient."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly; afterwards it falls as a cosine to 0."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of all adapters together."""
    l1_weight: float = 0.001
    """Weight of the sparsity term: higher means fewer active features (1e-4 to 1e-2 in the paper)."""
    l1_warmup_fraction: float = 0.25
    """Share of the steps over which l1_weight rises linearly from 0."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the reconstruction terms; in a file also a name: "paper" or "public_code"."""
    seed: int = 0
    """Seeds the encoders, the order of the documents and the cuts."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always one."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("n_features", "steps", "tokens_per_batch", "checkpoint_every", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        for name in ("lr", "grad_clip"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number >= 0 and below 1")
        for name in ("warmup_fraction", "l1_warmup_fraction"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        _require(self.l1_weight >= 0, "l1_weight", self.l1_weight, "a number >= 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON or YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The inverse of `to_dict`; keys left out take their defaults. Raises ConfigError."""
        values = _typed(cls, values, "")
        weights = values.get("loss_weights")
        if isinstance(weights, str):
            if weights not in LOSS_WEIGHTS:
                raise ConfigError(f"loss_weights: no weights named {weights!r}; known are {sorted(LOSS_WEIGHTS)}.")
            values["loss_weights"] = LOSS_WEIGHTS[weights]
        elif isinstance(weights, Mapping):
            values["loss_weights"] = LossWeights(**_typed(LossWeights, weights, "loss_weights."))
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> TrainingConfig:
        """Read a .yaml, .yml or .json file. Raises ConfigError, FileNotFoundError."""
        path = Path(path)
        try:
            text = path.read_text()
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is neither valid JSON nor YAML: {error}") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path} holds {type(values).__name__}; a configuration is a mapping of option: value.")
        return cls.from_dict(values)


_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": _NUMBER}


def _typed(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``values`` with every key known and every scalar of its field's type."""
    kinds = {f.name: str(f.type) for f in fields(cls)}
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known are: {', '.join(kinds)}."
            raise ConfigError(f"Unknown option {prefix}{key}.{hint}")
        allowed = _KINDS.get(kinds[key])
        if allowed and (isinstance(value, bool) or not isinstance(value, allowed)):
            raise ConfigError(f"{prefix}{key} is {value!r}; allowed is {kinds[key]}.")
    return dict(values)
