"""The cost of collecting features beside a forward pass alone: ``python benchmarks/features.py``.

A random model of the model organism's size with adapters of which some six features fire on a token and layer, as in
its own. A collection is whole: every batch, all counts and examples, and the files of the store. Beside it the same
batches run forward on the same route. Both take turns; given is the median over runs of their ratio. ``--record``
writes the block "collection" of results.json.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recorded import record, timing_options, value_and_range

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.random_models import random_model

from tl_adapters.data.traces import Trace
from tl_adapters.features.collect import collect_features
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import TARGET

D_MODEL, LAYERS, TOKENS, ROWS, BATCHES, L0 = 128, 5, 128, 16, 48, 6


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


def forward_seconds(pair: PairedModel, traces: list[Trace]) -> float:
    """Seconds of the forward passes of all batches."""
    began = time.perf_counter()
    with torch.no_grad(), pair.routed("replacement"):
        for start in range(0, len(traces), ROWS):
            tokens = torch.tensor([trace.tokens for trace in traces[start : start + ROWS]])
            pair.run_blocks(pair.embed(tokens), 0, LAYERS)
    return time.perf_counter() - began


def collection_seconds(pair: PairedModel, traces: list[Trace]) -> float:
    """Seconds of a collection into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        collect_features(
            pair, traces, Path(folder) / "store", options=StoreOptions(tokens_per_batch=ROWS * TOKENS), progress=False
        )
        return time.perf_counter() - began


def costs(n_features: int, repeats: int) -> list[float]:
    """The ratio of each run, after one that is not counted."""
    pair, generator = make_pair(n_features), torch.Generator().manual_seed(5)
    # Special tokens begin at 272; a text that begins with padding would be warned of.
    draw = lambda: tuple(torch.randint(1, 272, (TOKENS,), generator=generator).tolist())  # noqa: E731
    traces = [Trace(draw(), 8) for _ in range(ROWS * BATCHES)]
    runs = [(collection_seconds(pair, traces), forward_seconds(pair, traces)) for _ in range(repeats + 1)]
    return [collecting / alone for collecting, alone in runs[1:]]


def main() -> None:
    parser = timing_options(__doc__, "the block collection")
    parser.add_argument(
        "--features", nargs="+", type=int, default=[512], help="features per layer; 8192 take minutes a run"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    for n_features in options.features:
        runs = costs(n_features, options.repeats)
        found[str(n_features)] = value_and_range(statistics.median(runs), runs)
        print(f"{n_features:6,} features:", json.dumps(found[str(n_features)]), flush=True)
    if options.record:
        tokens = BATCHES * ROWS * TOKENS
        record("collection", {"repeats": options.repeats, "threads": options.threads, "tokens": tokens, "cost": found})


if __name__ == "__main__":
    main()
