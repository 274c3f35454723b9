"""The supported architectures, one record each: what differs between them, for every module that asks.

To add an architecture with gated MLPs and RMS norms, as Llama has them:

1. Add an `Architecture` to `ARCHITECTURES`. Its name and its model_type are those of config.json, and its converter is
   the function of TransformerLens that renames its weights (transformer_lens.pretrained.weight_conversions). Every
   other field describes a difference from Llama and may be left out where there is none.
2. Add a small random model with everything that is peculiar to it to ``ARCHITECTURES`` of
   tests/helpers/random_models.py: the tests of models, attribution and formats then run on it as well.

Nothing else asks for an architecture by name. Whether the model that TransformerLens makes of the weights computes the
same as transformers is compared whenever a model is loaded (`tl_adapters.models.output_agreement`), so a record that
is wrong raises an error. Architectures whose MLPs are not three matrices named gate_proj, up_proj and down_proj, or
whose layers are not pre-norm blocks, need more than a record.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

AUTHORS_CHECKPOINT_SUFFIX = "WithTranscoder"
"""What the paper's authors append to the architecture's name in a checkpoint that holds adapters."""


class UnsupportedModelError(UserError, ValueError):
    """A model that this version cannot represent exactly; the message names the reason."""


def _llama_norms() -> dict[str, str]:
    return {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}


def _no_options(config: PretrainedConfig) -> dict[str, Any]:
    return {}


def _gemma2_options(config: PretrainedConfig) -> dict[str, Any]:
    """Soft caps and alternating attention windows."""
    return dict(
        attn_scale=float(config.query_pre_attn_scalar) ** 0.5,
        window_size=config.sliding_window,
        use_local_attn=True,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        attn_scores_soft_cap=float(config.attn_logit_softcapping or -1),
        output_logits_soft_cap=float(config.final_logit_softcapping or -1),
    )


@dataclass(frozen=True)
class Architecture:
    """What is peculiar to one architecture. The defaults are those of Llama."""

    name: str
    """The class of transformers, as config.json gives it under "architectures"."""
    label: str
    """The name that messages use, such as "Gemma 2"."""
    model_type: str
    """What config.json gives under "model_type", by which transformers chooses its classes."""
    converter: str
    """Dotted name of TransformerLens's function that converts the weights; imported on first use."""
    norms: Mapping[str, str] = field(default_factory=_llama_norms)
    """The norms of a layer: name in TransformerLens's block -> name in the layer of a checkpoint."""
    norm_offset: float = 0.0
    """What the model adds to the stored weights of its norms: 1 where it computes with 1 + w, as Gemma does."""
    scales_embedding: bool = False
    """Whether the model multiplies its embedding by sqrt(d_model), as Gemma does in every forward pass.

    TransformerLens scales the stored matrix instead. Embedding and unembedding of such a model must be tied: its
    fingerprint covers the unembedding only, which is the same in both libraries."""
    eager_attention: bool = False
    """Whether transformers must compute attention unfused: earlier releases leave out Gemma 2's soft cap otherwise."""
    config_options: Callable[[PretrainedConfig], dict[str, Any]] = _no_options
    """Entries of TransformerLens's configuration that only this architecture has, from a Hugging Face configuration."""

    @property
    def has_qk_norms(self) -> bool:
        """Whether queries and keys are normalized per head."""
        return "attn.q_norm" in self.norms

    @property
    def has_post_norms(self) -> bool:
        """Whether the outputs of attention and MLP are normalized before they are added to the residual stream."""
        return "ln2_post" in self.norms

    def embedding_scale(self, d_model: int) -> float:
        """What TransformerLens multiplies the stored embedding by."""
        return float(d_model**0.5) if self.scales_embedding else 1.0

    def norm_tensor(self, norm: str, layer: int) -> str:
        """Name of a norm's weights in a checkpoint; ``norm`` is a key of `norms`."""
        return f"model.layers.{layer}.{self.norms[norm]}.weight"

    def load_converter(self) -> Callable[..., dict[str, Tensor]]:
        """TransformerLens's converter: (Hugging Face model, HookedTransformerConfig) -> state dict."""
        module, _, function = self.converter.rpartition(".")
        convert: Callable[..., dict[str, Tensor]] = getattr(importlib.import_module(module), function)
        return convert


_CONVERSIONS = "transformer_lens.pretrained.weight_conversions"
_RECORDS = (
    Architecture("Qwen2ForCausalLM", "Qwen2", "qwen2", f"{_CONVERSIONS}.qwen2.convert_qwen2_weights"),
    Architecture(
        "Qwen3ForCausalLM",
        "Qwen3",
        "qwen3",
        f"{_CONVERSIONS}.qwen3.convert_qwen3_weights",
        norms={**_llama_norms(), "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
    ),
    Architecture("LlamaForCausalLM", "Llama", "llama", f"{_CONVERSIONS}.llama.convert_llama_weights"),
    Architecture(
        "Gemma2ForCausalLM",
        "Gemma 2",
        "gemma2",
        f"{_CONVERSIONS}.gemma.convert_gemma_weights",
        norms={
            "ln1": "input_layernorm",
            "ln1_post": "post_attention_layernorm",
            "ln2": "pre_feedforward_layernorm",
            "ln2_post": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
        scales_embedding=True,
        eager_attention=True,
        config_options=_gemma2_options,
    ),
)
ARCHITECTURES: dict[str, Architecture] = {record.name: record for record in _RECORDS}
"""The supported architectures by name."""


def architecture_name(config: Mapping[str, Any] | PretrainedConfig) -> str:
    """The architecture that a configuration names, "none" where it names none."""
    names = config.get("architectures") if isinstance(config, Mapping) else config.architectures
    return str(names[0]) if isinstance(names, list) and names else "none"


def find_architecture(name: str | None) -> Architecture:
    """The record of an architecture; of the paper authors' checkpoints, that of the model they extend.

    A model that a user made with TransformerLens may be of any architecture with gated MLPs and RMS norms: where there
    is no record of its name, it is taken to be as Llama is.
    """
    stock = (name or "none").removesuffix(AUTHORS_CHECKPOINT_SUFFIX)
    return ARCHITECTURES.get(stock) or Architecture(stock, stock, model_type="", converter="")


def require_supported(config: Mapping[str, Any] | PretrainedConfig, subject: str = "The model") -> Architecture:
    """The record of the architecture that a configuration names, with a model_type that belongs to it.

    ``subject`` is what the message calls the model. Raises UnsupportedModelError for another one.
    """
    name = architecture_name(config)
    model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    record = ARCHITECTURES.get(name)
    if record is None:
        raise UnsupportedModelError(f"{subject} is of architecture {name}; supported: {', '.join(ARCHITECTURES)}.")
    if model_type != record.model_type:
        raise UnsupportedModelError(
            f"{subject} has model_type {model_type!r} and architecture {name}, whose model_type is "
            f"{record.model_type!r}: transformers would choose classes of another model. Get its config.json again."
        )
    return record


def supported_labels() -> str:
    """The supported architectures as messages list them: "Qwen2, Qwen3, Llama, Gemma 2"."""
    return ", ".join(record.label for record in ARCHITECTURES.values())
