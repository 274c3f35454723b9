"""Pairs in which a circuit is known because it was put there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers.random_models import random_batch, random_model
from transformers import PreTrainedModel

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.circuits.onsets import Onsets
from tl_adapters.circuits.search import SearchOptions
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel

WORD = 5
TEMPLATE, OUTPUT = FeatureId(1, 5), FeatureId(3, 7)
"""The planted circuit: the template writes what the output feature reads, and that writes the word."""
N_FEATURES, N_VOCAB = 20, 12
LENGTHS = (17, 9, 13, 15, 11)


def drawing(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *n: torch.randn(n, generator=generator, dtype=torch.float64)


def word_direction(base: PreTrainedModel) -> torch.Tensor:
    reads = (base.lm_head.weight * base.model.norm.weight).detach()
    return torch.nn.functional.normalize(reads[WORD] - reads.mean(0), dim=0)


def quiet_layers() -> list[TranscoderAdapter]:
    """Adapters whose features fire, and write next to nothing."""
    draw, layers = drawing(3), [TranscoderAdapter(32, N_FEATURES, dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        for adapter in layers:
            adapter.W_enc.copy_(draw(32, N_FEATURES) * 0.3)
            adapter.b_enc.copy_(draw(N_FEATURES) * 0.3)
            adapter.W_dec.copy_(draw(N_FEATURES, 32) * 0.003)
            adapter.b_dec.copy_(draw(32) * 0.01)
    return layers


def pair_with(
    base: PreTrainedModel, layers: list[TranscoderAdapter], features: list[FeatureId], backend: str = "hooked"
) -> tuple[PairedModel, Onsets]:
    """The base and the base with the layers planted, and adapters that are them. Moments are where features fire."""
    pair = PairedModel.plant(base, AdapterSet(layers), backend=backend)
    adapters = pair.new_adapters(N_FEATURES, dtype=torch.float64)
    with torch.no_grad():
        for mine, its in zip(adapters.parameters(), AdapterSet(layers).parameters(), strict=True):
            mine.copy_(its)
    batch = random_batch(11, LENGTHS, vocab=N_VOCAB)
    predicting = batch.predicting_response
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        pair.model(batch.tokens)
    onset = predicting & torch.stack([acts[f.layer][..., f.index] > 0.3 for f in features]).any(0)
    continuation = torch.zeros_like(onset)
    continuation[:, 1:] = onset[:, :-1] & ~onset[:, 1:] & predicting[:, 1:]
    control = predicting & ~onset & ~continuation & (torch.arange(onset.shape[1]) % 3 != 0)
    return pair, Onsets(batch.tokens, predicting, onset, control, continuation, (WORD,))


def planted(backend: str = "hooked") -> tuple[PairedModel, Onsets]:
    """A template that writes what an output feature reads, and that writes the word."""
    base, layers = random_model(1, vocab_size=N_VOCAB), quiet_layers()
    reads = (base.lm_head.weight * base.model.norm.weight).detach()
    onto, _ = torch.linalg.qr(reads.T)
    between = drawing(4)(32)
    between = torch.nn.functional.normalize(
        between - onto @ (onto.T @ between), dim=0
    )  # the unembedding is blind to it
    with torch.no_grad():
        layers[1].b_enc[5] = -0.4
        layers[1].W_dec[5] = 25 * between
        layers[3].W_enc[:, 7] = 2 * between / base.model.layers[3].post_attention_layernorm.weight
        layers[3].b_enc[7] = -1.5
        layers[3].W_dec[7] = 5 * word_direction(base)
    return pair_with(base, layers, [TEMPLATE], backend)


def random_onsets(seed: int = 3, vocab: int = 61) -> Onsets:
    """Places of every kind, drawn."""
    batch = random_batch(seed, LENGTHS, vocab=vocab)
    predicting = batch.predicting_response
    drawn = torch.randint(4, batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
    return Onsets(batch.tokens, predicting, *(predicting & (drawn == kind) for kind in range(3)), (WORD, 9))


def everything(pair: PairedModel) -> torch.Tensor:
    return torch.ones(pair.n_layers, pair.installed_adapters().n_features, dtype=torch.bool)


SMALL = SearchOptions(share=6 / (4 * N_FEATURES), further=1.0, per_round=2, strength=1.0)
