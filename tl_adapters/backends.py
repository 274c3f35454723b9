"""The seam to TransformerLens: a HookedTransformer made of a Hugging Face model's own weights.

1. The configuration is read from the model's, not looked up by name: TransformerLens 3.9 knows a list of names,
   and reasoning models are rarely on it.
2. Parameters are views of the model's weights, in nn.Linear's layout. Nothing is held twice, and the copies that
   stock components make of transposed weights at every call become free.
3. Attention is fused while nobody looks at scores or patterns; a hook there brings the stock code back.

Qwen2, Qwen3, Llama and Gemma 2. What TransformerLens would leave out (a bias, a rope type, a sliding window) is
refused by name: it would be a silently different model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformer_lens.pretrained.weight_conversions.qwen2 import convert_qwen2_weights
from transformer_lens.pretrained.weight_conversions.qwen3 import convert_qwen3_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tl_adapters.attention import FusedAttention
from tl_adapters.checkpoints import CheckpointError, locate, read_config, tensor_shapes
from tl_adapters.errors import UserError

ARCHITECTURES: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "Qwen2ForCausalLM": convert_qwen2_weights,
    "Qwen3ForCausalLM": convert_qwen3_weights,
    "LlamaForCausalLM": convert_llama_weights,
    "Gemma2ForCausalLM": convert_gemma_weights,
}
"""Supported architectures, with TransformerLens's converter of their weights."""

ROPE_TYPES = ("default", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""Names that mean the same function in both libraries."""


class UnsupportedModelError(UserError, ValueError):
    """A model this version cannot represent exactly; the message names the reason."""


def mlp_activation(config: PretrainedConfig) -> str:
    """The MLP's activation function; Gemma keeps it under another name."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Type and parameters of the rotary embedding."""
    return dict(getattr(config, "rope_parameters", None) or {})


def tl_config(config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str) -> HookedTransformerConfig:
    """The TransformerLens configuration of a Hugging Face one. Raises UnsupportedModelError."""
    architecture = require_representable(config)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = rope_parameters(config)
    options: dict[str, Any] = dict(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=config.max_position_embeddings,
        d_head=d_head,
        n_heads=config.num_attention_heads,
        # Also where every head has its own keys: grouped attention in groups of one is the same computation.
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=mlp_activation(config),
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=rope.get("rope_theta", 10000.0),
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        use_qk_norm=architecture == "Qwen3ForCausalLM",
        original_architecture=architecture,
        model_name=config.name_or_path or architecture,
        init_weights=False,
        default_prepend_bos=False,  # chat templates write their own beginning of sequence
        dtype=dtype,
        device=str(device),
    )
    if rope.get("rope_type") == "llama3":
        options |= dict(
            use_NTK_by_parts_rope=True,
            NTK_original_ctx_len=rope["original_max_position_embeddings"],
            NTK_by_parts_low_freq_factor=rope["low_freq_factor"],
            NTK_by_parts_high_freq_factor=rope["high_freq_factor"],
            NTK_by_parts_factor=rope["factor"],
        )
    if architecture == "Gemma2ForCausalLM":
        options |= dict(
            attn_scale=float(config.query_pre_attn_scalar) ** 0.5,
            window_size=config.sliding_window,
            use_local_attn=True,
            attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
            attn_scores_soft_cap=float(config.attn_logit_softcapping or -1),
            output_logits_soft_cap=float(config.final_logit_softcapping or -1),
            use_normalization_before_and_after=True,
        )
    return HookedTransformerConfig(**options)


def require_representable(config: PretrainedConfig) -> str:
    """The architecture's name. Raises UnsupportedModelError, naming what TransformerLens would silently drop."""
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"Architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}."
        )

    def refuse(what: str, instead: str) -> None:
        raise UnsupportedModelError(
            f"{what} is not represented by TransformerLens's {architecture}: the model would not be exact; {instead}."
        )

    rope = rope_parameters(config)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        refuse(f"rope_type {rope['rope_type']!r}", f"supported rope types: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(f"partial_rotary_factor {rope['partial_rotary_factor']}", "supported is 1.0")
    for option in ("use_sliding_window", "attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if getattr(config, option, False):
            refuse(f"{option}=True", "supported is False")
    if getattr(config, "quantization_config", None):
        refuse("quantization_config (quantised weights)", "load the checkpoint in bfloat16 or float32")
    if mlp_activation(config) not in ACTIVATIONS:
        refuse(f"activation {mlp_activation(config)!r}", f"supported: {', '.join(ACTIVATIONS)}")
    return str(architecture)


def load_hooked_transformer(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> HookedTransformer:
    """`build_hooked_transformer` of a folder or hub name; tokenizer and dtype are the folder's own where None.

    Everything that can be seen in config and file headers is checked before a weight is read.
    Raises UnsupportedModelError, CheckpointError.
    """
    folder = locate(name)
    config = load_config(folder)
    require_representable(config)
    tensor_shapes(folder)
    hf_model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        # transformers would fill these at random and only log it.
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of a {config.architectures[0]}, such as {missing[0]}; "
            "it is not a complete checkpoint."
        )
    hf_model.config.name_or_path = str(name)
    return build_hooked_transformer(hf_model.to(device or "cpu"), tokenizer or load_tokenizer(folder))


def load_config(folder: Path) -> PretrainedConfig:
    """The folder's configuration. Raises CheckpointError, UnsupportedModelError."""
    architectures = read_config(folder).get("architectures")
    if not isinstance(architectures, list) or architectures[0] not in ARCHITECTURES:
        # Said here, since transformers fails in its own words on a model type it does not know.
        raise UnsupportedModelError(
            f"{folder} is of architecture {architectures}; supported: {', '.join(ARCHITECTURES)}."
        )
    return AutoConfig.from_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer; None where it has no tokenizer files."""
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return AutoTokenizer.from_pretrained(folder)
    return None


@torch.no_grad()
def build_hooked_transformer(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> HookedTransformer:
    """A HookedTransformer whose parameters are views of ``hf_model``'s, with fused attention; all weights frozen.

    No processing (no folding, no centring): hook values are the model's own. Raises UnsupportedModelError.
    """
    weight = next(hf_model.parameters())
    cfg = tl_config(hf_model.config, weight.dtype, weight.device)
    convert = ARCHITECTURES[str(cfg.original_architecture)]
    with warnings.catch_warnings():
        # TransformerLens announces that 4.0 drops this class; pyproject.toml's range is where we answer that.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r".*")
        model = HookedTransformer(cfg, None, move_to_device=False)
    # Gemma's norms come back in float32; in the model's own dtype the residual stream keeps it.
    state = {name: tensor.detach().to(cfg.device, cfg.dtype) for name, tensor in convert(hf_model, cfg).items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    parameters = dict(model.named_parameters())
    if unexpected or any(name in parameters for name in missing):
        raise UnsupportedModelError(
            f"TransformerLens's converter left weights of {cfg.original_architecture} unset: {missing}, {unexpected}."
        )
    if tokenizer is not None:
        # Not set_tokenizer: it loads the tokenizer anew under its recorded name and makes encode() prepend BOS.
        model.tokenizer = tokenizer
        model.cfg.tokenizer_prepends_bos = False
    for block in model.blocks:
        block.attn.__class__ = FusedAttention
    return model.requires_grad_(False).eval()
