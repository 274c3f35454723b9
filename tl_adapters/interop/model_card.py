"""The model card of an adapter set, as the Hugging Face hub displays it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import INPUT_HOOKS, OUTPUT_HOOKS
from tl_adapters.interop.saelens import require_saelens_class
from tl_adapters.utils.html import interval_text

CARD_FILE = "README.md"
_PAPER = "https://arxiv.org/abs/2602.20904"


def card(adapters: AdapterSet, repo_id: str) -> str:
    """Return the model card: what the adapters are, how to load them, what was measured, and which weights they fit.

    Args:
        adapters: the set as it is pushed.
        repo_id: "user/name", which the examples of code load.

    Raises:
        AdapterFormatError: adapters that `push_to_hub` refuses.
    """
    require_saelens_class(adapters)
    about = adapters.metadata
    base, target = about.base or "BASE", about.target or "TARGET"
    return f"""---
{_front_matter(about)}
---

# Transcoder adapters: {target} against {base}

At every layer a sparse transcoder that is *added* to the base's MLP and reproduces what training changed in the
target's ([method]({_PAPER})). {len(adapters)} of {adapters.n_layers} layers, {adapters.n_features:,} features each,
d_model {adapters.d_model}, {_ACTIVATIONS[about.activation].format(about.k)}. Made with tl_adapters.

{_loading_section(adapters, repo_id, base, target)}

## Measured

{_measurements_table(about.figures)}

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
[arXiv 2602.20904]({_PAPER}).
"""


_ACTIVATIONS = {
    "relu": "relu",
    "jumprelu": "JumpReLU with a learned threshold per feature",
    "batchtopk": "{} features per token on average (BatchTopK: a threshold per layer since training ended)",
}
_SAELENS_CLASSES = {"relu": "Transcoder", "jumprelu": "JumpReLUTranscoder", "batchtopk": "JumpReLUTranscoder"}
_VALID_FOR = {
    "normalized": "That tensor is the same on models as they are, with folded norms, and fully processed.",
    "mlp_input": "That is right only on models without folded norms (`from_pretrained_no_processing`).",
}
"""By what the adapters read: the models on which their input hook holds the right tensor."""


def _front_matter(about: AdapterMetadata) -> str:
    """Return the YAML by which the hub indexes the repository."""
    entries: dict[str, Any] = {
        "library_name": "tl_adapters",
        "tags": ["transformer-lens", "saelens", "transcoder", "interpretability", "model-diffing", "arxiv:2602.20904"],
    }
    if models := [name for name in (about.target, about.base) if _is_hub_name(name)]:
        entries["base_model"] = models
    if datasets := [name for name in about.datasets if _is_hub_name(name)]:
        entries["datasets"] = datasets
    return str(yaml.safe_dump(entries, sort_keys=False)).strip()


def _loading_section(adapters: AdapterSet, repo_id: str, base: str, target: str) -> str:
    """Return how to load the adapters with this package and with SAELens."""
    about, layer = adapters.metadata, adapters.layer_indices[-1]
    reads, writes = INPUT_HOOKS[about.reads].format(layer), OUTPUT_HOOKS[about.writes].format(layer)
    return f"""```python
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

is a stock {_SAELENS_CLASSES[about.activation]} that reads `{reads}` and writes
`{writes}`. {_VALID_FOR[about.reads]} Without tl_adapters it gives activations, not the
replacement: a model has that output hook only while adapters are attached to it, and on any other `add_sae` logs a
warning and changes nothing. The features were trained on the {about.stream}'s residual stream; on the target's own
stream their activations differ a little."""


def _measurements_table(measurements: Mapping[str, Any]) -> str:
    if not measurements:
        return "Nothing yet: `tl-adapters evaluate RUN` measures, and pushing the run writes it here."
    rows = ["| figure | value | 95 % interval | unit | on |", "|---|---|---|---|---|"]
    for name, measurement in measurements.items():
        if isinstance(measurement, Mapping):
            value = "-" if measurement.get("value") is None else f"{measurement['value']:.4g}"
            interval = measurement.get("reason", "") if value == "-" else interval_text(measurement, "{:.4g}".format)
            data = f"{measurement.get('split', '')}, n = {measurement.get('n', '')}"
            unit = measurement.get("unit", "")
            rows.append(f"| {_table_cell(name)} | {value} | {_table_cell(interval)} | {unit} | {data} |")
        else:
            rows.append(f"| {_table_cell(name)} | {_table_cell(measurement)} | | | |")
    return "\n".join(rows)


def _is_hub_name(name: str) -> bool:
    """Return whether ``name`` is a repository's name ("user/name") and not a folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def _table_cell(value: object) -> str:
    return str(value).replace("|", "\\|")
