"""The listings of docs/formats.md name the files that are written, and no others."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.page_values import made
from helpers.readme import ROOT, blocks_of
from helpers.users_models import reference

from tl_adapters.interop.hub import push_to_hub

SET, AUTHORS, RUN, STORE, OTHERS = blocks_of(ROOT / "docs" / "formats.md", "text")
OTHERWISE = {
    "data.json": "training on data of one's own",
    "validation.jsonl": "training with held-out documents",
    "checkpoints/step-N": "removed where training has finished",
    "features/replies": "label --judge",
    "benchmarks": "benchmark",
    "README.md": "a push",
    "measured.png": "a push",
    "circuits/NAME.json": "a push of a circuit",
}
"""Listed paths that a run of the demo does not hold, and what writes each."""


def listed(block: str) -> set[str]:
    """The paths of a listing; a slash at the end is left out."""
    heads = [re.split(r"\s{2,}", line)[0] for line in block.splitlines() if line.strip() and line[0] != " "]
    return {path.rstrip("/") for head in heads for path in head.split(", ")}


def written(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file below a folder, and the name under which a listing would have it: numbers and names are N and NAME."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        yield (
            name,
            re.sub(
                r"moment-\d+", "NAME", re.sub(r"(layer_|step-)\d+", r"\1N", re.sub("part-[0-9a-f]+", "part-HASH", name))
            ),
        )


def is_listed(name: str, paths: set[str]) -> bool:
    """Whether a file or a folder above it is listed, with or without the ending of the file."""
    above = [name, *map(str, Path(name).parents)]
    return bool({*above, name.removesuffix(".safetensors")} & paths)


@pytest.mark.parametrize(("listing", "folder"), [(RUN, ""), (STORE, "features/store"), (SET, "adapters")])
def test_a_run_its_store_and_its_adapters(run: Path, listing: str, folder: str) -> None:
    paths, files = listed(listing), dict(written(run / folder))
    assert not [name for name, shown in files.items() if not is_listed(shown, paths)], "not in the listing"
    there = {*files.values()} | {str(above) for shown in files.values() for above in Path(shown).parents}
    there |= {shown.removesuffix(".safetensors") for shown in there}
    assert paths - there <= {*OTHERWISE}, "listed, and not written"


def test_graphs_and_circuits(run: Path) -> None:
    graphs = {path.name for path in (run / "graphs" / "moment-1").iterdir()}
    assert graphs | {"circuit.json", "sweep.json"} == listed(OTHERS) and (run / "circuit.json").is_file()


def test_what_is_on_the_hub(hub: LoopbackHub) -> None:  # noqa: F811
    adapters = reference(dtype=torch.float32).installed_adapters()
    figures = {f"KL(target || {route})": {"value": 0.5, "low": 0.4, "high": 0.6} for route in ("hybrid", "replacement")}
    object.__setattr__(adapters, "metadata", replace(adapters.metadata, figures=figures))
    push_to_hub(adapters, "user/repo")
    made().push_to_hub("user/repo")
    pushed = {re.sub(r"layer_\d+", "layer_N", name) for name in hub.files["user/repo"]}
    pushed = {re.sub("^circuits/.*", "circuits/NAME.json", name) for name in pushed} - {".gitattributes"}
    assert pushed == listed(SET)
