"""The pass of an adapter over its active features beside that of whole products, by density:
``python benchmarks/active_features.py``.

One pass forward and backward of an adapter of width 256 on 512 tokens in float32, with the L1 term, of which a given
share of activations is above zero. Given are medians over the runs, which take turns, of the time of a pass over active
features over that of whole products; `active_features.LARGEST_DENSITY` is chosen where it is below 1 at both widths.
``--record`` writes the block "active_features" of results.json.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from recorded import record, timing_options, value_and_range
from torch import Tensor

from tl_adapters.adapters import active_features
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.training.loss_terms import l1_term

WIDTHS, DENSITIES = (1024, 8192), (0.002, 0.01, 0.03, 0.05, 0.1, 0.2)
D_MODEL, TOKENS = 256, 512


def adapter_of_density(n_features: int, density: float, x: Tensor) -> TranscoderAdapter:
    """A random adapter of which a share of the activations on ``x`` is above zero."""
    generator = torch.Generator().manual_seed(0)
    adapter = TranscoderAdapter(D_MODEL, n_features, generator=generator)
    with torch.no_grad():
        adapter.W_dec.normal_(generator=generator)
        pre = x.flatten(0, -2) @ adapter.W_enc
        adapter.b_enc.fill_(-float(pre.flatten().kthvalue(round((1 - density) * pre.numel())).values))
    adapter.lay_out_by_feature()
    return adapter


def seconds(adapter: TranscoderAdapter, x: Tensor, counted: Tensor, over_active: bool) -> float:
    """Seconds of a pass forward and backward."""
    adapter.over_active = over_active
    started = time.perf_counter()
    acts, output = adapter.run(x)
    (output.square().mean() + l1_term(acts, adapter.decoder_norms(acts), counted)).backward()
    return time.perf_counter() - started


def ratios(n_features: int, density: float, repeats: int) -> list[float]:
    """The ratio of each run, after one that is not counted."""
    x = torch.randn(1, TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1)).requires_grad_()
    counted = torch.ones(1, TOKENS, dtype=torch.bool)
    adapter = adapter_of_density(n_features, density, x.detach())
    runs = [[seconds(adapter, x, counted, over_active) for over_active in (True, False)] for _ in range(repeats + 1)]
    return [active / whole for active, whole in runs[1:]]


def main() -> None:
    parser = timing_options(__doc__, "the block active_features", repeats=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    active_features.LARGEST_DENSITY = 1.0
    found: dict[str, Any] = {}
    for n_features in WIDTHS:
        of_width = found[str(n_features)] = {}
        for density in DENSITIES:
            runs = ratios(n_features, density, options.repeats)
            of_width[str(density)] = value_and_range(statistics.median(runs), runs)
            print(n_features, density, json.dumps(of_width[str(density)]), flush=True)
    if options.record:
        record("active_features", {"repeats": options.repeats, "threads": options.threads, "ratio": found})


if __name__ == "__main__":
    main()
