"""By what adapters know their target and base again: content, not names; in memory and in files.

A few values per layer, which a cast does not change by more than its rounding and weight processing not at all:
folding moves the second norm's weights into the MLP and leaves the attention's output projection alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tl_adapters.checkpoints import MLP_KEY, read_tensors, read_values

SAMPLES = 64
TOLERANCE = 2.0**-7
"""Relative; a cast to bfloat16 moves a value by at most 2^-9, fine-tuning moves some of every 64 by more."""
_SECOND_NORM = {"Gemma2ForCausalLM": "model.layers.{}.pre_feedforward_layernorm.weight"}
_SECOND_NORM_DEFAULT = "model.layers.{}.post_attention_layernorm.weight"
_ATTENTION_OUT = "model.layers.{}.self_attn.o_proj.weight"


class LayerMarks(NamedTuple):
    """What adapters keep of one layer of their models: to know them again, and to fit models with folded norms."""

    ln2_w: Tensor
    """The target's second-norm weights as TransformerLens has them (Gemma 1 + w), [d_model]."""
    attention_out: Tensor
    """Values of the target's attention output projection, [at most 64]."""
    base_mlp_out: Tensor
    """Values of the base's down projection, [at most 64]."""


def sample(weight: Tensor) -> Tensor:
    """Evenly spaced values of a matrix in Hugging Face's layout, on the CPU."""
    places = _places(weight.numel()).to(weight.device)
    return weight.detach()[torch.unravel_index(places, weight.shape)].to("cpu", copy=True)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for the rounding of a cast?"""
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=TOLERANCE, atol=1e-7)


def stored_marks(target: Path, base: Path, architecture: str, layer: int) -> LayerMarks:
    """The marks of a layer in checkpoints' files; of matrices only single values are read. Raises CheckpointError."""
    name = second_norm_name(architecture, layer)
    ln2_w = read_tensors(target, [name])[name].clone()  # may be a view of its whole shard
    if architecture == "Gemma2ForCausalLM":
        ln2_w = 1 + ln2_w.to(torch.promote_types(ln2_w.dtype, torch.float32))
    return LayerMarks(
        ln2_w,
        read_values(target, attention_out_name(layer), _places),
        read_values(base, MLP_KEY.format(layer, "down_proj"), _places),
    )


def second_norm_name(architecture: str, layer: int) -> str:
    """The tensor of the norm before the MLP."""
    return _SECOND_NORM.get(architecture, _SECOND_NORM_DEFAULT).format(layer)


def attention_out_name(layer: int) -> str:
    """The tensor of the attention's output projection."""
    return _ATTENTION_OUT.format(layer)


def _places(n: int) -> Tensor:
    return torch.linspace(0, n - 1, min(SAMPLES, n), dtype=torch.float64).round().long()
