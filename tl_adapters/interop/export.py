"""Exports the adapters of a run, with their measurements, to the formats of other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.model_files import locate
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.interop.any_set import read_adapters
from tl_adapters.interop.authors_checkpoint import to_authors
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.interop.saelens import to_saelens
from tl_adapters.interop.vllm_checkpoint import to_vllm
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.weight_identity import trained_on
from tl_adapters.organism import BUILTIN_TEXT
from tl_adapters.utils.files import require_absent, require_writable
from tl_adapters.utils.printing import command
from tl_adapters.utils.results import RESULTS_FILE, read_results

ExportFormat = Literal["saelens", "authors", "hybrid", "target", "vllm"]


def load_adapters_with_measurements(name: str | Path, **options: Any) -> AdapterSet:
    """Return adapters; those of a run get its measurements and data set in their metadata.

    Args:
        name: a run folder, a folder of adapters, or a repository on the hub.
        options: as in `AdapterSet.from_pretrained`.

    Raises:
        UserError: a run whose training has not finished.
        AdapterFormatError, CheckpointError: there are no adapters under that name.
    """
    folder = Path(name)
    if not any((folder / file).is_file() for file in ("run.json", RESULTS_FILE)):
        return read_adapters(name, **options)
    if not (folder / "adapters").is_dir():
        raise UserError(f"{folder} has no adapters yet; continue its training with: {command('train', resume=folder)}")
    adapters = AdapterSet.from_pretrained(folder / "adapters", **options)
    results, about = read_results(folder), adapters.metadata
    own_data = [RunConfig.of_run(folder).data.source or BUILTIN_TEXT]
    adapters.metadata = replace(
        about,
        figures={**about.figures, **_card_measurements(results)},
        datasets=about.datasets if "opened" in results else own_data,  # an opened set was trained elsewhere
    )
    return adapters


def _card_measurements(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measurements of a run's results.json that a model card shows; a run that was only trained has none."""
    measurements: dict[str, Any] = {}
    if faithfulness := results.get("faithfulness"):
        measurements["KL(target || hybrid)"] = faithfulness["kl"]["hybrid"]
        measurements["KL(target || replacement)"] = faithfulness["kl"]["replacement"]
        measurements["same likeliest token"] = faithfulness["top1_agreement"]
        for layer, l0 in enumerate(faithfulness["l0"]):
            measurements[f"L0, layer {layer}"] = l0
    for baseline, recovered in (results.get("behaviour") or {}).get("recovered", {}).items():
        measurements[f"accuracy recovered against the {baseline}"] = recovered
    return measurements


def export(
    name: str | Path,
    to: ExportFormat,
    folder: str | Path,
    *,
    reads: Literal["normalized", "mlp_input"] = "normalized",
    base: str | None = None,
    target: str | None = None,
    variants: Sequence[Variant] = (),
    spare: int = 0,
) -> None:
    """Write a run's adapters, or the models that they belong to, for other tools.

    Args:
        name: a run folder, a folder of adapters, or a repository on the hub.
        to: "saelens" (a SAELens folder per layer), "authors" (the replacement model in the format of the paper's
            authors), "hybrid" (the model to which additive transcoders are added, as a Hugging Face folder), "target"
            (the target as a Hugging Face folder, for adapters that read its stream) or "vllm" (what vLLM serves all
            routes and feature sets from, with our plugin).
        folder: must not exist.
        reads: for "saelens", as in `to_saelens`.
        base, target: names or folders of the models, if they are not where the adapters' metadata says.
        variants, spare: for "vllm", feature sets that are served beside the routes, as in `to_vllm`.

    Raises:
        PairMismatchError: models with other weights than those that the adapters were trained on.
        UserError: an unknown format, models that are not known, or the target of planted features, which no Hugging
            Face folder can hold; and the errors of the formats. Nothing incomplete remains.
    """
    formats = get_args(ExportFormat)
    if to not in formats:
        raise UserError(f"No format {to!r}; there are {', '.join(formats)}.")
    require_absent(folder)
    require_writable(folder)
    adapters = load_adapters_with_measurements(name)
    if to == "saelens":
        to_saelens(adapters, folder, reads=reads)
        return
    about = adapters.metadata
    if "planted" in about.fingerprints:
        if to in ("target", "vllm"):
            raise UserError(
                "The target of these adapters is its base with planted features, which a gated MLP cannot hold: there "
                "is no Hugging Face folder of it. PairedModel.plant(base, planted) makes it, from the planted "
                "features' own folder."
            )
        target = target or base or about.base  # everything but the MLPs is the base's own
    models = {"base": base or about.base, "target": target or about.target}
    if missing := [role for role, model in models.items() if not model]:
        raise UserError(f"The adapters do not say what their {' and '.join(missing)} are; name them.")
    _require_recorded_weights(adapters, models)
    if to == "authors":
        to_authors(adapters, folder, base=models["base"], target=models["target"])
    elif to == "vllm":
        to_vllm(adapters, folder, base=models["base"], target=models["target"], variants=variants, spare=spare)
    else:
        write_hybrid(folder, base=models["base"] if to == "hybrid" else None, target=models["target"])


def _require_recorded_weights(adapters: AdapterSet, models: Mapping[str, str]) -> None:
    """Raise PairMismatchError where base or target have other weights than those that the adapters were trained on."""
    for role, name in models.items():
        if "planted" in adapters.metadata.fingerprints and role == "target":
            continue  # its weights are in no folder
        if trained_on(adapters, role, locate(name)) is False:
            raise PairMismatchError(
                f"{name} has other weights than the {role} that the adapters were trained on, which they name "
                f"{getattr(adapters.metadata, role) or 'nowhere'}. Give that {role} with --{role}."
            )
