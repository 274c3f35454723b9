"""Tiny random pairs on either backend, and what an intervention must leave as it was."""

from __future__ import annotations

import hashlib

import torch
from helpers.random_models import random_model, randomise

from tl_adapters.models.paired_model import PairedModel


def make(architecture: str = "Qwen2ForCausalLM", backend: str = "bridge", **options: object) -> PairedModel:
    models = [random_model(seed, architecture=architecture, **options) for seed in (1, 2)]
    return randomise(PairedModel.from_pretrained(*models, backend=backend))


def state(pair: PairedModel) -> tuple[str, list[str], list[object]]:
    digest = hashlib.sha256()
    for name, tensor in sorted(pair.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    hooks = [name for name, point in pair.model.hook_dict.items() if point.fwd_hooks or point._forward_hooks]
    return digest.hexdigest(), hooks, list(pair.routes)


TOKENS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
