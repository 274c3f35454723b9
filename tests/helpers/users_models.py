"""Models as users have them before adapters are attached, and what the same pair computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers.random_models import random_batch, random_model, randomise
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformer
from transformer_lens.components import GroupedQueryAttention

from tl_adapters.models.build import build_model
from tl_adapters.models.hooked_transformer import build_hooked_transformer
from tl_adapters.models.paired_model import PairedModel


def plain(architecture: str = "Qwen2ForCausalLM", seed: int = 2, **options: object) -> HookedTransformer:
    """A HookedTransformer of the user's own: its own weights, stock attention."""
    model = build_hooked_transformer(copy.deepcopy(random_model(seed, architecture=architecture, **options)))
    for block in model.blocks:
        block.attn.__class__ = GroupedQueryAttention
    for weight in model.parameters():  # tied embeddings are one tensor until here, and processing would write it twice
        weight.data = weight.data.clone()
    return model


def with_saes(architecture: str = "Qwen2ForCausalLM", **options: object) -> HookedSAETransformer:
    source = plain(architecture, **options)
    model = HookedSAETransformer(source.cfg)
    model.load_state_dict(source.state_dict(), assign=True, strict=False)
    return model


def bridge(architecture: str = "Qwen2ForCausalLM", **options: object) -> Any:
    return build_model(random_model(2, architecture=architecture, **options), backend="bridge")


PROCESSING: dict[str, dict[str, bool]] = {
    "unprocessed": {},
    "fold_ln": dict(fold_ln=True, center_writing_weights=False, center_unembed=False),
    "fully processed": {},
}


def process(model: HookedTransformer, how: str) -> None:
    if how != "unprocessed":
        capped = model.cfg.output_logits_soft_cap > 0  # a centred W_U is another model under a soft cap
        model.process_weights_(**(PROCESSING[how] | ({"center_unembed": False} if capped else {})))


def reference(architecture: str = "Qwen2ForCausalLM", **options: object) -> PairedModel:
    models = (random_model(seed, architecture=architecture, **options) for seed in (1, 2))
    return randomise(PairedModel.from_pretrained(*models))


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).log_softmax(-1)  # centring W_U shifts all logits of a position alike


TOKENS = random_batch(3).tokens[:1, :11]
