"""RelP rows compared with autograd per target on one retained graph: ``python benchmarks/attribution.py``.

The model has 6 layers, d_model 256, 2,048 features, 48 tokens and about 1,200 active features, and both are
timed in turn in one run. Then the time of a graph of a 2,000-token prompt at the model organism's size is measured
(max_feature_nodes 1,000). ``--record`` writes the block "attribution" of results.json.
"""

import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from recorded import record, timing_options, value_and_range

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.random_models import random_batch, random_model, randomise
from helpers.relp_by_hooks import relp_hooks

from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.gradient import GradientModel
from tl_adapters.attribution.relp import LinearizedModel
from tl_adapters.models.paired_model import PairedModel

SIZE = dict(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=1024, max_position_embeddings=2048,
)  # fmt: skip
DEMO = SIZE | dict(hidden_size=128, intermediate_size=320, num_hidden_layers=5, num_attention_heads=4, vocab_size=280)


def sparse_pair(size: dict[str, int], n_features: int, tokens: torch.Tensor, active: int) -> PairedModel:
    """A random pair whose encoder biases leave about ``active`` features active on ``tokens``."""
    pair = PairedModel.from_pretrained(random_model(1, torch.float32, **size), random_model(2, torch.float32, **size))
    randomise(pair, n_features=n_features)
    per_layer = active // pair.n_layers
    for layer, adapter in enumerate(pair.installed_adapters()):
        with torch.no_grad():
            adapter.W_dec.mul_(0.05)
        adapter.b_enc.data.zero_()
        pre = LinearizedModel(pair, tokens).pre_activations[layer]
        adapter.b_enc.data.fill_(-float(pre.flatten().topk(per_layer).values[-1]))
    return pair


def against_autograd(repeats: int) -> dict[str, Any]:
    """Speed of rows by hand over that of autograd, batched and per target."""
    tokens = random_batch(0, lengths=(48,), vocab=1024).tokens[0]
    pair = sparse_pair(SIZE, 2048, tokens, 1200)
    model, autograd = LinearizedModel(pair, tokens), GradientModel(pair, tokens, relp_hooks(pair.model))
    ratios: dict[str, list[float]] = {"speed_per_target": [], "speed": []}
    for layer in (2, 4, 5):
        active = model.active[model.active[:, 0] == layer][:64]
        vectors = model.encoders[layer][:, active[:, 2]].T
        for _ in range(repeats):
            began = time.perf_counter()
            ours = model.rows([layer] * len(active), active[:, 1], vectors)
            middle = time.perf_counter()
            for i in range(len(active)):
                theirs = autograd.rows([layer], active[i : i + 1, 1], vectors[i : i + 1])
            last = time.perf_counter()
            autograd.rows([layer] * len(active), active[:, 1], vectors)
            ratios["speed_per_target"].append((last - middle) / (middle - began))
            ratios["speed"].append((time.perf_counter() - last) / (middle - began))
        assert torch.allclose(ours.tokens[-1:], theirs.tokens, atol=1e-3)  # rounding may switch a feature on or off
    found = {name: value_and_range(statistics.median(values), values) for name, values in ratios.items()}
    return {"active_features": len(model.active), **found}


def long_prompt() -> dict[str, Any]:
    """Seconds and size of a graph of 2,000 tokens."""
    tokens = random_batch(0, lengths=(2000,), vocab=280).tokens[0]
    pair = sparse_pair(DEMO, 512, tokens, 40_000)
    began = time.perf_counter()
    graph = attribute(pair, tokens, max_feature_nodes=1000, progress=False)
    seconds = time.perf_counter() - began
    about = {"active_features": graph.about["active_features"], "edges": len(graph.weights)}
    return {"seconds": seconds, "residual": graph.residual, **about}


def main() -> None:
    parser = timing_options(__doc__, "the block attribution")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("tl_adapters").setLevel(logging.INFO)
    found = {**against_autograd(options.repeats), "tokens_2000": long_prompt()}
    print(json.dumps(found))
    if options.record:
        record("attribution", {"repeats": options.repeats, "threads": options.threads, **found})


if __name__ == "__main__":
    main()
