"""The subcommands features and label: what a run's features fire on, and what they are called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tl_adapters.cli.common import AsJson, Device, Dtype, Quiet, RunFolder, Seed, device_of, given_device
from tl_adapters.cli.parsing import LARGEST_SEED, number, refuse, whole
from tl_adapters.cli.result import Result
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import command

_Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="a .jsonl file of traces, or a dataset's name (not needed for the model organism)",
    ),
]
_Stream = Annotated[
    Literal["replacement", "target"],
    typer.Option("--stream", help="whose residual stream they read"),
]
_Examples = Annotated[int | None, whole("--examples", "top activating examples kept per feature (default: 20)")]
_Sample = Annotated[int | None, whole("--sample", "random examples kept per feature (default: 20)")]
_TokensPerBatch = Annotated[int | None, whole("--tokens-per-batch", "tokens of a forward pass (default: 4096)")]
_Share = Annotated[
    str | None,
    typer.Option(
        "--share",
        metavar="I/N",
        help="collect part I of N (from 0); run once more without --share at the end",
    ),
]


def features(
    run_folder: RunFolder,
    data: _Data = None,
    stream: _Stream = "replacement",
    examples: _Examples = None,
    sample: _Sample = None,
    tokens_per_batch: _TokensPerBatch = None,
    share: _Share = None,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Collect what every feature fires on and writes, and draw pages.

    Examples:
        tl-adapters features runs/demo
        tl-adapters features runs/mine --data traces.jsonl --share 0/4
    """
    from tl_adapters.features.store_description import StoreOptions
    from tl_adapters.pages.report import write_report
    from tl_adapters.processes import processes
    from tl_adapters.study.features import FEATURES_FOLDER, STORE_FOLDER, features_run

    kept: dict[str, Any] = dict(examples=examples, sample=sample, tokens_per_batch=tokens_per_batch, seed=seed)
    page = features_run(
        run_folder,
        data,
        stream=stream,
        options=StoreOptions(**{name: value for name, value in kept.items() if value is not None}),
        share=None if share is None else _share(share),
        device=processes().together(lambda: device_of(device)),
        dtype=dtype,
        progress=not quiet,
    )
    store = run_folder / FEATURES_FOLDER / STORE_FOLDER
    if page is None:
        other = dict(stream=None if stream == "replacement" else stream, device=given_device(device))
        return Result(
            paths={"parts": store},
            text="Run the next command when every process is done.",
            next=command("features", run_folder, data=data, dtype=dtype, **other, **kept),
        )
    report = write_report(run_folder)
    return Result(paths={"pages": page, "store": store, "report": report}, next=command("label", run_folder))


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--share is {text!r}; give I/N, such as 0/4 for the first of four processes.")
    return int(match[1]), int(match[2])


_RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="run whose features were collected")]
_Judge = Annotated[
    int | None, whole("--judge", "let an LLM sort N features, or all, into categories", 0, metavar="[N]")
]
_Retest = Annotated[int | None, whole("--retest", "features of these that are judged twice (default: 50)", 0)]
_AutoInterp = Annotated[
    int | None, whole("--auto-interp", "explain N features and N neurons and score the explanations")
]
_BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", metavar="URL", help="an OpenAI-compatible endpoint (default: TL_ADAPTERS_BASE_URL)"),
]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="the judge (default: TL_ADAPTERS_MODEL); its key is read from TL_ADAPTERS_API_KEY",
    ),
]
_Concurrency = Annotated[int | None, whole("--concurrency", "requests at once (default: 8)", most=256)]
_MaxRequests = Annotated[int | None, whole("--max-requests", "stop after N requests and keep their replies", 0)]
_MaxTokens = Annotated[int | None, whole("--max-tokens", "stop when all replies together have used N tokens", 0)]
_ReplyTokens = Annotated[
    int | None,
    whole(
        "--reply-tokens",
        "longest reply in tokens, thinking included (default: 4096, and once more with 16384 where a reply was cut)",
    ),
]
_Timeout = Annotated[
    float | None,
    number("--timeout", "seconds for one request (default: 300)", 0, 86_400, above=True, metavar="SECONDS"),
]
_Seed = Annotated[int | None, whole("--seed", "seed of sampling and order (default: 0)", 0, LARGEST_SEED, "SEED")]


def label(
    run_folder: _RunFolder,
    judge: _Judge = None,
    retest: _Retest = None,
    auto_interp: _AutoInterp = None,
    base_url: _BaseUrl = None,
    model: _Model = None,
    concurrency: _Concurrency = None,
    max_requests: _MaxRequests = None,
    max_tokens: _MaxTokens = None,
    reply_tokens: _ReplyTokens = None,
    timeout: _Timeout = None,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: _Seed = None,
) -> Result:
    """Label a run's features by rules and by an LLM judge.

    Examples:
        tl-adapters label runs/demo
        tl-adapters label runs/demo --judge 200 --auto-interp 100 --base-url http://127.0.0.1:8000/v1 --model NAME
    """
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.label import label_run

    endpoint: dict[str, Any] = dict(
        base_url=base_url,
        model=model,
        concurrency=concurrency,
        request_budget=max_requests,
        token_budget=max_tokens,
        reply_tokens=reply_tokens,
        timeout=timeout,
    )
    if judge is None and auto_interp is None:
        refuse(
            "Rules label without a judge, whom --judge and --auto-interp ask",
            base_url=base_url, model=model, concurrency=concurrency, max_requests=max_requests,
            max_tokens=max_tokens, reply_tokens=reply_tokens, timeout=timeout, seed=seed,
        )  # fmt: skip
    if judge is None:
        refuse("Only --judge judges twice", retest=retest)
    block = label_run(
        run_folder,
        judge_n=judge,
        interpret_n=auto_interp,
        endpoint={name: value for name, value in endpoint.items() if value is not None},
        progress=not quiet,
        **{name: value for name, value in (("retest", retest), ("seed", seed)) if value is not None},
    )
    return Result(
        paths={"report": write_report(run_folder)},
        values=block,
        text="\n".join(_label_lines(block)),
        next=command("serve", run_folder),
    )


def _label_lines(block: dict[str, Any]) -> list[str]:
    rules, judged = block["rules"], (block.get("judge") or {}).get("shares", {})
    lines = [f"{name}: {s['count']} features, {_percent(s)} % of the alive" for name, s in rules.items()]
    lines += [f"{name}: {s['count']} judged, {_percent(s)} %" for name, s in judged.items()]
    detection = block.get("detection") or {}
    scores = {unit: detection[unit]["score"]["value"] for unit in ("features", "neurons") if detection.get(unit)}
    return lines + [f"detection score of {unit}: {score:.3f}" for unit, score in scores.items()]


def _percent(share: dict[str, Any]) -> str:
    return f"{100 * share['weighted']['value']:.1f}"
