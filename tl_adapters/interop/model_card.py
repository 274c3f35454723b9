"""The model card of a set of adapters, as the hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.saelens_folder import HOOK_IN, HOOK_OUT
from tl_adapters.interop.saelens import require_transcoder
from tl_adapters.utils.html import interval_text

CARD_FILE = "README.md"
PAPER = "https://arxiv.org/abs/2602.20904"


def card(adapters: AdapterSet, repo_id: str) -> str:
    """The model card: what they are, how to load them, what was measured, and what they do not do.

    Raises AdapterFormatError for what `push_to_hub` does not push.
    """
    require_transcoder(adapters)
    about = adapters.metadata
    base, target = about.base or "BASE", about.target or "TARGET"
    head: dict[str, Any] = {
        "library_name": "tl_adapters",
        "tags": ["transformer-lens", "saelens", "transcoder", "interpretability", "model-diffing", "arxiv:2602.20904"],
    }
    if models := [name for name in (about.target, about.base) if _is_hub_name(name)]:
        head["base_model"] = models
    if datasets := [name for name in about.datasets if _is_hub_name(name)]:
        head["datasets"] = datasets
    layer = adapters.layer_indices[-1]
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# Transcoder adapters: {target} against {base}

At every layer a sparse transcoder that is *added* to the base's MLP and reproduces what training changed in the
target's ([method]({PAPER})). {len(adapters)} of {adapters.n_layers} layers, {adapters.n_features:,} features each,
d_model {adapters.d_model}, {_ACTIVATIONS[about.activation].format(about.k)}. Made with tl_adapters.

```python
from tl_adapters import AdapterSet, PairedModel

pair = PairedModel.from_pretrained(base="{base}", target="{target}")
pair.load_adapters(AdapterSet.from_pretrained("{repo_id}"))
with pair.routed("replacement") as model:  # the target's attention, the base's MLPs, and these adapters
    logits, cache = model.run_with_cache("...")  # cache["blocks.{layer}.mlp.adapter.hook_sae_acts_post"]
```

## With SAELens

```python
from sae_lens import SAE

transcoder = SAE.from_pretrained("{repo_id}", "layer_{layer}")
```

is a stock {_CLASSES[about.activation]} that reads `{HOOK_IN[about.reads].format(layer)}` and writes
`{HOOK_OUT[about.writes].format(layer)}`. {_READS[about.reads]} Without tl_adapters it gives activations, not the
replacement: a model has that output hook only while adapters are attached to it, and on any other `add_sae` logs a
warning and changes nothing. The features were trained on the {about.stream}'s residual stream; on the target's own
stream their activations differ a little.

## Measured

{_figures_table(about.figures)}

## Which weights

| | name | revision | fingerprint |
|---|---|---|---|
| base (its MLPs) | {base} | {about.base_revision or ""} | {about.fingerprints.get("base_mlps", "")} |
| target | {target} | {about.target_revision or ""} | {about.fingerprints.get("target", "")} |
| adapters | {repo_id} | | {adapters.fingerprint} |

A feature is a layer and an index *of these adapters*: other seeds number them anew. Trained on
{", ".join(about.datasets) or "data that was not recorded"}.

## Citation

The method is from Hu, Ward, Icard and Potts, *Transcoder Adapters for Reasoning-Model Diffing*,
[arXiv 2602.20904]({PAPER}).
"""


_ACTIVATIONS = {
    "relu": "relu",
    "jumprelu": "JumpReLU with a learned threshold per feature",
    "batchtopk": "{} features per token on average (BatchTopK: a threshold per layer since training ended)",
}
_CLASSES = {"relu": "Transcoder", "jumprelu": "JumpReLUTranscoder", "batchtopk": "JumpReLUTranscoder"}
_READS = {
    "normalized": "That tensor is the same on models as they are, with folded norms, and fully processed.",
    "mlp_input": "That is right only on models without folded norms (`from_pretrained_no_processing`).",
}


def _figures_table(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "Nothing yet: `tl-adapters evaluate RUN` measures, and pushing the run writes it here."
    rows = ["| figure | value | 95 % interval | unit | on |", "|---|---|---|---|---|"]
    for name, figure in figures.items():
        if isinstance(figure, Mapping):
            value = "-" if figure.get("value") is None else f"{figure['value']:.4g}"
            interval = figure.get("reason", "") if value == "-" else interval_text(figure, "{:.4g}".format)
            where = f"{figure.get('split', '')}, n = {figure.get('n', '')}"
            rows.append(f"| {_cell(name)} | {value} | {_cell(interval)} | {figure.get('unit', '')} | {where} |")
        else:
            rows.append(f"| {_cell(name)} | {_cell(figure)} | | | |")
    return "\n".join(rows)


def _is_hub_name(name: str) -> bool:
    """ "user/name", and no folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")
