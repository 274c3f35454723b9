"""Feature pages made by the sae-dashboard package.

1. The adapters are exported as stock SAELens transcoders that read ``blocks.N.ln2.hook_normalized`` (`to_saelens`).
2. sae-dashboard runs them on the pair's own model, on the route of the chosen stream.
3. As unembedding it gets the effect of the layer's MLP output on the logits (`logit_effects`). That includes the final
   norm's weight, which sae-dashboard itself omits for a model whose weights are not processed.

sae-dashboard takes documents of one length: longer ones are cut, and shorter ones left out. The pages of this package
(`feature_pages`) show whole documents and need no further package.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from jaxtyping import Float, Int
from markupsafe import Markup
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
from tl_adapters.utils.files import new_folder, require_absent, temporary_folder, write_text, writing
from tl_adapters.utils.html import render

INSTALL_COMMAND = (
    "pip install --no-deps sae-dashboard==0.8.0 eindex-callum==0.1.2 dataclasses-json==0.6.7 marshmallow==3.26.2 "
    "typing-inspect==0.9.0 mypy-extensions"
)
"""Installs sae-dashboard beside tl-adapters[saelens]. Its own version pins require older libraries, with which this
package does not run; with current ones, and the further packages named here, it runs unchanged."""
_MIN_LENGTH = 32
"""Tokens of the shortest documents: sae-dashboard takes 20 examples, and none from the five tokens at either end."""


_STYLE_START, _STYLE_END, _SCRIPT_START, _SCRIPT_END = "<style>", "</style>", "<script>", "</script>"
_DATA_START = '{"AGGDATA"'
"""What begins and ends the parts of sae-dashboard's page."""
_TOKENS_IN_HTML = ("<code>${tok}</code>", "|${tok}|<br>")
"""Where its script writes a token into HTML."""


class DashboardError(UserError, ValueError):
    """The dashboard cannot be made."""


def require_dashboard() -> None:
    """Raise DashboardError, with the command that installs it, if sae-dashboard is not installed."""
    if find_spec("sae_dashboard") is None:
        raise DashboardError(
            f"sae-dashboard is not installed. Install it beside tl-adapters[saelens]: {INSTALL_COMMAND}"
        )


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
    """Write sae-dashboard's pages of features, one per layer ("layer_3.html"), with d3 and plotly inlined.

    Args:
        pair: a pair with adapters, whose model is a HookedTransformer with a tokenizer.
        traces: the documents. The activations of 2,000 documents of 1,000 tokens take 8 MB per feature.
        ids: the features; those of one layer share a page.
        folder: must not exist.
        stream: the residual stream that the features read.
        length: tokens of each document; longer ones are cut, shorter ones left out. None takes the median.
        tokens_per_batch: tokens in one forward pass.

    Returns the paths of the pages.

    Raises:
        DashboardError: sae-dashboard is not installed (the message holds the command that installs it), the model is a
            TransformerBridge, no features or features that the adapters do not have, or topk adapters.
        DataError: no document is long enough.
        FolderExistsError, DiskFullError.
    """
    require_dashboard()
    require_absent(folder)
    traces = readable_traces(traces, pair.model.cfg)
    _require_public(traces)
    adapters = pair.installed_adapters()
    if pair.backend.name != "hooked":
        raise DashboardError(
            "sae-dashboard stops a forward pass inside the model, which a TransformerBridge cannot; use 'hooked'."
        )
    if adapters.metadata.activation == "topk":
        raise DashboardError(
            "sae-dashboard reads SAELens transcoders, and SAELens has none for topk; use write_feature_pages."
        )
    ids = list(ids)
    adapters.require_own(ids)
    indices_by_layer = _by_layer(ids)
    for layer, indices in indices_by_layer.items():
        if layer not in adapters.layer_indices or not 0 <= indices[0] <= indices[-1] < adapters.n_features:
            raise DashboardError(
                f"There are no such features in layer {layer}: {indices}. The adapters have {adapters.n_features} in "
                f"each of the layers {adapters.layer_indices}."
            )
    tokens = _equal_length_documents(traces, length)
    documents_per_batch = max(1, tokens_per_batch // tokens.shape[1])
    with temporary_folder() as exported, new_folder(folder) as partial, pair.routed(stream):
        to_saelens(adapters, exported / "adapters")
        for layer, indices in indices_by_layer.items():
            transcoder = exported / "adapters" / LAYER_FOLDER.format(layer)
            page = partial / f"{LAYER_FOLDER.format(layer)}.html"
            _write_layer_page(pair, layer, indices, transcoder, tokens, documents_per_batch, page)
    return [Path(folder) / f"{LAYER_FOLDER.format(layer)}.html" for layer in indices_by_layer]


def _require_public(traces: Sequence[Trace]) -> None:
    """Raise DashboardError for documents whose text is not to be republished."""
    if withheld := sum(not trace.republish for trace in traces):
        raise DashboardError(
            f"{withheld} of {len(traces)} documents are not to be republished, and sae-dashboard shows all texts. "
            "Leave them out, or use write_feature_pages, which leaves out their text."
        )


def _by_layer(ids: Iterable[FeatureId | tuple[int, int]]) -> dict[int, list[int]]:
    """Return the sorted indices of the features of each layer."""
    indices_by_layer: dict[int, list[int]] = {}
    for layer, index in sorted({FeatureId(*feature) for feature in ids}):
        indices_by_layer.setdefault(layer, []).append(index)
    if not indices_by_layer:
        raise DashboardError("No features were given; name some, for instance store.ids()[:20].")
    return indices_by_layer


def _equal_length_documents(traces: Sequence[Trace], length: int | None) -> Int[Tensor, "documents length"]:
    """Return the first ``length`` tokens of every document that has as many."""
    lengths = [len(trace.tokens) for trace in traces]
    if length is None:
        length = median_low(lengths) if lengths else 0
    rows = [trace.tokens[:length] for trace in traces if len(trace.tokens) >= length]
    if not rows or length < _MIN_LENGTH:
        raise DataError(
            f"No page can be made of {len(rows)} documents of {length} tokens; the longest of {len(lengths)} has "
            f"{max(lengths, default=0)}, and at least {_MIN_LENGTH} are needed."
        )
    return torch.tensor(rows)


class _Model:
    """The part of a model that sae-dashboard uses, with the unembedding that belongs to a layer's MLP output."""

    def __init__(self, model: Any, unembedding: Float[Tensor, "d_model d_vocab"]) -> None:
        self.W_U, self.tokenizer, self.cfg = unembedding, model.tokenizer, model.cfg
        self.hook_dict, self.run_with_hooks = model.hook_dict, model.run_with_hooks


def _write_layer_page(
    pair: PairedModel,
    layer: int,
    indices: list[int],
    transcoder: Path,
    tokens: Int[Tensor, "documents length"],
    documents_per_batch: int,
    page: Path,
) -> None:
    vis_files, config, running = (
        import_module(f"sae_dashboard.{name}") for name in ("data_writing_fns", "sae_vis_data", "sae_vis_runner")
    )
    device = str(pair.model.cfg.device)
    unembedding = logit_effects(pair, layer, torch.eye(pair.model.cfg.d_model))
    settings = config.SaeVisConfig(
        hook_point=INPUT_HOOKS["normalized"].format(layer),
        features=indices,
        minibatch_size_tokens=documents_per_batch,
        device=device,
    )
    encoder = import_module("sae_lens").SAE.load_from_disk(str(transcoder), device=device)
    data = running.SaeVisRunner(settings).run(encoder, _Model(pair.model, unembedding), tokens)
    with writing(page):
        vis_files.save_feature_centric_vis(data, page)
    write_text(page, _safe_page(page.read_text(encoding="utf-8")))


def _safe_page(page: str) -> str:
    """Return sae-dashboard's page with its two libraries inlined, its tokens escaped, and a content security policy.

    sae-dashboard would load the libraries from the network, and writes tokens into a script and into HTML as they are.

    Raises DashboardError if the page is not built as that of the version that INSTALL_COMMAND installs.
    """
    try:
        start = page.index(_DATA_START)
        _, end = json.JSONDecoder().raw_decode(page, start)
        columns, _, rest = page[:start].partition(_STYLE_START)
        style, _, rest = rest.partition(_STYLE_END)
        script = rest[rest.rindex(_SCRIPT_START) + len(_SCRIPT_START) :]
        # Inside JSON "<" occurs in strings only, where its escape means the same and ends no script.
        script += page[start:end].replace("<", "\\u003c") + page[end : page.rindex(_SCRIPT_END)]
    except ValueError as error:
        raise DashboardError(
            f"The page of sae-dashboard is not as expected. Install the tested version: {INSTALL_COMMAND}"
        ) from error
    for written in _TOKENS_IN_HTML:
        script = script.replace(written, written.replace("${tok}", "${tokenHtml(tok)}"))
    plotly = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    parts = {"columns": columns, "style": style, "script": script, "plotly": plotly}
    return render("sae_dashboard/dashboard.html.j2", page={name: Markup(text) for name, text in parts.items()})
