"""Tiny models, pairs and batches in which everything is random, norm weights included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tl_adapters.data.traces import Batch, Trace, collate
from tl_adapters.models.paired_model import PairedModel

ARCHITECTURES = {
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM, {}),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
    "LlamaForCausalLM": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,  # every head has its own keys
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "Gemma2ForCausalLM": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "tie_word_embeddings": True, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        },
    ),
}  # fmt: skip
"""Per architecture what the others lack: head width, llama3 rope, tied weights, post-norms, windows, soft caps."""


def random_model(
    seed: int, dtype: torch.dtype = torch.float64, architecture: str = "Qwen2ForCausalLM", **overrides: object
) -> PreTrainedModel:
    """A small model with every weight random, norms and biases included (ones and zeros hide bugs)."""
    config_class, model_class, peculiar = ARCHITECTURES[architecture]
    options: dict[str, object] = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=[architecture],
        attn_implementation="eager",
    )
    model = model_class(config_class(**{**options, **peculiar, **overrides})).to(dtype)
    offset = 0 if architecture == "Gemma2ForCausalLM" else 1  # Gemma's norms multiply by 1 + w
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
            if "norm" in name:
                weight.copy_(offset + 0.4 * noise)
            else:
                weight.copy_(noise * (0.3 if weight.ndim == 1 else 1.3 * weight.shape[-1] ** -0.5))
    return model.eval()


def randomise(pair: PairedModel, n_features: int = 24, seed: int = 5, activation: str = "relu") -> PairedModel:
    """Install adapters whose every weight is random, so that no law holds because something is zero."""
    options = ACTIVATION_OPTIONS[activation]
    adapters = pair.new_adapters(n_features, seed=seed, dtype=pair.model.cfg.dtype, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in adapters.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        for adapter in adapters:
            if activation in ("jumprelu", "batchtopk"):
                adapter.threshold.copy_(torch.randn(n_features, generator=generator).abs() * 0.3)
    return pair


def random_batch(seed: int, lengths: tuple[int, ...] = (11, 7, 9), prompt: int = 3, vocab: int = 61) -> Batch:
    """Documents of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[[int], list[int]] = lambda n: torch.randint(1, vocab, (n,), generator=generator).tolist()  # noqa: E731
    return collate([Trace(tuple(draw(n)), prompt) for n in lengths])


ACTIVATION_OPTIONS: dict[str, dict[str, object]] = {
    "relu": {},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 1.5},
    "topk": {"activation": "topk", "k": 5},
    "batchtopk": {"activation": "batchtopk", "k": 5},
}
"""Options of new adapters by activation; a law of adapters holds for all four."""
