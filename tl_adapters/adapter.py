"""Transcoder adapters: one sparse module per layer that stands beside the base MLP (arXiv 2602.20904, section 3).

    MLP_target(x) ~ MLP_base(x) + T(x)          T(x) = relu(x @ W_enc + b_enc) @ W_dec + b_dec

x is what the MLP itself reads: the residual stream after the second norm, with that norm's weight. The decoder
starts at zero, so an untrained adapter changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_adapters.atomic import new_folder
from tl_adapters.errors import UserError

METADATA_FILE = "tl_adapters.json"
SCHEMA_VERSION = 1


class FeatureId(NamedTuple):
    """One feature of an adapter set. Means something only together with the set: seeds number features anew."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses on a pair


class AdapterFormatError(UserError, ValueError):
    """Files that are not a set of adapters, or only part of one."""


class TranscoderAdapter(nn.Module):
    """T of one layer. Its hook points carry SAELens's names, so caches and interventions find them.

    Args:
        d_model: width of the residual stream.
        n_features: width of the adapter.
        generator: source of the random encoder, uniform in +-1/sqrt(d_model); None leaves every weight zero.
        dtype, device: of the weights; inputs are cast to this dtype and outputs back to the input's.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_model, n_features, dtype=dtype, device=device))
        self.b_enc = nn.Parameter(torch.zeros(n_features, dtype=dtype, device=device))
        self.W_dec = nn.Parameter(torch.zeros(n_features, d_model, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_model, dtype=dtype, device=device))
        self.hook_sae_input = HookPoint()  # [batch, pos, d_model]
        self.hook_sae_acts_pre = HookPoint()  # [batch, pos, n_features]
        self.hook_sae_acts_post = HookPoint()  # [batch, pos, n_features]
        self.hook_sae_recons = HookPoint()  # [batch, pos, d_model]
        if generator is not None:
            bound = d_model**-0.5
            # Drawn on the generator's device: the same seed gives the same encoder wherever the adapter lives.
            drawn = torch.rand(d_model, n_features, generator=generator, device=generator.device)
            with torch.no_grad():
                self.W_enc.copy_((2 * drawn - 1) * bound)

    @property
    def n_features(self) -> int:
        """Width of the adapter."""
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        """Feature activations of what the MLP reads."""
        x = self.hook_sae_input(x.to(self.W_enc.dtype))
        pre = self.hook_sae_acts_pre(torch.addmm(self.b_enc, x.flatten(0, -2), self.W_enc).unflatten(0, x.shape[:-1]))
        return self.hook_sae_acts_post(torch.relu(pre))

    def decode(self, acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_model"]:
        """What the activations add to the MLP's output."""
        out = torch.addmm(self.b_dec, acts.flatten(0, -2), self.W_dec).unflatten(0, acts.shape[:-1])
        return self.hook_sae_recons(out)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """T(x), in the dtype of x."""
        return self.decode(self.encode(x)).to(x.dtype)


@dataclass(frozen=True)
class AdapterMetadata:
    """What the weights alone do not say, and their meaning needs."""

    base: str = ""
    """Id or folder of the base model."""
    target: str = ""
    """Id or folder of the target model."""
    base_revision: str | None = None
    """Commit of the base on the hub, where it came from there."""
    target_revision: str | None = None
    """Commit of the target on the hub, where it came from there."""
    reads: str = "mlp_input"
    """Which tensor is x: "mlp_input", the second norm's output with its weight."""
    activation: str = "relu"
    """The activation function of the features."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Measured figures (L0, KL, ...), each with the split it was measured on."""


class AdapterSet(nn.Module):
    """The adapters of all layers, with what their meaning needs.

    Args:
        layers: one adapter per layer, all of one shape.
        ln2_weights: the target's second-norm weights per layer, [n_layers][d_model], as TransformerLens has them:
            they tell whether a model is the one these adapters belong to.
        metadata: where the adapters come from.
    """

    def __init__(
        self,
        layers: list[TranscoderAdapter],
        ln2_weights: list[Tensor],
        metadata: AdapterMetadata | None = None,
    ) -> None:
        super().__init__()
        if not layers or len(layers) != len(ln2_weights):
            raise ValueError(
                f"Got {len(layers)} adapters and {len(ln2_weights)} norm weights; give one of each a layer."
            )
        self.layers = nn.ModuleList(layers)
        self.ln2_weights = [w.detach().clone() for w in ln2_weights]
        self.metadata = metadata or AdapterMetadata()

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> TranscoderAdapter:
        return self.layers[layer]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[TranscoderAdapter]:
        return iter(self.layers)  # type: ignore[arg-type]

    @property
    def n_features(self) -> int:
        """Features per layer."""
        return self[0].n_features

    @property
    def d_model(self) -> int:
        """Width of the residual stream the adapters read and write."""
        return self[0].W_enc.shape[0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one safetensors file per layer and tl_adapters.json. Raises FileExistsError where ``folder`` exists."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "n_layers": len(self),
            "d_model": self.d_model,
            "n_features": self.n_features,
            **asdict(self.metadata),
        }
        with new_folder(folder) as out:
            for layer, adapter in enumerate(self):
                tensors = {name: p.detach().contiguous() for name, p in adapter.named_parameters()}
                tensors["ln2_w"] = self.ln2_weights[layer].contiguous()
                save_file(tensors, out / _layer_file(layer))
            (out / METADATA_FILE).write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> AdapterSet:
        """Read what `save_pretrained` wrote. Raises AdapterFormatError."""
        folder = Path(folder)
        if not (folder / METADATA_FILE).is_file():
            raise AdapterFormatError(f"{folder} holds no {METADATA_FILE}: it is not a folder of adapters.")
        try:
            record = json.loads((folder / METADATA_FILE).read_text())
            version = record.pop("schema_version")
            n_layers, d_model, n_features = (record.pop(key) for key in ("n_layers", "d_model", "n_features"))
            if version != SCHEMA_VERSION:
                raise AdapterFormatError(
                    f"{folder} has schema_version {version}; this version reads {SCHEMA_VERSION}. Update tl_adapters."
                )
            metadata = AdapterMetadata(**record)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise AdapterFormatError(f"{folder / METADATA_FILE} is not a description of adapters: {error}") from error
        layers, norms = [], []
        for layer in range(n_layers):
            tensors = _read_layer(folder / _layer_file(layer), d_model, n_features, device)
            norms.append(tensors.pop("ln2_w"))
            adapter = TranscoderAdapter(d_model, n_features, dtype=tensors["W_enc"].dtype, device=device)
            adapter.load_state_dict(tensors)
            layers.append(adapter)
        return cls(layers, norms, metadata)


def _layer_file(layer: int) -> str:
    return f"layer_{layer}.safetensors"


def _read_layer(path: Path, d_model: int, n_features: int, device: torch.device | str) -> dict[str, Tensor]:
    shapes = {
        "W_enc": (d_model, n_features),
        "b_enc": (n_features,),
        "W_dec": (n_features, d_model),
        "b_dec": (d_model,),
        "ln2_w": (d_model,),
    }
    try:
        tensors = load_file(path, device=str(device))
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path} is missing or damaged ({error}); copy the whole folder again.") from error
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != shapes:
        raise AdapterFormatError(f"{path} holds {found}; expected {shapes}.")
    return tensors
