"""Is what the planner predicts what a run takes? ``python benchmarks/planner.py``: a grid of runs on the CPU.

Each cell is one thing that is done once in a process of its own, on a random pair of one shape: a step of the paper's
objective, the attribution graph of a prompt, or a round of the search of a circuit. Its peak of memory beside what was
there before and its seconds stand beside what the planner predicts from the shapes alone. ``--record`` writes the cells
to results.json, beside those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from large_pair import install_adapters, pair_of_configuration, random_documents, random_tokens
from recorded import record, recorded
from resources import measured
from transformers import AutoConfig, Qwen2Config

from tl_adapters.attribution.attribute import attribute, default_batch_size, estimated_memory, estimated_seconds
from tl_adapters.circuits.onsets import Onsets
from tl_adapters.circuits.search import SearchOptions, search_circuit
from tl_adapters.config import LocalConfig, RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.local_stage.train_local import train_local
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import BASE, reasoning_pairs
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.study.run_size import estimate_search, estimate_size
from tl_adapters.training.end_to_end_stage import EndToEndStage
from tl_adapters.utils.devices import seconds_of

Cell = dict[str, Any]
GRID: dict[str, Cell] = {
    "train": dict(do="train", layers=6, d_model=256, features=2048, tokens=2048),
    "train, recompute": dict(do="train", layers=6, d_model=256, features=2048, tokens=2048, recompute=True),
    "train, more layers": dict(do="train", layers=12, d_model=256, features=2048, tokens=2048),
    "train, wider": dict(do="train", layers=6, d_model=512, features=2048, tokens=2048),
    "train, more tokens": dict(do="train", layers=6, d_model=256, features=2048, tokens=6144),
    "train, more tokens, recompute": dict(
        do="train", layers=6, d_model=256, features=2048, tokens=6144, recompute=True
    ),
    "train, more features": dict(do="train", layers=6, d_model=256, features=8192, tokens=2048),
    "local stage, built-in pair": dict(do="local", layers=5, d_model=128, features=128, tokens=200_000, steps=1500),
    "local stage, fewer features": dict(do="local", layers=5, d_model=128, features=64, tokens=100_000, steps=1500),
    "local stage, streaming": dict(
        do="local", layers=5, d_model=128, features=128, tokens=32_768, steps=1000, streaming=True
    ),
    "attribute, 1,000 tokens": dict(do="attribute", layers=5, d_model=128, features=512, tokens=1000),
    "attribute, 3,000 tokens": dict(do="attribute", layers=5, d_model=128, features=512, tokens=3000),
    "attribute, 6,000 tokens": dict(do="attribute", layers=5, d_model=128, features=512, tokens=6000),
    "attribute, wider": dict(do="attribute", layers=6, d_model=512, features=2048, tokens=1000),
    "search": dict(do="search", layers=6, d_model=256, features=2048, tokens=1024, texts=8),
    "search, long texts": dict(do="search", layers=12, d_model=256, features=2048, tokens=6144, texts=2),
}
"""What is measured: the shape of the pair, and of the text."""
L0 = 3.0
"""Active features per token and layer; where adapters train half of all are active, as when training begins."""
ROWS, TARGETS = 256, 64
"""Feature nodes of an attribution graph, and targets at its last position, which are one whole batch of rows."""
VOCABULARY = 4096


def configuration(cell: Cell) -> Qwen2Config:
    """The shape of a cell's target."""
    d_model = cell["d_model"]
    return Qwen2Config(
        hidden_size=d_model, intermediate_size=4 * d_model, num_hidden_layers=cell["layers"], vocab_size=VOCABULARY,
        num_attention_heads=d_model // 32, num_key_value_heads=2, max_position_embeddings=8192, rms_norm_eps=1e-6,
        tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"], dtype="float32",
    )  # fmt: skip


def train(cell: Cell, pair: PairedModel) -> Cell:
    """Two steps of the objective, with Adam, whose moments are in memory from the first on; seconds of one."""
    tokens, training = cell["tokens"], TrainingConfig(
        stages=("end_to_end",), n_features=cell["features"], tokens_per_batch=cell["tokens"], steps=2,
        recompute=cell.get("recompute", False),
    )  # fmt: skip
    (size,) = estimate_size(RunConfig(training=training), configuration(cell), tokens).stages
    order = BatchOrder(TracesInMemory(random_documents(pair, 2, tokens)), tokens, 0)
    stage = EndToEndStage(pair, order, training)
    found = measured(lambda: [stage.advance(False) for _ in range(2)])._asdict()
    found["seconds"] /= 2
    weights = sum(parameter.nbytes for parameter in pair.installed_adapters().parameters())  # were there before
    return {**found, "predicted_bytes": size.memory - weights, "operations": size.operations / 2}


def local(cell: Cell, pair: PairedModel) -> Cell:
    """The local stage on the built-in pair, from its collection to its end, with revisions and polish."""
    options = LocalConfig(steps=cell["steps"], max_tokens=cell["tokens"], streaming=cell.get("streaming", False))
    training = TrainingConfig(stages=("local",), n_features=cell["features"], local=options)
    (size,) = estimate_size(RunConfig(training=training), AutoConfig.from_pretrained(BASE)).stages
    text = encode_traces(reasoning_pairs("train", 20_000, 0), pair.model.tokenizer, pair.model.cfg.n_ctx)
    found = measured(lambda: train_local(pair, text, training, options, progress=False))._asdict()
    weights = sum(parameter.nbytes for parameter in pair.installed_adapters().parameters())  # were there before
    return {**found, "predicted_bytes": size.memory - weights, "predicted_seconds": size.seconds(pair.device)}


def graph(cell: Cell, pair: PairedModel) -> Cell:
    """An attribution graph; its time is predicted for the layers of the features that it found."""
    tokens = random_tokens(pair, 1, cell["tokens"])[0]
    graphs: list[Any] = []
    targets = list(range(TARGETS))
    found = measured(
        lambda: graphs.append(attribute(pair, tokens, targets, max_feature_nodes=ROWS, progress=False))
    )._asdict()
    active = graphs[0].about["active_features"]
    at_once, layers = default_batch_size(pair, len(tokens)), [pair.n_layers] * TARGETS
    layers += graphs[0].features[:, 0].tolist()  # in a random model nearly all are of the first layer
    return {
        **found,
        "predicted_bytes": estimated_memory(pair, len(tokens), active, at_once, ROWS + TARGETS),
        "predicted_seconds": estimated_seconds(pair, len(tokens), len(tokens), layers, at_once),
        "active_features": active,
    }


def search(cell: Cell, pair: PairedModel) -> Cell:
    """Two rounds of a search; the planner's roles and edges are left out of the time."""
    texts, tokens = cell["texts"], cell["tokens"]
    ids = random_tokens(pair, texts, tokens)
    onset, control, after = (torch.zeros(texts, tokens, dtype=torch.bool) for _ in range(3))
    onset[:, tokens // 2 :: 64], control[:, 32::64], after[:, tokens // 2 + 1 :: 64] = True, True, True
    onsets = Onsets(ids, torch.ones_like(onset), onset, control, after, (7,))
    alive = torch.ones(pair.n_layers, cell["features"], dtype=torch.bool)
    options = SearchOptions(share=8 / alive.numel(), further=1.0, per_round=4, tokens_per_batch=4096)
    found = measured(lambda: search_circuit(pair, onsets, alive, options, progress=False))._asdict()
    size = estimate_search(configuration(cell), cell["features"], 8, texts, tokens, options, "float32")
    kept_for_roles = 4 * pair.n_layers * max(tokens, 4096 // tokens * tokens) * cell["features"]  # for roles only
    operations = (size.model_operations + size.adapter_operations) * size.search_passes / size.passes
    return {**found, "predicted_bytes": size.activations - kept_for_roles, "operations": operations}


def run_cell(cell: Cell) -> Cell:
    """Make the pair of a cell, and measure it."""
    torch.set_num_threads(1)
    if cell["do"] == "local":  # whose time depends on how many features are alive, so that a random pair says nothing
        pair = load_organism_pair(device="cpu")
    else:
        pair = pair_of_configuration(configuration(cell), torch.device("cpu"), torch.float32)
    install_adapters(pair, cell["features"], cell["features"] / 2 if cell["do"] == "train" else L0)
    found = {"train": train, "local": local, "attribute": graph, "search": search}[cell["do"]](cell, pair)
    if "operations" in found:
        found["predicted_seconds"] = seconds_of(found.pop("operations"), pair.device)
    return {
        **cell,
        **found,
        "memory_ratio": found["predicted_bytes"] / found["bytes"],
        "time_ratio": found["predicted_seconds"] / found["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=list(GRID), help="some of the cells, by name")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="write all cells to benchmarks/results.json")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(run_cell(GRID[args.cell])))
        return
    # Large tensors are then given back when they are freed, so that the peak is that of what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, Cell] = {}
    for name in args.cells:
        command = [sys.executable, __file__, "--cell", name]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found[name] = cell = json.loads(out.splitlines()[-1])
        print(
            f"{name}: {cell['predicted_bytes'] / 1e9:.2f} GB predicted, {cell['bytes'] / 1e9:.2f} measured "
            f"({cell['memory_ratio']:.2f}); {cell['predicted_seconds']:.1f} s predicted, {cell['seconds']:.1f} "
            f"measured ({cell['time_ratio']:.2f})",
            flush=True,
        )
    if args.record:
        before = (recorded("planner") or {}).get("cells", {})
        record("planner", {"cells": {name: {**before, **found}[name] for name in GRID if name in {**before, **found}}})


if __name__ == "__main__":
    main()
