"""The subcommands config, train, sweep and transcoders: options of a run, the run, runs over options, transcoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tl_adapters.cli.common import (
    GIVE_HELD_OUT,
    HELD_OUT,
    AsJson,
    Base,
    ConfigFile,
    Device,
    Dtype,
    Quiet,
    Seed,
    SetOptions,
    Target,
    device_of,
    given_device,
    joined,
    run_config,
)
from tl_adapters.cli.parsing import Words, exactly_one, refuse, whole, words
from tl_adapters.cli.result import Result
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import command

_Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="a shipped configuration or a file (default: the default options)"),
]
_ListShipped = Annotated[bool, typer.Option("--list", help="list the shipped configurations")]
_Schema = Annotated[bool, typer.Option("--schema", help="print the JSON schema of configuration files, for editors")]


def config(
    name: _Name = None,
    list_shipped: _ListShipped = False,
    schema: _Schema = False,
    json: AsJson = False,
) -> Result:
    """Print every option of a run, documented, as YAML to edit.

    Examples:
        tl-adapters config > mine.yaml
        tl-adapters config paper
        tl-adapters config --list
        tl-adapters config --schema > schema.json
    """
    from tl_adapters.config import RunConfig, commented_yaml, json_schema, shipped_configs
    from tl_adapters.utils.strict_json import dumps

    if (list_shipped or schema) and (name is not None or (list_shipped and schema)):
        raise UserError("--list and --schema are for all configurations; give one of them alone, without a name.")
    if schema:
        return Result(values=json_schema(), text=dumps(json_schema(), indent=1))
    if list_shipped:
        return Result(values={"configurations": list(shipped_configs())}, text="\n".join(shipped_configs()))
    options = RunConfig.load(name) if name else RunConfig()
    return Result(values=options.to_dict(), text=commented_yaml(options))


_Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="a .jsonl file of prompts and responses, or a dataset's name on the hub"
    ),
]
_BadRows = Annotated[
    Literal["refuse", "drop"] | None,
    typer.Option("--bad-rows", help="what to do with unusable rows (default: refuse)"),
]
_Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run folder to make")]
_Plan = Annotated[
    bool, typer.Option("--plan", help="only print the memory, time and disk space that the run would take")
]
_Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="RUN", help="run folder to resume with its own options"),
]


def train(
    base: Base = None,
    target: Target = None,
    data: _Data = None,
    config: ConfigFile = None,
    set_options: SetOptions = None,
    bad_rows: _BadRows = None,
    out: _Out = None,
    resume: _Resume = None,
    plan: _Plan = False,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Train adapters for a pair, or resume a run.

    Examples:
        tl-adapters train --base BASE --target TARGET --data traces.jsonl --out runs/mine
        tl-adapters train --base BASE --target TARGET --data traces.jsonl --out runs/mine --plan
        tl-adapters train --config paper --set training.lr=4e-4 --set n_features=4096 --out runs/paper
        tl-adapters train --resume runs/mine
    """
    from tl_adapters.processes import processes
    from tl_adapters.study.open_run import is_organism_run
    from tl_adapters.study.train import resume_run, train_run
    from tl_adapters.utils.results import read_results

    def options_and_device() -> tuple[Any, str]:
        exactly_one(out=out, resume=resume)
        if resume is not None:
            refuse(
                "--resume takes the run's own options",
                base=base, target=target, data=data, config=config, set=set_options, plan=plan, seed=seed, dtype=dtype,
            )  # fmt: skip
            return None, device_of(device)
        options = run_config(
            config, set_options, base=base, target=target, data=data, bad_rows=bad_rows, dtype=dtype, seed=seed
        )
        _require_data(options, "a .jsonl file of prompts and responses, or a dataset's name on the hub")
        return options, device_of(device)

    options, where = processes().together(options_and_device)
    folder = out or resume
    assert folder is not None
    if options is None:
        resume_run(folder, where, progress=not quiet, bad_rows=bad_rows)
    elif plan:
        return _planned(options, folder, where)
    else:
        train_run(options, folder, where, progress=not quiet)
    held_out = None if is_organism_run(folder) else HELD_OUT
    return Result(
        paths={"adapters": folder / "adapters"},
        values={"train": read_results(folder).get("train")},
        text="" if held_out is None else GIVE_HELD_OUT,
        next=command("evaluate", folder, data=held_out, device=given_device(device)),
    )


def _planned(options: Any, out: Path, device: str) -> Result:
    from dataclasses import asdict

    from tl_adapters.study.doctor import format_findings, plan_run

    findings = plan_run(options, out, device)
    return Result(
        values={"findings": [asdict(finding) for finding in findings]},
        text=format_findings(findings),
        status=0 if all(finding.level != "error" for finding in findings) else 1,
    )


def _require_data(options: Any, what: str) -> None:
    if options.target and not options.data.source:
        raise UserError(f"--data is missing; give {what}.")


_Over = Annotated[
    list[Words] | None,
    words("--over", "such as sparsity_weight=0.1,0.4 n_features=64,128", "OPTION=V,V"),
]
_SweepData = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="training documents: a .jsonl file, or a dataset's name on the hub"),
]
_HeldOut = Annotated[
    str | None,
    typer.Option("--held-out", metavar="DATA", help="held-out documents (not needed for the model organism)"),
]
_Documents = Annotated[int | None, whole("--documents", "held-out problems or documents to use (default: 300)")]
_SweepOut = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder to make or to continue")]
_SweepResume = Annotated[
    Path | None, typer.Option("--resume", metavar="DIR", help="sweep to continue with its own options")
]


def sweep(
    over: _Over = None,
    base: Base = None,
    target: Target = None,
    data: _SweepData = None,
    config: ConfigFile = None,
    set_options: SetOptions = None,
    held_out: _HeldOut = None,
    documents: _Documents = None,
    out: _SweepOut = None,
    resume: _SweepResume = None,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Train over training options: sparsity against faithfulness.

    Examples:
        tl-adapters sweep --over sparsity_weight=0.1,0.2,0.4 n_features=64,128 --out runs/sweep
        tl-adapters sweep --over sparsity_weight=0.1,0.4 --set local.steps=300 --out runs/short
        tl-adapters sweep --resume runs/sweep
    """
    from tl_adapters.pages.navigation import SWEEP_PAGE_FILE
    from tl_adapters.pages.sweep_page import points_on_front, sweep_markdown
    from tl_adapters.study.grid import read_grid
    from tl_adapters.study.sweep import resume_sweep
    from tl_adapters.study.sweep import sweep as run_sweep
    from tl_adapters.utils.results import plain

    exactly_one(out=out, resume=resume)
    if resume is not None:
        refuse(
            "--resume takes the sweep's own options",
            over=over, base=base, target=target, data=data, config=config, set=set_options, held_out=held_out,
            documents=documents, seed=seed, dtype=dtype,
        )  # fmt: skip
        points = resume_sweep(resume, device_of(device), progress=not quiet)
    else:
        if not over:
            raise UserError("--over is missing; give options with their values, such as sparsity_weight=0.1,0.2,0.4.")
        assert out is not None
        grid = read_grid(joined(over))
        options = run_config(config, set_options, base=base, target=target, data=data, dtype=dtype, seed=seed)
        _require_data(options, "the training documents as a .jsonl file or a dataset's name on the hub")
        points = run_sweep(
            options, out, grid, held_out=held_out, documents=documents or 300, device=device_of(device),
            progress=not quiet,
        )  # fmt: skip
    folder = out or resume
    assert folder is not None
    best = (points_on_front(points) or points)[0]
    data_of_next = None if best.recovered else held_out or HELD_OUT
    return Result(
        paths={"page": folder / SWEEP_PAGE_FILE, "figures": folder / "sweep.json"},
        values={"points": plain(points), "best": best.name},
        text=f"{sweep_markdown(points)}\n" + (GIVE_HELD_OUT if data_of_next == HELD_OUT else ""),
        next=command("evaluate", folder / best.name, data=data_of_next, device=given_device(device)),
    )


_Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="folder or hub name (default: the base of the model organism)"),
]
_MeasuredOn = Annotated[
    str | None,
    typer.Option("--held-out", metavar="DATA", help="documents to measure on (default: 2 % of the training documents)"),
]
_TranscodersOut = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder to make")]


def transcoders(
    model: _Model = None,
    data: _Data = None,
    config: ConfigFile = None,
    set_options: SetOptions = None,
    held_out: _MeasuredOn = None,
    out: _TranscodersOut = None,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Train ordinary transcoders of a model's own MLPs by the local stage, as SAELens reads them. There is no base.

    Examples:
        tl-adapters transcoders --set activation=batchtopk --set k=16 --set n_features=256 --out transcoders
        tl-adapters transcoders Qwen/Qwen2.5-Math-7B --data traces.jsonl --set local.steps=2000 --out transcoders
    """
    from dataclasses import asdict

    from tl_adapters.study.train import format_fits, transcoders_run

    if out is None:
        raise UserError("--out is missing; give the name of a new folder, such as transcoders.")
    options = run_config(config, set_options, base=model, target=model, data=data, dtype=dtype, seed=seed)
    _require_data(options, "a .jsonl file of prompts and responses, or a dataset's name on the hub")
    fits = transcoders_run(options, out, held_out, device_of(device), progress=not quiet)
    return Result(paths={"transcoders": out}, values={"layers": [asdict(fit) for fit in fits]}, text=format_fits(fits))
