"""What the stages take at the full shapes of published models, by the planner: ``python benchmarks/sizes.py --record``.

Nothing is run and no weights are read; `planner.py` and `gpu.py` compare the planner with runs.
"""

from __future__ import annotations

import argparse

import torch
from large_pair import ShapesOnly, configuration
from recorded import record, recorded

from tl_adapters.attribution.attribute import default_batch_size, estimated_memory
from tl_adapters.circuits.search import SearchMethod, SearchOptions
from tl_adapters.config import LocalConfig, RunConfig, TrainingConfig
from tl_adapters.study.run_size import estimate_search, estimate_size

L0, LONGEST, GB = 1.4, 10_240, 1e9
"""Active features per token and layer, positions of the models, and bytes of a gigabyte."""
TEXTS, TOKENS, CHOSEN = 120, 7_800, 5_000
"""Texts of the search of a circuit, their length, and the features that it chooses."""
NODES = 5_000
"""Feature nodes of a graph, whose edges are in the host's memory."""
SEARCHES: tuple[SearchMethod, ...] = ("greedy", "sampled")
"""The methods that search by rounds."""
FEATURES = {"1.5b": 4096, "7b": 8192, "14b": 8192}
"""Shape -> features per layer."""


def predictions(shape: str, n_features: int) -> dict[str, float]:
    """GB of memory that each stage takes, by the planner."""
    described, pair = configuration(shape, LONGEST), ShapesOnly(shape, LONGEST, n_features)
    cuda = torch.device("cuda")
    sampled = SearchOptions(method="sampled")
    search = estimate_search(described, n_features, CHOSEN, TEXTS, TOKENS, sampled, "bfloat16", cuda)
    found = {}
    for tokens in (4_000, 10_000):
        for recompute in (False, True):
            training = TrainingConfig(
                stages=("end_to_end",), n_features=n_features, tokens_per_batch=tokens, recompute=recompute
            )
            size = estimate_size(RunConfig(dtype="bfloat16", training=training), described, tokens, cuda)
            blocks = "blocks computed again" if recompute else "blocks kept"
            found[f"a step of the objective, {tokens:,} tokens, {blocks}"] = size.memory / GB
    local = LocalConfig(streaming=True, max_tokens=16_384, tokens_per_step=2_048)
    training = TrainingConfig(stages=("local",), n_features=n_features, local=local)
    size = estimate_size(RunConfig(dtype="bfloat16", training=training), described, 2_048, cuda)
    found["the streaming local stage, 16,384 tokens kept"] = size.memory / GB
    for tokens in (2_000, 6_000):
        active = round(L0 * pair.n_layers * tokens)
        beside = estimated_memory(pair, tokens, active, default_batch_size(pair, tokens), NODES)
        found[f"an attribution graph of {tokens:,} tokens"] = (search.models + beside) / GB
    found[f"a circuit of {CHOSEN:,} features, {TEXTS} texts of {TOKENS:,} tokens"] = search.memory / GB
    return found


def search_hours() -> dict[str, dict[str, float]]:
    """The operations of a search at 7B by its method, and its hours at the rates that forward passes had on the GPU."""
    described, cuda, n_features = configuration("7b", LONGEST), torch.device("cuda"), FEATURES["7b"]
    forward = (recorded("gpu") or {})["steps"]["forward"]
    one = estimate_search(described, n_features, 1, 1, forward["tokens"], dtype="bfloat16", device=cuda)
    hybrid, replacement = (forward["seconds"][f"{route}, adapters in float32"] for route in ("hybrid", "replacement"))
    rates = {
        "model": one.model_operations / one.passes / hybrid,
        "adapter": one.adapter_operations / one.passes / (replacement - hybrid),
    }
    found = {}
    for method in SEARCHES:
        options = SearchOptions(method=method)
        size = estimate_search(described, n_features, CHOSEN, TEXTS, TOKENS, options, "bfloat16", cuda)
        operations = {"model": size.model_operations, "adapter": size.adapter_operations}
        hours = sum(operations[part] / rates[part] for part in rates) / 3600
        about = {
            f"{part}_{what}": value[part]
            for what, value in (("operations", operations), ("rate", rates))
            for part in rates
        }
        found[method] = {"rounds": size.rounds, **about, "hours": hours}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results.json")
    args = parser.parse_args()
    found = {shape: predictions(shape, n_features) for shape, n_features in FEATURES.items()}
    for shape, stages in found.items():
        for name, gigabytes in stages.items():
            print(f"{shape}: {name}: {gigabytes:.1f} GB")
    hours = search_hours()
    for method, search in hours.items():
        print(f"7b: search, {method}: {search['hours']:.1f} hours, {search}")
    if args.record:
        record("sizes", {"features": FEATURES, "predicted_gb": found, "search": hours})


if __name__ == "__main__":
    main()
