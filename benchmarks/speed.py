"""Ratios of running times: ``python benchmarks/speed.py``.

Compares the shared-prefix objective with the reference objective, fused with stock attention, and a TransformerBridge
with a HookedTransformer, on a random model of the model organism's size. The two sides are interleaved and the median
of the pairwise ratios is printed, because single times on a shared machine vary.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.random_models import random_batch, random_model, randomise

from tl_adapters.config import LossWeights
from tl_adapters.models.components import FusedAttention
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.objective import reference_step, shared_prefix_step

SIZE = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=5, vocab_size=280, max_position_embeddings=256)


def ratio(slow: Callable[[], object], fast: Callable[[], object], repeats: int = 7) -> str:
    """Median, minimum and maximum of time(slow) / time(fast) over interleaved repeats, as text."""
    slow(), fast()
    ratios = []
    for _ in range(repeats):
        times = []
        for run in (slow, fast):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    pair = PairedModel.from_pretrained(random_model(1, torch.float32, **SIZE), random_model(2, torch.float32, **SIZE))
    randomise(pair, n_features=512)
    weights = LossWeights()
    batch = random_batch(0, lengths=(64,) * 32, prompt=12, vocab=280)
    for cut in (1, 3, 5):
        speedup = ratio(
            lambda: reference_step(pair, batch, cut, weights, 0.01),
            lambda: shared_prefix_step(pair, batch, cut, weights, 0.01),
        )
        print(f"objective at cut {cut}: reference / shared prefixes = {speedup}")

    def attention(cls: type) -> Callable[[], object]:
        def run() -> None:
            for block in pair.model.blocks:
                block.attn.__class__ = cls
            with torch.no_grad():
                pair.model(tokens)

        return run

    for length in (64, 256):
        tokens = random_batch(0, lengths=(length,) * (2048 // length), vocab=280).tokens
        speedup = ratio(attention(FusedAttention.__mro__[1]), attention(FusedAttention))
        print(f"forward pass at {length} tokens: stock / fused attention = {speedup}")

    hf_models = (random_model(seed, torch.float32, **SIZE) for seed in (1, 2))
    bridged = randomise(PairedModel.from_pretrained(*hf_models, backend="bridge"), n_features=512)
    speedup = ratio(
        lambda: shared_prefix_step(bridged, batch, 3, weights, 0.01),
        lambda: shared_prefix_step(pair, batch, 3, weights, 0.01),
    )
    print(f"training step at cut 3: TransformerBridge / HookedTransformer = {speedup}")


if __name__ == "__main__":
    main()
