"""Learned features: the target is the base with a few features that were trained on the reasoning text.

No rate, text or direction is chosen by hand; gradients of the next-token loss with an L1 penalty decide what the
features read and write.
"""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor

from plants.plant import Ground, Plant
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import Batch
from tl_adapters.evaluation.feature_matching import target_inputs
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel

STEPS, LR, L1_WEIGHT, TOKENS_PER_BATCH = 300, 0.012, 0.002, 1024
"""Steps and peak learning rate of Adam, weight of the L1 in decoder-norm units, and tokens of a step."""
SMALLEST_SHARE = 1e-3
"""A feature that has less than this share of its layer's energy after training is left out of the target."""


def learned_features(ground: Ground, seed: int, steps: int = STEPS) -> Plant:
    """A target with ``per_layer`` features in every layer that were trained on the calibration text."""
    pair = ground.pair(copy.deepcopy(ground.base))
    features = pair.new_adapters(ground.per_layer, seed=seed)
    weights = [w for adapter in features for w in (adapter.W_enc, adapter.b_enc, adapter.W_dec)]  # b_dec stays 0
    optimizer = torch.optim.Adam(weights, lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = BatchOrder(TracesInMemory(ground.calibration), TOKENS_PER_BATCH, seed)
    loss = torch.zeros(())
    for step in range(steps):
        loss = _loss(pair, order[step].to(pair.device), L1_WEIGHT * min(1.0, 4 * (step + 1) / steps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    planted = ground.plant(features)
    left = _leave_out_small(planted, ground)
    pair = ground.plant(planted.planted)  # again, since its identity covers its features
    return Plant(pair, pair.planted, {"loss": float(loss.detach()), "features": left})


def _loss(pair: PairedModel, batch: Batch, l1_weight: float) -> Tensor:
    """The mean next-token loss over response tokens, and the weighted L1 per token."""
    with pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        final = pair.residual_streams(batch.tokens)[-1]
    row, position = batch.predicting_response.nonzero(as_tuple=True)
    logits = pair.unembed(final[row, position])
    loss = torch.nn.functional.cross_entropy(logits.float(), batch.tokens[row, position + 1])
    sizes = [acts[layer][batch.real] @ pair.mlps[layer].adapter.decoder_norms() for layer in range(pair.n_layers)]
    return loss + l1_weight * torch.stack([size.mean() for size in sizes]).sum()


@torch.no_grad()
def _leave_out_small(pair: PairedModel, ground: Ground) -> int:
    """Take features of little energy out of the planted ones; returns the number of those that are left."""
    features = pair.planted
    energy = torch.zeros(pair.n_layers, features.n_features)
    traces = random.Random(0).sample(list(ground.calibration), min(500, len(ground.calibration)))
    for inputs in target_inputs(pair, traces):
        energy += torch.stack([f.encode(x).square().sum(0) for f, x in zip(features, inputs, strict=True)]).float()
    energy *= features.decoder_norms().square()
    small = energy < SMALLEST_SHARE * energy.sum(1, keepdim=True)
    for adapter, out in zip(features, small, strict=True):
        adapter.W_enc[:, out], adapter.b_enc[out], adapter.W_dec[out] = 0.0, -1.0, 0.0
    return int((~small).sum())
