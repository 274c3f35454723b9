"""The subcommands export, push, pull and open: adapters for and of other tools and other people."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tl_adapters.cli.common import (
    GIVE_HELD_OUT,
    HELD_OUT,
    AsJson,
    Device,
    Dtype,
    Quiet,
    Strength,
    device_of,
    feature_ids,
    given_device,
    joined,
    scale_factor,
    strength_of,
)
from tl_adapters.cli.parsing import Words, refuse, words
from tl_adapters.cli.result import Result
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import command

if TYPE_CHECKING:
    from tl_adapters.adapters.adapter_set import AdapterSet
    from tl_adapters.interventions.variants import Variant

ExportName = Literal["saelens", "authors", "hybrid", "target", "vllm", "neuronpedia", "sae-dashboard"]
Reads = Annotated[
    Literal["normalized", "mlp_input"] | None,
    typer.Option(
        "--reads",
        help="normalized: right on processed models too (default); mlp_input: as trained, for unprocessed models",
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", metavar="REVISION", help="branch, tag or commit")]
NEW_SET_NAME = "tl-adapters"
"""Neuronpedia's name of the set of features where none is given."""

_READ_BY: dict[str, set[str]] = {
    "saelens": {"reads"},
    "authors": {"base", "target"},
    "hybrid": {"base", "target"},
    "target": {"base", "target"},
    "vllm": {"base", "target", "ablate", "insert", "strength", "scale"},
    "neuronpedia": {"model_id", "set"},
    "sae-dashboard": {"features", "data"},
}
"""Options that each format reads."""


_Adapters = Annotated[str, typer.Argument(metavar="RUN", help="run folder, folder of adapters, or hub name")]
_To = Annotated[ExportName, typer.Option("--to", help="format; the last two take a run's features")]
_Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="folder to make")]
_Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="BASE", help="folder or hub name of the base (default: the one the adapters record)"
    ),
]
_Target = Annotated[
    str | None,
    typer.Option("--target", metavar="TARGET", help="folder or hub name of the target (default: likewise)"),
]
_ModelId = Annotated[
    str | None,
    typer.Option("--model-id", metavar="NAME", help="neuronpedia: its name of the model (default: the target's name)"),
]
_SetName = Annotated[
    str | None,
    typer.Option("--set", metavar="NAME", help=f"neuronpedia: its name of the set (default: {NEW_SET_NAME})"),
]
_Features = Annotated[list[Words] | None, words("--features", "sae-dashboard: features to draw, as layer.index", "L.I")]
_Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="sae-dashboard: documents (not needed for the model organism)"),
]
_Ablate = Annotated[
    list[Words] | None, words("--ablate", "vllm: serve also the replacement without these features", "L.I")
]
_Insert = Annotated[list[Words] | None, words("--insert", "vllm: serve also the hybrid with only these", "L.I")]
_Scale = Annotated[
    list[Words] | None,
    words("--scale", "vllm: serve also the replacement with these features times FACTOR", "FACTOR L.I"),
]


def export(
    adapters: _Adapters,
    to: _To,
    out: _Out,
    reads: Reads = None,
    base: _Base = None,
    target: _Target = None,
    model_id: _ModelId = None,
    set_name: _SetName = None,
    features: _Features = None,
    data: _Data = None,
    ablate: _Ablate = None,
    insert: _Insert = None,
    strength: Strength = None,
    scale: _Scale = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> Result:
    """Write adapters, models or features for other tools.

    Examples:
        tl-adapters export runs/mine --to saelens --out saelens
        tl-adapters export runs/demo --to neuronpedia --model-id NAME --out batches
        tl-adapters export runs/demo --to sae-dashboard --features 2.17 4.3 --out dashboards
        tl-adapters export runs/demo --to vllm --ablate runs/demo/circuit.json --scale 2 4.12 --out served
    """
    given: dict[str, object] = dict(
        reads=reads, base=base, target=target, model_id=model_id, set=set_name, features=features, data=data,
        ablate=ablate, insert=insert, strength=strength, scale=scale,
    )  # fmt: skip
    refuse(f"--to {to} does not read this", **{name: v for name, v in given.items() if name not in _READ_BY[to]})
    if to == "neuronpedia":
        return _export_neuronpedia(Path(adapters), out, model_id, set_name or NEW_SET_NAME)
    if to == "sae-dashboard":
        return _export_dashboard(Path(adapters), out, joined(features), data)
    from tl_adapters.interop.export import export as export_adapters

    variants = _served(ablate, insert, strength, scale)
    export_adapters(adapters, to, out, reads=reads or "normalized", base=base, target=target, variants=variants)
    return Result(paths={to: out}, text=_loading(to, out))


def _served(
    ablate: list[Words] | None, insert: list[Words] | None, strength: float | None, scale: list[Words] | None
) -> list[Variant]:
    """The feature sets of the options, in the order of their help. Raises UserError."""
    from tl_adapters.interventions.variants import rescaled, with_only, without

    if strength is not None:
        strength_of(strength, joined(insert))
    variants = [
        *(without(feature_ids(names)) for names in ablate or ()),
        *(with_only(feature_ids(names), strength_of(strength, names)) for names in insert or ()),
        *(rescaled(feature_ids(names), scale_factor(factor, names)) for factor, *names in scale or ()),
    ]
    return [variant.named_apart() for variant in variants]


def _loading(to: str, out: Path) -> str:
    """The command or the line of Python that loads what was exported."""
    if to == "vllm":
        from tl_adapters.interop.vllm_checkpoint import serve_command

        return f"in an environment with vLLM (docs/vllm.md): {serve_command(out)}"
    if to == "saelens":
        missing = "\nSAELens is not installed here. It needs TransformerLens 3: pip install 'tl-adapters[saelens]'"
        found = importlib.util.find_spec("sae_lens") is not None
        return f"in Python: sae_lens.SAE.load_from_disk({f'{out}/layer_0'!r})" + ("" if found else missing)
    return "" if to == "authors" else f"in Python: transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"


def _export_neuronpedia(run: Path, out: Path, model_id: str | None, set_name: str) -> Result:
    from tl_adapters.study.features import export_neuronpedia

    return Result(paths={"neuronpedia": export_neuronpedia(run, out, model_id, set_name)})


def _export_dashboard(run: Path, out: Path, features: list[str], data: str | None) -> Result:
    from tl_adapters.study.features import export_sae_dashboard

    if not features:
        raise UserError("--features is missing; give the features to draw as layer.index, such as 2.17 4.3.")
    return Result(paths={"sae-dashboard": export_sae_dashboard(run, out, feature_ids(features), data)})


_PushAdapters = Annotated[str, typer.Argument(metavar="RUN", help="run folder or folder of adapters")]
_Repo = Annotated[str, typer.Argument(metavar="USER/REPO", help="repository, created if it does not exist")]
_Private = Annotated[bool, typer.Option("--private", help="make a new repository private")]
_Revision = Annotated[
    str | None, typer.Option("--revision", metavar="BRANCH", help="branch, created if it does not exist")
]
_License = Annotated[
    str | None,
    typer.Option("--license", metavar="ID", help="license of the adapters, such as apache-2.0 (default: none stated)"),
]


def push(
    adapters: _PushAdapters,
    repo: _Repo,
    private: _Private = False,
    revision: _Revision = None,
    reads: Reads = None,
    license: _License = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> Result:
    """Upload adapters with their model card to the hub (reads HF_TOKEN).

    Examples:
        tl-adapters push runs/mine user/repo
        tl-adapters push runs/mine user/repo --license apache-2.0
        tl-adapters push runs/mine user/repo --private --revision trial
    """
    from tl_adapters.interop.export import load_adapters_with_measurements
    from tl_adapters.interop.hub import push_to_hub
    from tl_adapters.utils.files import next_free_name

    found = load_adapters_with_measurements(adapters)
    address = push_to_hub(
        found, repo, private=private or None, revision=revision, reads=reads or "normalized", license=license
    )
    out = next_free_name("adapters")
    return Result(paths={"commit": address}, next=command("pull", repo, revision=revision, out=out))


_PullRepo = Annotated[str, typer.Argument(metavar="USER/REPO", help="repository of the hub")]
_Layers = Annotated[list[Words] | None, words("--layers", "these layers only", "LAYER")]


def pull(
    repo: _PullRepo,
    out: _Out,
    layers: _Layers = None,
    revision: Revision = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> Result:
    """Download adapters from the hub into a new folder.

    Examples:
        tl-adapters pull user/repo --out adapters
        tl-adapters pull user/repo --out adapters --layers 0 1 2
    """
    from tl_adapters.interop.hub import pull as pull_adapters

    adapters = pull_adapters(repo, out, layers=_layer_numbers(joined(layers)), revision=revision)
    about = adapters.metadata
    names = {"BASE": about.base, "TARGET": about.target}
    return Result(
        paths={"adapters": out},
        values=_values_of(adapters),
        text="\n".join([f"downloaded: {_size_of(adapters)}", *_elsewhere(names)]),
        next=command("doctor", *(role if _is_local(name) else name for role, name in names.items()), out),
    )


def _values_of(adapters: AdapterSet) -> dict[str, Any]:
    return {
        "layers": list(adapters.layer_indices),
        "n_layers": adapters.n_layers,
        "n_features": adapters.n_features,
        "base": adapters.metadata.base,
        "target": adapters.metadata.target,
    }


def _size_of(adapters: AdapterSet) -> str:
    return f"{len(adapters)} of {adapters.n_layers} layers, {adapters.n_features} features each"


def _is_local(name: str) -> bool:
    """Whether a model's recorded name says nothing here: there is none, or it was a folder of another machine."""
    return not name or name.startswith("./")


def _elsewhere(names: dict[str, str]) -> list[str]:
    local = {role: name for role, name in names.items() if _is_local(name)}
    was = {r: f"was {name}, a folder of another machine" if name else "is not recorded" for r, name in local.items()}
    return [f"The {role.lower()} {origin}: give your copy for {role} below." for role, origin in was.items()]


def _layer_numbers(given: list[str]) -> list[int] | None:
    wrong = [layer for layer in given if not layer.isdecimal()]
    if wrong:
        raise UserError(f"--layers holds {wrong[0]}; give the numbers of layers, from 0, such as 0 1 2.")
    return [int(layer) for layer in given] or None


_Name = Annotated[
    str, typer.Argument(metavar="NAME", help="folder or hub name of adapters: ours, SAELens, the paper's authors'")
]
_Run = Annotated[Path, typer.Option("--out", metavar="RUN", help="run folder to make")]


def open(
    name: _Name,
    out: _Run,
    base: _Base = None,
    target: _Target = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> Result:
    """Make a run folder of adapters that exist already, so that every stage after training takes them.

    A hub name can hold a revision: USER/NAME@REVISION, also for --base and --target.

    Examples:
        tl-adapters open nathu0/transcoder-adapters-R1-Distill-Qwen-7B-l1w0.001-l0-1.4 --out runs/r1
        tl-adapters open adapters --base org/base --target org/target@v2 --out runs/theirs
    """
    from tl_adapters.study.by_name import open_set
    from tl_adapters.study.open_run import is_organism_run

    adapters = open_set(name, out, base=base, target=target, revision=revision, device=device_of(device), dtype=dtype)
    held_out = None if is_organism_run(out) else HELD_OUT
    give = "" if held_out is None else f"\n{GIVE_HELD_OUT}"
    about = adapters.metadata
    return Result(
        paths={"run": out},
        values=_values_of(adapters),
        text=f"opened: {_size_of(adapters)}; base {about.base}, target {about.target}{give}",
        next=command("evaluate", out, data=held_out, device=given_device(device), dtype=dtype),
    )
