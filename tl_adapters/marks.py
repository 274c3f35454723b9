"""By what adapters know their base and target again: content, not names; in memory and in files.

Of the target, what adapters keep survives weight processing: folding moves the second norm's weights into the MLP and
leaves the attention's output projection alone. Of the base, a content hash of its MLPs as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tl_adapters.checkpoints import MLP_KEY, PROJECTIONS, read_tensors, read_values
from tl_adapters.fingerprints import fingerprint

MLPTensors = Mapping[str, Tensor]
"""One MLP's weights as Hugging Face names them: gate_proj, up_proj, down_proj."""
_SECOND_NORM = {"Gemma2ForCausalLM": "model.layers.{}.pre_feedforward_layernorm.weight"}
_SECOND_NORM_DEFAULT = "model.layers.{}.post_attention_layernorm.weight"
_ATTENTION_OUT = "model.layers.{}.self_attn.o_proj.weight"


class TargetLayer(NamedTuple):
    """What adapters keep of one layer of their target: to know it again, and to fit models whose norms are folded."""

    ln2_w: Tensor
    """The second norm's weights as TransformerLens has them (Gemma 1 + w), [d_model]."""
    attention_out: Tensor
    """Evenly spaced values of the attention's output projection, [at most 64]."""

    def differs_from(self, other: TargetLayer) -> str | None:
        """Which of the two differs by more than a cast to bfloat16 does; None where neither does."""
        for what, ours, theirs in zip(("second norm", "attention's output"), self, other, strict=True):
            ours, theirs = ours.float().cpu(), theirs.float().cpu()
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3):
                return what
        return None


def target_layer(ln2_w: Tensor, o_proj: Tensor) -> TargetLayer:
    """The marks of a layer, from its second norm and its output projection in Hugging Face's layout."""
    places = _places(o_proj.numel()).to(o_proj.device)
    sample = o_proj.detach()[torch.unravel_index(places, o_proj.shape)]
    return TargetLayer(ln2_w.detach().to("cpu", copy=True), sample.to("cpu", copy=True))


def stored_target_layer(folder: Path, architecture: str, layer: int) -> TargetLayer:
    """The marks of a layer in a checkpoint's files; of the projection only single values are read.

    Raises CheckpointError.
    """
    name = second_norm_name(architecture, layer)
    ln2_w = read_tensors(folder, [name])[name].clone()  # may be a view of its whole shard
    if architecture == "Gemma2ForCausalLM":
        ln2_w = (1 + ln2_w.float()).to(ln2_w.dtype)
    return TargetLayer(ln2_w, read_values(folder, _ATTENTION_OUT.format(layer), _places))


def second_norm_name(architecture: str, layer: int) -> str:
    """The tensor of the norm before the MLP."""
    return _SECOND_NORM.get(architecture, _SECOND_NORM_DEFAULT).format(layer)


def attention_out_name(layer: int) -> str:
    """The tensor of the attention's output projection."""
    return _ATTENTION_OUT.format(layer)


def base_fingerprint(base_mlps: Sequence[MLPTensors]) -> str:
    """Content hash of a base's MLPs."""
    return fingerprint((f"{layer}.{name}", mlp[name]) for layer, mlp in enumerate(base_mlps) for name in PROJECTIONS)


def stored_base_fingerprint(folder: Path, n_layers: int) -> str:
    """`base_fingerprint` of a checkpoint's files, with one tensor in memory at a time. Raises CheckpointError."""
    keys = [(f"{layer}.{name}", MLP_KEY.format(layer, name)) for layer in range(n_layers) for name in PROJECTIONS]
    return fingerprint((short, read_tensors(folder, [key])[key]) for short, key in keys)


def _places(n: int) -> Tensor:
    return torch.linspace(0, n - 1, min(64, n), dtype=torch.float64).round().long()
