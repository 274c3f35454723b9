"""The time that a pair takes to open beside that of its two models in transformers: ``python benchmarks/opening.py``.

Opened are the model organism and a random pair in a temporary folder, of 6 layers, d_model 256, d_mlp 1,024 and a
vocabulary of 32,768 in float32 (`training_step`), both as `tl_adapters.load` opens them: with the tokenizer, the
adapters, and the comparison of all layers with the Hugging Face models. Beside it `from_pretrained` loads the same two
models and the target's tokenizer. Both take turns; given is the median over runs of their ratio, with its range.
``--record`` writes the block "opening" of results.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from large_pair import random_models
from recorded import record, timing_options, value_and_range
from training_step import CPU, Size, configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_adapters import organism
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.by_name import load

RANDOM = Size(vocab=32768)
"""The random pair, and the features of its adapters."""
ORGANISM_FEATURES = 128
"""Features of the model organism's adapters."""


def write_random_pair(folder: Path, size: Size) -> tuple[Path, Path]:
    """Write base and target of a random pair with the organism's tokenizer; returns their folders."""
    models = random_models(configuration(size), CPU, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(organism.TARGET)
    base, target = folder / "base", folder / "target"
    for path, model in zip((base, target), models, strict=True):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return base, target


def write_adapters(folder: Path, base: Path, target: Path, n_features: int) -> Path:
    """Write new adapters of a pair; returns their folder."""
    pair = PairedModel.from_pretrained(base, target, device="cpu")
    pair.new_adapters(n_features).save_pretrained(folder)
    return folder


def in_transformers(base: Path, target: Path) -> object:
    """The two models and the target's tokenizer, as transformers loads them."""
    return [AutoModelForCausalLM.from_pretrained(path) for path in (base, target)], AutoTokenizer.from_pretrained(
        target
    )


def seconds(act: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def opening(adapters: Path, base: Path, target: Path, repeats: int) -> dict[str, Any]:
    """What is recorded of a pair: runs that take turns, after one that is not counted."""
    runs = [
        (
            seconds(lambda: load(adapters, base=str(base), target=str(target), device="cpu")),
            seconds(lambda: in_transformers(base, target)),
        )
        for _ in range(repeats + 1)
    ][1:]
    ratios = [ours / theirs for ours, theirs in runs]
    taken = statistics.median(ours for ours, _ in runs)
    return {"over_transformers": value_and_range(statistics.median(ratios), ratios), "seconds": taken}


def main() -> None:
    options = timing_options(__doc__, "the block opening").parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        pairs = {
            "organism": ((Path(organism.BASE), Path(organism.TARGET)), ORGANISM_FEATURES),
            "random": (write_random_pair(folder, RANDOM), RANDOM.features),
        }
        for name, (models, n_features) in pairs.items():
            adapters = write_adapters(folder / f"{name}-adapters", *models, n_features)
            found[name] = opening(adapters, *models, options.repeats)
            print(name, json.dumps(found[name]), flush=True)
    if options.record:
        record("opening", {"repeats": options.repeats, "threads": options.threads, "pairs": found})


if __name__ == "__main__":
    main()
