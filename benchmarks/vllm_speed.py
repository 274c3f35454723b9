"""Tokens per second of vLLM with adapters, as a share of plain vLLM: ``python benchmarks/vllm_speed.py``.

A random Qwen2 model is served twice: its target by vLLM's own class, and every condition by ours. The two are measured
in turns, each in an engine of its own that stays loaded, and the median of the pairwise ratios is given with their
range. The aim of a condition with adapters is 0.9 / (1 + adapter weights / weights that a token reads without them).
Run it in the environment of `make vllm`; ``--record`` writes the part "vllm" of the block "generation" in results.json,
whose "value" is the share of the slowest condition with adapters.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from helpers.random_models import random_model, randomise
from recorded import record, value_and_range

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.model_files import tensor_shapes
from tl_adapters.interop.vllm_checkpoint import SERVED_ROUTES, to_vllm
from tl_adapters.interop.vllm_engine import CompletionRequest, LocalVllm
from tl_adapters.interventions.variants import without
from tl_adapters.models.paired_model import PairedModel

SIZE = dict(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=4_000, max_position_embeddings=512,
)  # fmt: skip
N_FEATURES = 512
MODEL = (
    "random Qwen2, {num_hidden_layers} layers, d_model {hidden_size}, d_mlp {intermediate_size}, vocabulary "
    "{vocab_size:,}, float32"
).format(**SIZE)
WITHOUT_ADAPTERS = ("target", "hybrid")
SEQUENCES, PROMPT, NEW_TOKENS = 8, 16, 64
WANTED = 0.9


def weights_read(exported: Path) -> tuple[int, int]:
    """Weights that a decoded token reads in the target (without the embedding's rows), and in the adapters."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(exported).items()}
    adapters = {name for name in sizes if ".adapter." in name and not name.endswith("factors")}
    own = {name for name in sizes if ".adapter." not in name and ".base." not in name and "embed_tokens" not in name}
    return sum(sizes[name] for name in own), sum(sizes[name] for name in adapters)


def rate(generate: Any) -> float:
    """Generated tokens per second."""
    start = time.perf_counter()
    n = sum(map(len, generate()))
    return n / (time.perf_counter() - start)


def measure(repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed, role in enumerate(("base", "target"), start=1):
            random_model(seed, torch.float32, **SIZE).save_pretrained(folder / role)
        pair = randomise(PairedModel.from_pretrained(folder / "base", folder / "target"), n_features=N_FEATURES)
        adapters = pair.installed_adapters()
        features = [FeatureId(layer, index) for layer in range(6) for index in range(0, N_FEATURES, 16)]
        variants = [*SERVED_ROUTES, without(features)]
        to_vllm(adapters, folder / "out", base=folder / "base", target=folder / "target", variants=variants)
        own, theirs = weights_read(folder / "out")
        del pair
        ours = LocalVllm(folder / "out")
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt

        plain = LLM(
            model=str(folder / "target"),
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=-1,
        )
        draw = torch.Generator().manual_seed(0)
        prompts = [torch.randint(1, 4_000, (PROMPT,), generator=draw).tolist() for _ in range(SEQUENCES)]
        requests = [CompletionRequest(prompt, NEW_TOKENS, 0.0, 1.0, 0, 0, []) for prompt in prompts]
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)

        def of_plain() -> list[Any]:
            inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
            return [o.outputs[0].token_ids for o in plain.generate(inputs, sampling, use_tqdm=False)]

        of_plain()
        shares: dict[str, list[float]] = {}
        rates: list[float] = []
        names = [one.slug for one in variants]
        for _ in range(repeats):
            for name in names:
                ours.generate(name, requests[:1])
                plain_rate = rate(of_plain)
                rates.append(plain_rate)
                share = rate(lambda name=name: ours.generate(name, requests)) / plain_rate
                shares.setdefault(name, []).append(share)
                print(f"{name}: {share:.2f} of {plain_rate:.0f} tokens/s", flush=True)
        ours.close()
        wanted = WANTED / (1 + theirs / own)
        summed = {name: value_and_range(statistics.median(values), values) for name, values in shares.items()}
        with_adapters = [share for name, share in summed.items() if name not in WITHOUT_ADAPTERS]
        return {
            **min(with_adapters, key=lambda share: share["value"]),
            "model": MODEL,
            "plain_tokens_per_second": statistics.median(rates),
            "weights_per_token": own,
            "adapter_weights": theirs,
            "wanted_with_adapters": wanted,
            "repeats": repeats,
            "sequences": SEQUENCES,
            "share_of_plain": summed,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="write generation.vllm of results.json")
    options = parser.parse_args()
    found = measure(options.repeats)
    print(f"plain vLLM: {found['plain_tokens_per_second']:.0f} tokens/s")
    print(f"wanted with adapters: {found['wanted_with_adapters']:.2f} of it")
    for name, share in found["share_of_plain"].items():
        print(f"{name}: {share['value']:.2f} ({share['range'][0]:.2f} to {share['range'][1]:.2f})")
    if options.record:
        record("generation.vllm", found)


if __name__ == "__main__":
    main()
