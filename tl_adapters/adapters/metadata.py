"""The metadata of an adapter set: which models it belongs to, what its adapters read and write, how it was trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tl_adapters.adapters.saelens_folder import INPUT_HOOKS, OUTPUT_HOOKS, AdapterFormatError
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.config import ActivationName
from tl_adapters.utils.reading import shown


@dataclass(frozen=True)
class AdapterMetadata:
    """What one must know of adapters besides their weights to use them."""

    base: str = ""
    """Id or folder of the base model."""
    target: str = ""
    """Id or folder of the target model."""
    base_revision: str | None = None
    """Commit of the base on the hub; None where it came from elsewhere."""
    target_revision: str | None = None
    """Commit of the target on the hub; None where it came from elsewhere."""
    reads: str = "mlp_input"
    """The adapters' input: "mlp_input" is the second norm's output, "normalized" the same before the norm's weight."""
    activation: ActivationName = "relu"
    """The activation function of the features: "relu", "jumprelu", "topk" or "batchtopk"."""
    k: int | None = None
    """Active features per token of topk, and of batchtopk on average; None for the others."""
    stream: str = "replacement"
    """The residual stream that the features were trained on; on the target's, activations differ a little."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Content hashes of the models that the adapters were trained on: "base_mlps", "target" and parts of them."""
    datasets: list[str] = field(default_factory=list)
    """Names or files of the training data."""
    writes: str = "adapter_out"
    """The adapters' output: "adapter_out" is added to the MLP's output; "mlp_out" replaces it (other transcoders)."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Measured values (L0, KL, ...), each with the split that it was measured on."""

    def __post_init__(self) -> None:
        for name, allowed in (("reads", INPUT_HOOKS), ("writes", OUTPUT_HOOKS)):
            if (given := getattr(self, name)) not in allowed:
                raise AdapterFormatError(
                    f"{name} is {shown(given)}; allowed is one of {', '.join(allowed)}. These adapters were made "
                    "with a newer version of tl_adapters, or their description was edited."
                )

    def published(self) -> AdapterMetadata:
        """The metadata as files for other people hold them: models and data sets by name, without paths."""
        return replace(
            self,
            base=published_name(self.base, self.base_revision),
            target=published_name(self.target, self.target_revision),
            datasets=[published_name(dataset) for dataset in self.datasets],
        )
