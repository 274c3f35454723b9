"""What of a run is given away: its adapters with the figures that were measured, in the format asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from tl_adapters.adapters.adapter_set import METADATA_FILE, AdapterSet
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.interop.authors_checkpoint import to_authors
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.interop.saelens import to_saelens
from tl_adapters.utils.files import require_absent
from tl_adapters.utils.results import read_results

Format = Literal["saelens", "authors", "hybrid", "target"]
FORMATS: tuple[str, ...] = get_args(Format)


def adapters_of(name: str | Path, **options: Any) -> AdapterSet:
    """The adapters of a run with its figures and data in their metadata, or those of a folder or repository.

    Args:
        name: a run folder, a folder of adapters, or a repository of the hub.
        options: as `AdapterSet.from_pretrained`.

    Raises:
        UserError: a run that has not come to its end.
        AdapterFormatError, CheckpointError: no adapters there.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file() or (folder / METADATA_FILE).is_file():
        return AdapterSet.from_pretrained(name, **options)
    if not (folder / "adapters").is_dir():
        raise UserError(f"{folder} has no adapters yet; its run goes on with: tl-adapters train --resume {folder}")
    adapters = AdapterSet.from_pretrained(folder / "adapters", **options)
    source = RunConfig.load(folder / "config.json").data.source
    adapters.metadata = replace(
        adapters.metadata,
        figures={**adapters.metadata.figures, **measured_figures(read_results(folder))},
        datasets=[source or "the built-in pair's text"],
    )
    return adapters


def measured_figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run's results.json that a model card shows; none for a run that was only trained."""
    figures: dict[str, Any] = {}
    if faithfulness := results.get("faithfulness"):
        figures["KL(target || hybrid)"] = faithfulness["kl"]["hybrid"]
        figures["KL(target || replacement)"] = faithfulness["kl"]["replacement"]
        figures["same likeliest token"] = faithfulness["top1_agreement"]
        for layer, l0 in enumerate(faithfulness["l0"]):
            figures[f"L0, layer {layer}"] = l0
    for floor, recovered in (results.get("behaviour") or {}).get("recovered", {}).items():
        figures[f"accuracy recovered against the {floor}"] = recovered
    return figures


def export(
    name: str | Path,
    to: Format,
    folder: str | Path,
    *,
    reads: Literal["normalized", "mlp_input"] = "normalized",
    base: str | None = None,
    target: str | None = None,
) -> None:
    """Write a run's adapters, or the models that they belong to, for other tools.

    Args:
        name: as `adapters_of`.
        to: "saelens" (a SAELens folder per layer), "authors" (the whole replacement as the paper's authors write it),
            "hybrid" (the model that additive transcoders belong to, as a Hugging Face folder) or "target" (likewise,
            to read the target's own stream).
        folder: must not exist.
        reads: for "saelens", as `formats.to_saelens`.
        base, target: where the models are, if not where the adapters' metadata says.

    Raises:
        UserError: an unknown format, models that are not known, or a target that no such folder can hold (planted).
        And what the formats raise; nothing half-written is left.
    """
    if to not in FORMATS:
        raise UserError(f"No format {to!r}; there are {', '.join(FORMATS)}.")
    require_absent(folder)
    adapters = adapters_of(name)
    if to == "saelens":
        to_saelens(adapters, folder, reads=reads)
        return
    about = adapters.metadata
    if "planted" in about.fingerprints:
        if to == "target":
            raise UserError(
                "The target of these adapters is its base with planted features, which a gated MLP cannot hold: there "
                "is no Hugging Face folder of it. PairedModel.plant(base, planted) makes it, from the planted "
                "features' own folder."
            )
        target = target or base or about.base  # all but the MLPs is the base's own
    found = {"base": base or about.base, "target": target or about.target}
    if missing := [role for role, where in found.items() if not where]:
        raise UserError(f"The adapters do not say what their {' and '.join(missing)} are; name them.")
    if to == "authors":
        to_authors(adapters, folder, base=found["base"], target=found["target"])
    else:
        write_hybrid(folder, found["target"], found["base"] if to == "hybrid" else None)
