"""The cost of collecting features, relative to a forward pass alone: python benchmarks/features.py [n_features ...]

A random model of the model organism's size with adapters of which some six features fire on a token and layer, as in
its own. Both sides run the same batches on the same route; the ratio is the median over batches. The first batches,
in which every firing may still be among the strongest, are reported apart: in a run of millions of tokens they do not
matter.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.random_models import random_model

from tl_adapters.data.trace_regions import TRACE_REGIONS
from tl_adapters.data.traces import Trace
from tl_adapters.features.document_batches import token_batch
from tl_adapters.features.firing_counts import FiringCounts
from tl_adapters.features.firing_reader import FiringReader
from tl_adapters.features.store_description import StoreDescription, StoreOptions
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import TARGET

D_MODEL, LAYERS, TOKENS, ROWS, BATCHES, L0 = 128, 5, 128, 16, 24, 6


def make_pair(n_features: int) -> PairedModel:
    from transformers import AutoTokenizer

    shape = dict(
        hidden_size=D_MODEL, intermediate_size=320, num_hidden_layers=LAYERS, vocab_size=279,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    models = [random_model(seed, torch.float32, **shape) for seed in (1, 2)]
    pair = PairedModel.from_pretrained(*models, tokenizer=AutoTokenizer.from_pretrained(TARGET))
    pair.model.tokenizer = AutoTokenizer.from_pretrained(TARGET)
    adapters = pair.new_adapters(n_features, seed=3)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 279, (2, TOKENS), generator=generator)
    with torch.no_grad():
        for layer, adapter in enumerate(adapters):  # biases so that L0 features fire on a token
            adapter.W_dec.copy_(torch.randn(adapter.W_dec.shape, generator=generator) * 0.02)
            with pair.routed("replacement"), pair.recorded("mlp.adapter.hook_sae_acts_pre") as pre:
                pair.run_blocks(pair.embed(tokens), 0, LAYERS)
            kept = pre[layer].flatten()
            adapter.b_enc -= kept.kthvalue(int(len(kept) * (1 - L0 / n_features))).values
    return pair


def main(widths: list[int]) -> None:
    for n_features in widths:
        pair = make_pair(n_features)
        options = StoreOptions(tokens_per_batch=ROWS * TOKENS)
        description = StoreDescription.of(pair, "feature", "replacement", "bench", options, ())
        reader = FiringReader(pair, description)
        generator = torch.Generator().manual_seed(5)
        draw = lambda: tuple(torch.randint(1, 279, (TOKENS,), generator=generator).tolist())  # noqa: E731
        traces = [Trace(draw(), 8) for _ in range(ROWS * BATCHES)]
        codes = [[TRACE_REGIONS.index("question")] * 8 + [TRACE_REGIONS.index("thinking")] * (TOKENS - 8)] * len(traces)
        counts = FiringCounts(description, 1)
        alone, collecting = [], []
        for number in range(BATCHES):
            batch = token_batch(traces, codes, range(ROWS * number, ROWS * (number + 1)), [""])
            for side in (alone, collecting):
                began = time.perf_counter()
                with torch.no_grad():
                    if side is alone:
                        with pair.routed("replacement"):
                            pair.run_blocks(pair.embed(batch.tokens), 0, LAYERS)
                    else:
                        counts.add(batch, reader.read(batch))
                side.append(time.perf_counter() - began)
        ratio = median(c / a for c, a in zip(collecting[8:], alone[8:], strict=True))
        firings = int(counts.firings.sum()) / (BATCHES * ROWS * TOKENS * LAYERS)
        first = sum(collecting[:8]) / sum(alone[:8])
        print(
            f"{n_features:6,} features: {ratio:.2f} times a forward pass alone ({first:.2f} in the first eight); "
            f"L0 {firings:.1f}, {ROWS * TOKENS / median(collecting):,.0f} tokens per second"
        )


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [512, 8192])
