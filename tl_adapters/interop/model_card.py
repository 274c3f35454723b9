"""The model card of an adapter set, as the Hugging Face hub displays it, and its picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup
from matplotlib.figure import Figure

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import INPUT_HOOKS, OUTPUT_HOOKS
from tl_adapters.adapters.set_folder import LAYER_FOLDER
from tl_adapters.interop.saelens import require_saelens_class
from tl_adapters.utils.html import interval_text, render

CARD_FILE = "README.md"
PICTURE_FILE = "measured.png"
"""The card's picture, beside it."""
_PAPER = "https://arxiv.org/abs/2602.20904"


def card(
    adapters: AdapterSet, repo_id: str, licenses: Mapping[str, str] | None = None, license: str | None = None
) -> str:
    """Return the model card: what the adapters are, how to load them, what was measured, and which weights they fit.

    Args:
        adapters: the set as it is pushed. Its card shows `picture`, where there is one.
        repo_id: "user/name", which the examples of code load.
        licenses: of base, target and data (`licenses.licenses_of`); None says that they were not looked up.
        license: of the adapters themselves, by its identifier on the hub; None says that none is stated.

    Raises:
        AdapterFormatError: adapters that `push_to_hub` refuses.
    """
    require_saelens_class(adapters)
    about, layer = adapters.metadata.published(), adapters.layer_indices[-1]
    return str(
        render(
            "model_card/card.md.j2",
            front_matter=Markup(_front_matter(about, license)),
            paper=Markup(_PAPER),
            adapters=adapters,
            about=about,
            repo_id=repo_id,
            base=about.base or "an unnamed base",
            target=about.target or "an unnamed target",
            models=Markup(_models_to_name(about)),
            activation=_ACTIVATIONS[about.activation].format(about.k),
            saelens_class=_SAELENS_CLASSES[about.activation],
            hook=f"blocks.{layer}.mlp.adapter.hook_sae_acts_post",
            layer_name=LAYER_FOLDER.format(layer),
            reads=Markup(INPUT_HOOKS[about.reads].format(layer)),
            writes=Markup(OUTPUT_HOOKS[about.writes].format(layer)),
            valid_for=Markup(_VALID_FOR[about.reads]),
            rows=_measurement_rows(about.figures),
            meanings=[Markup(meaning) for names, meaning in _MEANINGS.items() if _any_begins(about.figures, names)],
            picture=PICTURE_FILE if _panels(about.figures) else None,
            license=license,
            licenses=licenses or {},
            datasets=", ".join(about.datasets),
        )
    )


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


_MEANINGS = {
    "KL(target || hybrid)": "**KL(target || hybrid)**: the difference to be explained. The hybrid is the target with "
    "the base's MLPs; 0 would mean that training changed nothing in the MLPs.",
    "KL(target || replacement)": "**KL(target || replacement)**: what of it is left with the adapters beside "
    "the base's MLPs; 0 would be the target itself.",
    "same likeliest token": "**Same likeliest token**: the share of tokens after which target and replacement find the "
    "same token likeliest.",
    "L0": "**L0**: active features per token. Fewer are easier to read, and explain less.",
    "accuracy recovered": "**Accuracy recovered**: (replacement - baseline) / (target - baseline). Where the hybrid "
    "only fails to open its thinking, this says little about the features.",
}
"""Beginning of a measurement's name -> what it means."""


def _any_begins(measurements: Mapping[str, Any], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in measurements)


def _models_to_name(about: AdapterMetadata) -> str:
    """Return the arguments of `load` for the models that the set does not name so that the hub finds them."""
    named = {"base": about.base, "target": about.target}
    return "".join(f', {role}="{role.upper()}"' for role, name in named.items() if not _is_hub_name(name))


def _front_matter(about: AdapterMetadata, license: str | None) -> str:
    """Return the YAML by which the hub indexes the repository."""
    entries: dict[str, Any] = {
        **({"license": license} if license else {}),
        "library_name": "tl_adapters",
        "tags": ["transformer-lens", "saelens", "transcoder", "interpretability", "model-diffing", "arxiv:2602.20904"],
    }
    if models := [name for name in (about.target, about.base) if _is_hub_name(name)]:
        entries["base_model"] = models
    if datasets := [name for name in about.datasets if _is_hub_name(name)]:
        entries["datasets"] = datasets
    return str(yaml.safe_dump(entries, sort_keys=False)).strip()


def _measurement_rows(measurements: Mapping[str, Any]) -> list[list[str]]:
    """Return name, value, interval, unit and data of each measurement."""
    rows = []
    for name, measurement in measurements.items():
        if not isinstance(measurement, Mapping):
            rows.append([name, str(measurement), "", "", ""])
            continue
        value, interval = "-", str(measurement.get("reason") or "")
        if measurement.get("value") is not None:
            value = f"{measurement['value']:.4g}"
            interval = interval_text(measurement, "{:.4g}".format)
        data = f"{measurement.get('split', '')}, n = {measurement.get('n', '')}"
        rows.append([name, value, interval, str(measurement.get("unit", "")), data])
    return rows


def picture(adapters: AdapterSet) -> bytes | None:
    """Return the card's picture as a PNG: KL without and with the adapters, and L0 by layer, with their intervals.

    None where the set's metadata holds neither.
    """
    panels = _panels(adapters.metadata.figures)
    if not panels:
        return None
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(4.2 * len(panels), 2.8), dpi=150, layout="constrained", facecolor="white")
        for axes, (label, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            values = [value for value, _, _ in bars.values()]
            errors = [
                [max(0, v - low) for v, low, _ in bars.values()],
                [max(0, high - v) for v, _, high in bars.values()],
            ]
            drawn = axes.bar(range(len(bars)), values, color="#3a8fc8", yerr=errors, ecolor="#000000", capsize=3)
            if len(bars) <= _LABELED_BARS:
                axes.bar_label(drawn, fmt="{:.3g}", padding=2)
                axes.margins(y=0.15)
            shown = range(0, len(bars), math.ceil(len(bars) / _LABELED_BARS))
            axes.set_xticks(list(shown), [list(bars)[i] for i in shown])
            axes.set_ylabel(label)
            if label == _L0_LABEL:
                axes.set_xlabel("layer")
            axes.spines[["top", "right"]].set_visible(False)
        written = io.BytesIO()
        figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


_LABELED_BARS = 8
"""Of more bars not all are labeled, so that labels stay apart."""
_KL_LABEL, _L0_LABEL = "KL, nats per token", "active features per token"


def _panels(figures: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return the panels of the picture by their label: name of a bar -> value, and the ends of its interval."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {_KL_LABEL: {}, _L0_LABEL: {}}
    for name, figure in figures.items():
        kind, _, layer = name.partition("L0, layer ")
        route = name.removeprefix("KL(target || ").removesuffix(")")
        if isinstance(figure, Mapping) and (value := _finite(figure.get("value"))) is not None:
            low, high = (value if (end := _finite(figure.get(key))) is None else end for key in ("low", "high"))
            if not kind and layer.isdecimal():
                found[_L0_LABEL][layer] = (value, low, high)
            elif route in ("hybrid", "replacement"):
                found[_KL_LABEL][route] = (value, low, high)
    return {label: bars for label, bars in found.items() if len(bars) > 1}


def _finite(value: Any) -> float | None:
    """Return a finite number as it is, and None for anything else, since a set's figures may be anybody's."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _is_hub_name(name: str | None) -> bool:
    """Return whether ``name`` is a repository's name ("user/name") and not a folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None and name.count("/") == 1 and not Path(name).exists()
