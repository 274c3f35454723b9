"""Dashboards by sae-dashboard, for those who know features by that page.

1. Adapters become stock SAELens transcoders that read ``blocks.N.ln2.hook_normalized`` (`to_saelens`).
2. sae-dashboard runs them on the pair's own model, on the route of the stream that is asked for.
3. It is handed, as unembedding, what the layer's MLP output does to the logits (`effects`): the final norm's weight is
   in it, which sae-dashboard itself leaves out on a model whose weights are not processed.

sae-dashboard takes documents of one length only: longer ones are cut and shorter ones left out. Our own pages
(`feature_pages`) show whole documents, open offline and need nothing else.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.saelens_folder import INPUT_HOOKS
from tl_adapters.adapters.set_folder import LAYER_FOLDER
from tl_adapters.data.traces import DataError, Trace, readable_traces
from tl_adapters.errors import UserError
from tl_adapters.features.feature import ResidualStream
from tl_adapters.features.logit_effects import logit_effects
from tl_adapters.interop.saelens import to_saelens
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.files import new_folder, require_absent

INSTALL = (
    "pip install --no-deps sae-dashboard==0.8.0 eindex-callum==0.1.2 dataclasses-json==0.6.7 marshmallow==3.26.2 "
    "typing-inspect==0.9.0 mypy-extensions"
)
"""Beside tl-adapters[saelens]. Its own pins ask for older libraries, with which nothing here runs; with today's, and
what else it imports, it runs as it is."""
_SHORTEST = 32
"""sae-dashboard takes 20 examples, none of them from the five tokens at either end of a document."""


class DashboardError(UserError, ValueError):
    """A dashboard that cannot be made."""


def require_dashboard() -> None:
    """Raises DashboardError, with the line that installs it, where sae-dashboard is missing."""
    if find_spec("sae_dashboard") is None:
        raise DashboardError(f"sae-dashboard is not installed here. Beside tl-adapters[saelens]: {INSTALL}")


def write_sae_dashboard(
    pair: PairedModel,
    traces: Sequence[Trace],
    ids: Iterable[FeatureId | tuple[int, int]],
    folder: str | Path,
    *,
    stream: ResidualStream = "replacement",
    length: int | None = None,
    tokens_per_batch: int = 4096,
) -> list[Path]:
    """Write sae-dashboard's page of features, one per layer ("layer_3.html"), d3 and plotly within it.

    Args:
        pair: with adapters; a HookedTransformer with a tokenizer.
        traces: what is read. Activations of 2,000 documents of 1,000 tokens take 8 MB a feature.
        ids: the features; those of one layer share a page.
        folder: must not exist.
        stream: whose residual stream is read.
        length: tokens of each document; longer ones are cut, shorter ones left out. None takes the median.
        tokens_per_batch: tokens in a forward pass.

    Returns:
        The pages.

    Raises:
        DashboardError: sae-dashboard is not installed (with the line that installs it), the model is a
            TransformerBridge, there are no features, or none of that number, or a topk adapter.
        DataError: no document is so long.
        FolderExistsError, DiskFullError.
    """
    require_dashboard()
    require_absent(folder)
    traces = readable_traces(traces, pair.model.cfg)
    adapters = pair.installed_adapters()
    if pair.backend.name != "hooked":
        raise DashboardError("sae-dashboard stops within the model, which a TransformerBridge does not; use 'hooked'.")
    if adapters.metadata.activation == "topk":
        raise DashboardError("SAELens has no topk transcoder, and sae-dashboard reads SAELens's; see feature_pages.")
    ids = list(ids)
    adapters.require_own(ids)
    wanted = _by_layer(ids)
    for layer, indices in wanted.items():
        if layer not in adapters.layer_indices or not 0 <= indices[0] <= indices[-1] < adapters.n_features:
            raise DashboardError(
                f"There are no such features in layer {layer}: {indices}. The adapters have {adapters.n_features} in "
                f"each of the layers {adapters.layer_indices}."
            )
    tokens = _rectangle(traces, length)
    rows = max(1, tokens_per_batch // tokens.shape[1])
    with tempfile.TemporaryDirectory() as exported, new_folder(folder) as partial, pair.routed(stream):
        to_saelens(adapters, Path(exported) / "adapters")
        for layer, indices in wanted.items():
            path = Path(exported) / "adapters" / LAYER_FOLDER.format(layer)
            page = partial / f"{LAYER_FOLDER.format(layer)}.html"
            _write_layer(pair, layer, indices, path, tokens, rows, page)
    return [Path(folder) / f"{LAYER_FOLDER.format(layer)}.html" for layer in wanted]


def _by_layer(ids: Iterable[FeatureId | tuple[int, int]]) -> dict[int, list[int]]:
    wanted: dict[int, list[int]] = {}
    for layer, index in sorted({FeatureId(*feature) for feature in ids}):
        wanted.setdefault(layer, []).append(index)
    if not wanted:
        raise DashboardError("No features were given; name some, for instance store.ids()[:20].")
    return wanted


def _rectangle(traces: Sequence[Trace], length: int | None) -> Int[Tensor, "documents length"]:
    """The first tokens of every document that has so many."""
    lengths = [len(trace.tokens) for trace in traces]
    if length is None:
        length = median_low(lengths) if lengths else 0
    rows = [trace.tokens[:length] for trace in traces if len(trace.tokens) >= length]
    if not rows or length < _SHORTEST:
        raise DataError(
            f"No page can be made of {len(rows)} documents of {length} tokens; the longest of {len(lengths)} has "
            f"{max(lengths, default=0)}, and at least {_SHORTEST} are needed."
        )
    return torch.tensor(rows)


class _Model:
    """The pair's model as sae-dashboard reads it, with the unembedding that belongs to a layer's MLP output."""

    def __init__(self, model: Any, unembedding: Float[Tensor, "d_model d_vocab"]) -> None:
        self.W_U, self.tokenizer, self.cfg = unembedding, model.tokenizer, model.cfg
        self.hook_dict, self.run_with_hooks = model.hook_dict, model.run_with_hooks


def _write_layer(
    pair: PairedModel, layer: int, indices: list[int], exported: Path, tokens: Tensor, rows: int, page: Path
) -> None:
    writing, config, running = (
        import_module(f"sae_dashboard.{name}") for name in ("data_writing_fns", "sae_vis_data", "sae_vis_runner")
    )
    device = str(pair.model.cfg.device)
    unembedding = logit_effects(pair, layer, torch.eye(pair.model.cfg.d_model))
    settings = config.SaeVisConfig(
        hook_point=INPUT_HOOKS["normalized"].format(layer), features=indices, minibatch_size_tokens=rows, device=device
    )
    encoder = import_module("sae_lens").SAE.load_from_disk(str(exported), device=device)
    data = running.SaeVisRunner(settings).run(encoder, _Model(pair.model, unembedding), tokens)
    writing.save_feature_centric_vis(data, page)
    page.write_text(_offline(page.read_text(encoding="utf-8")), encoding="utf-8")


def _offline(page: str) -> str:
    """The page with the two libraries that it would load from the network written into it, licences included."""
    viewer, plotly = (
        files("tl_adapters.pages") / "templates" / "graph_viewer",
        files("plotly") / "package_data" / "plotly.min.js",
    )
    licence, d3 = ((viewer / name).read_text(encoding="utf-8") for name in ("d3.LICENSE", "d3.min.js"))
    libraries = {"d3js.org": f"/*\n{licence}*/\n{d3}", "cdn.plot.ly": plotly.read_text(encoding="utf-8")}
    # A function gives what is written, for a text given instead would have its backslashes read.
    return re.sub(
        r'<script src="https://(d3js\.org|cdn\.plot\.ly)/[^"]*">', lambda found: f"<script>{libraries[found[1]]}", page
    )
