"""A dry run at the full shape of DeepSeek-R1-Distill-Qwen-7B with 8,192 features a layer, without its weights.

    python examples/r1_distill_7b/dry_run.py --meta      on any machine: every tensor has a shape and no value
    python examples/r1_distill_7b/dry_run.py --random    on a GPU of 80 GB: random weights, a few random texts

``--meta`` builds the pair with its adapters, runs every route and one step of the objective, and prints what the
planner predicts for training and for the stages of study.py. ``--random`` measures faithfulness, makes a graph and
searches a circuit on random tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.fx.experimental._config as fx_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from large_pair import ShapesOnly, install_adapters, random_documents, random_pair, random_tokens
from sizes import L0, LONGEST, predictions

from tl_adapters.attribution.attribute import attribute
from tl_adapters.circuits.onsets import Onsets
from tl_adapters.circuits.search import SearchOptions, search_circuit
from tl_adapters.config import LossWeights
from tl_adapters.data.traces import collate
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.objective import shared_prefix_step

SHAPE, FEATURES, GB = "7b", 8192, 1e9


def on_meta(shape: str, n_features: int) -> None:
    """Build the pair without values, run it once, and print the predictions."""
    fx_config.meta_nonzero_assume_all_nonzero = True  # shapes that depend on values are those of the largest case
    pair = ShapesOnly(shape, LONGEST, n_features)
    tokens = torch.zeros(1, 256, dtype=torch.long, device="meta")
    for route in ("target", "hybrid", "replacement"):
        with torch.no_grad(), pair.routed(route):
            print(f"{route}: logits {tuple(pair.model(tokens).shape)}")
    batch = collate(random_documents(pair, 1, 256)).to("meta")
    shared_prefix_step(pair, batch, pair.n_layers // 2, LossWeights(), 0.001)
    print("a step of the objective: done")
    for name, gigabytes in predictions(shape, n_features).items():
        print(f"{name}: {gigabytes:.1f} GB predicted")


def on_device(shape: str, n_features: int, device: torch.device, length: int) -> None:
    """Random weights: faithfulness, a graph and the search of a circuit on a few random texts."""
    pair: PairedModel = random_pair(shape, device, LONGEST)
    print(f"pair: {_gigabytes(device)}; {install_adapters(pair, n_features, L0):.2f} features a token and layer")
    documents = random_documents(pair, 4, length)
    _timed("faithfulness", device, lambda: measure_faithfulness(pair, documents))
    prompt = random_tokens(pair, 1, length)[0]
    _timed("graph", device, lambda: attribute(pair, prompt, max_feature_nodes=64, progress=False))
    ids = random_tokens(pair, 4, length)
    onset, control, after = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(3))
    onset[:, 100::200], control[:, ::200], after[:, 101::200] = True, True, True
    onsets = Onsets(ids, torch.ones_like(onset), onset, control, after, (7,))
    alive = torch.ones(pair.n_layers, n_features, dtype=torch.bool)
    options = replace(SearchOptions(method="sampled", parts=2, rounds=4), share=min(1.0, 100 / alive.numel()))
    _timed("search", device, lambda: search_circuit(pair, onsets, alive, options, progress=False))


def _timed(name: str, device: torch.device, act: Callable[[], object]) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    act()
    print(f"{name}: {time.perf_counter() - started:.1f} s, {_gigabytes(device)}")


def _gigabytes(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated() / GB:.1f} GB" if device.type == "cuda" else "memory is not counted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--meta", action="store_true", help="shapes alone, on any machine")
    how.add_argument("--random", action="store_true", help="random weights, on a GPU")
    parser.add_argument("--shape", default=SHAPE, help="7b, 14b, 1.5b, or tiny to try the script itself")
    parser.add_argument("--features", type=int, default=FEATURES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=2_000, help="length of the texts of --random")
    args = parser.parse_args()
    if args.meta:
        on_meta(args.shape, args.features)
    else:
        on_device(args.shape, args.features, torch.device(args.device), args.tokens)


if __name__ == "__main__":
    main()
