"""How large the difference of a layer's two MLPs is beside the rounding of their weights.

The difference is computed in float32 from the weights as they are stored, so that arithmetic adds next to nothing to
it. The weights themselves are rounded, though: bfloat16 keeps 8 bits. Where training changed a weight by less than a
unit in the last place, the stored difference is one unit or nothing, whatever the change was. Such roundings add up to
a dense difference of their own, in which there is nothing to explain.

For normal changes of standard deviation s, in units in the last place, the roundings of a weight before and after the
change add an error to the stored difference. Where s is small, the stored difference is one unit in a share
s (2 / pi)^1/2 of the weights, which is also its mean square m, and the error has the variance m - s^2 = m - m^2 pi / 2.
Where s is large, the variance is 1/6, of two roundings. The two meet near m = 1 / pi. So m gives the variance, here for
every neuron, matrix and power of two of the weights, and the noise is the difference that errors of these variances
make. Where training started from the stored base, only its result was rounded, and the noise is about half of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from tl_adapters.checkpoints.architectures import architecture_name, find_architecture
from tl_adapters.checkpoints.layer_samples import stored_second_norm, unit_in_last_place
from tl_adapters.checkpoints.model_checks import mlp_activation
from tl_adapters.checkpoints.model_files import MLP_KEY, PROJECTIONS, read_tensors
from tl_adapters.models.routed_mlp import MLPWeights
from tl_adapters.utils.notebook import ResultRecord
from tl_adapters.utils.precision import CAST_ELEMENTS, at_least_float32

STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes in which weights are stored, the coarsest first."""
SMALLEST_RATIO = 0.5
"""Signal to noise, as measured here, from which a layer is explained. Of 19 features planted in a layer of the model
organism, beside the rounding of its weights, the local stage found 13 without noise, 14 at a true ratio of 3, 11 at 1
and 7 at 0.3; it left 2, 24, 74 and 255 % of the planted difference's energy. So below about 0.7 an adapter is farther
from the difference than silence is. The measured ratio is the true one where both weights were rounded and about half
of it where one was; for changes of low rank far below a unit in the last place it is too high."""
STORED_INPUTS = 64
"""Number of random inputs on which stored weights are compared."""
SMALLEST_BINADE = 7
"""Weights of a neuron that are this many powers of two below its largest, or more, are one group."""


@dataclass(frozen=True)
class SignalToNoise(ResultRecord):
    """The difference of one layer's MLPs beside the difference that the rounding of their weights makes."""

    energy: float
    """Mean of |d(x)|^2 over tokens."""
    noise: float
    """The part of it that roundings of the weights make."""

    @property
    def ratio(self) -> float:
        """Energy beyond the noise, over the noise: 0 where all is rounding, infinite where nothing is rounded."""
        signal = max(0.0, self.energy - self.noise)
        return signal / self.noise if self.noise else math.inf if signal else 0.0

    @property
    def explainable(self) -> bool:
        """Whether the ratio is high enough for features to be found (`SMALLEST_RATIO`)."""
        return self.ratio >= SMALLEST_RATIO

    def __str__(self) -> str:
        if not self.energy:
            return "the two MLPs do not differ"
        share, ratio = min(1.0, self.noise / self.energy), f"{self.ratio:.2g}"
        return f"the rounding of weights makes {share:.0%} of the difference of the two MLPs (signal to noise {ratio})"


@torch.no_grad()
def signal_to_noise(
    target: MLPWeights, base: MLPWeights, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"]
) -> SignalToNoise:
    """How large the difference of two MLPs is beside the rounding of their weights.

    Args:
        target, base: the weights of one layer, into which no norm is folded.
        x: inputs of the MLP.
        d: the difference for these inputs.
    """
    change = torch.zeros_like(x := at_least_float32(x))
    device = target.W_in.device
    # On a GPU drawn there, as a large model has billions of weights; elsewhere on the CPU.
    generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(0)
    for exact, rounded in _with_errors(target, base, generator):
        change += rounded.output(x) - exact.output(x)
    return SignalToNoise(_energy(at_least_float32(d)), _energy(change))


@torch.no_grad()
def stored_signal_to_noise(base: Path, target: Path, config: PretrainedConfig, layer: int) -> SignalToNoise:
    """`signal_to_noise` of stored weights, on random inputs that are normalized as the target's second norm does.

    Args:
        base, target: folders with the weights.
        config: the target's configuration.
        layer: number of the layer, of which alone weights are read.

    Raises CheckpointError.
    """
    target_mlp, base_mlp = (_stored_mlp(folder, config, layer) for folder in (target, base))
    norm = stored_second_norm(target, find_architecture(architecture_name(config.to_dict())), layer).float()
    x = torch.randn(STORED_INPUTS, len(norm), generator=torch.Generator().manual_seed(0)) * norm
    return signal_to_noise(target_mlp, base_mlp, x, target_mlp.output(x) - base_mlp.output(x))


def _stored_mlp(folder: Path, config: PretrainedConfig, layer: int) -> MLPWeights:
    names = {name: MLP_KEY.format(layer, stored) for stored, name in PROJECTIONS.items()}
    tensors = read_tensors(folder, names.values())
    return MLPWeights(**{name: tensors[key].T for name, key in names.items()}, act_fn=ACT2FN[mlp_activation(config)])


def _energy(rows: Float[Tensor, "n d_model"]) -> float:
    return float(rows.square().sum(1).mean())


def _with_errors(
    target: MLPWeights, base: MLPWeights, generator: torch.Generator
) -> Iterator[tuple[MLPWeights, MLPWeights]]:
    """Groups of the target's neurons, as they are and with a draw of errors in the difference from the base's."""
    matrices = list(zip(_by_neuron(target), _by_neuron(base), strict=True))
    dtypes = [(_stored_dtype(ours), _stored_dtype(theirs)) for ours, theirs in matrices]
    d_mlp, d_model = matrices[0][0].shape
    for neurons in torch.arange(d_mlp).split(max(1, CAST_ELEMENTS // d_model)):
        rows = slice(int(neurons[0]), int(neurons[-1]) + 1)
        exact, rounded = [], []
        for both, stored_in in zip(matrices, dtypes, strict=True):
            ours, theirs = (at_least_float32(matrix[rows]) for matrix in both)
            units = (unit_in_last_place(w.abs(), dtype) for w, dtype in zip((ours, theirs), stored_in, strict=True))
            error = _draw_error(ours - theirs, torch.maximum(*units), generator)
            exact.append(ours)
            rounded.append(ours + error)
        yield _of_neurons(exact, target), _of_neurons(rounded, target)


def _by_neuron(mlp: MLPWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The three matrices with one row per neuron."""
    return mlp.W_gate.T, mlp.W_in.T, mlp.W_out


def _of_neurons(rows: list[Tensor], like: MLPWeights) -> MLPWeights:
    W_gate, W_in, W_out = rows
    return MLPWeights(W_gate.T, W_in.T, W_out, like.act_fn)


def _stored_dtype(weights: Tensor) -> torch.dtype:
    """The coarsest dtype that holds weights exactly: a model may be loaded in a wider one than it was stored in."""
    holds = (dtype for dtype in STORED_DTYPES if torch.equal(weights.to(dtype).to(weights.dtype), weights))
    return next(holds, weights.dtype)


def _draw_error(
    difference: Float[Tensor, "n d_model"], unit: Float[Tensor, "n d_model"], generator: torch.Generator
) -> Float[Tensor, "n d_model"]:
    """One draw of the errors of rounding in the difference of two matrices with a row per neuron.

    Args:
        difference: of the stored weights.
        unit: in the last place of the coarser of the two.
        generator: draws the errors.
    """
    squared = (difference / unit).square()
    group = (unit.amax(1, keepdim=True) / unit).log2().clamp(max=SMALLEST_BINADE).long()
    sums = torch.zeros(len(unit), SMALLEST_BINADE + 1).to(unit)
    sums, counts = sums.scatter_add(1, group, squared), sums.scatter_add(1, group, torch.ones_like(squared))
    mean = (sums / counts.clamp(min=1)).gather(1, group)
    variance = torch.where(mean < 1 / math.pi, mean - mean.square() * math.pi / 2, 1 / 6)
    return unit * variance.sqrt() * torch.randn(unit.shape, generator=generator, device=generator.device).to(unit)
