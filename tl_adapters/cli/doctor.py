"""The subcommand doctor: checks of a pair before anything expensive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_adapters.cli.common import AsJson, ConfigFile, Device, Dtype, Quiet, Seed, device_of, given_device, run_config
from tl_adapters.cli.result import Result
from tl_adapters.utils.printing import command

_Base = Annotated[
    str,
    typer.Argument(metavar="BASE", help="folder or hub name; the weights of hub models are not downloaded"),
]
_Target = Annotated[str, typer.Argument(metavar="TARGET", help="folder or hub name")]
_Adapters = Annotated[
    str | None,
    typer.Argument(
        metavar="ADAPTERS", help="run, folder or hub name of adapters, to check that they belong to the pair"
    ),
]
_Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="a .jsonl file or a dataset's name, to count lengths and truncation"),
]
_Out = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="where the run would be written"),
]


def doctor(
    base: _Base,
    target: _Target,
    adapters: _Adapters = None,
    data: _Data = None,
    config: ConfigFile = None,
    out: _Out = Path(),
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Check whether a pair works here, before anything expensive. The exit code is 1 if anything does not.

    Examples:
        tl-adapters doctor Qwen/Qwen2.5-Math-7B deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
        tl-adapters doctor BASE TARGET runs/mine --data traces.jsonl
    """
    from dataclasses import asdict

    from tl_adapters.study.doctor import diagnose, format_findings
    from tl_adapters.utils.files import next_free_name

    options = run_config(config, base=base, target=target, data=data, seed=seed, dtype=dtype)
    findings = diagnose(options, out, device_of(device), adapters)
    works = all(finding.level != "error" for finding in findings)
    traces = None if data or options.data.source else "TRACES.jsonl"
    give = f"\nFor {traces} below, give the training documents: a .jsonl file, or a dataset's name on the hub."
    train = command(
        "train", base=base, target=target, data=data or traces, config=config,
        out=next_free_name(out / "runs" / "mine") if out.exists() else out,
        seed=seed, device=given_device(device), dtype=dtype,
    )  # fmt: skip
    return Result(
        values={"findings": [asdict(finding) for finding in findings]},
        text=format_findings(findings) + (give if traces and works else ""),
        next=train if works else None,
        status=0 if works else 1,
    )
