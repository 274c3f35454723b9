"""The subcommands evaluate and benchmark: how faithful a run's adapters are, and how its routes answer tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_adapters.cli.common import (
    AsJson,
    Device,
    Dtype,
    Engine,
    HesitationWords,
    Quiet,
    RouteName,
    RunFolder,
    Seed,
    Strength,
    Temperature,
    TopK,
    TopP,
    device_of,
    feature_ids,
    given_device,
    joined,
    strength_of,
    tasks_of,
)
from tl_adapters.cli.parsing import Words, refuse, whole, words
from tl_adapters.cli.result import Result
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import command

if TYPE_CHECKING:
    from tl_adapters.study.benchmark import BenchmarkResult, BenchmarkVariant


_Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="a .jsonl file of held-out traces, or a dataset's name (not needed for the model organism)",
    ),
]


def evaluate(
    run_folder: RunFolder,
    data: _Data = None,
    quiet: Quiet = False,
    json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Measure a run's adapters on held-out traces.

    Examples:
        tl-adapters evaluate runs/demo
        tl-adapters evaluate runs/mine --data held_out.jsonl
    """
    from tl_adapters.pages.report import write_report
    from tl_adapters.processes import processes
    from tl_adapters.study.evaluate import evaluate_run
    from tl_adapters.study.features import has_features
    from tl_adapters.utils.results import read_results

    evaluate_run(run_folder, data, processes().together(lambda: device_of(device)), dtype)
    report = processes().together(lambda: write_report(run_folder) if processes().is_main else run_folder)
    features = command("features", run_folder, data=data, device=given_device(device), dtype=dtype)
    return Result(
        paths={"report": report, "figures": run_folder / "results.json"},
        values={"faithfulness": read_results(run_folder).get("faithfulness")},
        next=command("label", run_folder) if has_features(run_folder) else features,
    )


_Tasks = Annotated[
    list[Words] | None,
    words("--tasks", "such as gsm8k,math500; FILE is a local copy of the dataset", "NAME[=FILE]"),
]
_Route = Annotated[RouteName | None, typer.Option("--route", help="the route that answers (default: replacement)")]
_Ablate = Annotated[list[Words] | None, words("--ablate", "answer with the replacement without these features", "L.I")]
_Insert = Annotated[list[Words] | None, words("--insert", "answer with the hybrid and only these features", "L.I")]
_Samples = Annotated[int | None, whole("--samples", "answers to each problem (default: 1)")]
_MaxNewTokens = Annotated[
    int | None, whole("--max-new-tokens", "longest answer (default: 32,768; 160 for the built-in problems)")
]
_BatchSize = Annotated[
    int | None, whole("--batch-size", "problems per batch (default: 16 at 32,768 tokens, 250 at 160)")
]
_Limit = Annotated[int | None, whole("--limit", "the first N problems of each task only")]
_OpenThinking = Annotated[
    bool, typer.Option("--open-thinking", help="end the prompts with the tag that opens the thinking")
]
_Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder of answers (default: RUN/benchmarks)")]


def benchmark(
    run_folder: RunFolder,
    tasks: _Tasks = None,
    route: _Route = None,
    ablate: _Ablate = None,
    insert: _Insert = None,
    strength: Strength = None,
    samples: _Samples = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_new_tokens: _MaxNewTokens = None,
    batch_size: _BatchSize = None,
    limit: _Limit = None,
    open_thinking: _OpenThinking = False,
    hesitation_words: HesitationWords = None,
    out: _Out = None,
    engine: Engine = None,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Answer tasks on one route: pass@1, length, hesitation rate. Answers that are there are kept, so it resumes.

    Examples:
        tl-adapters benchmark runs/demo
        tl-adapters benchmark runs/mine --tasks gsm8k,math500 --samples 4 --temperature 0.6
        tl-adapters benchmark runs/demo --ablate runs/demo/circuit.json
    """
    from tl_adapters.study.benchmark import BENCHMARKS_FOLDER, benchmark_run
    from tl_adapters.utils.results import plain

    variant = _variant(route, joined(ablate), joined(insert), strength)
    named, counted = joined(tasks), joined(hesitation_words)
    given = _given(
        samples=samples, temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    folder = out or run_folder / BENCHMARKS_FOLDER
    try:
        results = benchmark_run(
            run_folder, tasks_of(named) or None, variant, options=given, open_thinking=open_thinking, n=limit,
            behavior=counted or None, out=folder, engine=engine, device=_device(engine, device),
            dtype=dtype, progress=not quiet,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; answers so far are in {folder}; the same command continues.") from None
    other: dict[str, Any] = dict(route="replacement" if variant.route == "target" else "target", limit=limit)
    other |= dict(
        tasks=named or None, words=counted or None, out=out, dtype=dtype, device=given_device(device), engine=engine
    )
    return Result(
        paths={"answers": [result.folder for result in results]},
        values={"tasks": [{"task": r.task, "variant": r.variant, **plain(r.score)} for r in results]},
        text="\n".join(map(_benchmark_lines, results)),
        next=command("benchmark", run_folder, **other, **given, open_thinking=open_thinking),
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _device(engine: str | None, device: str) -> str:
    """The device of --device. Raises UserError where another engine chooses its own."""
    if engine is not None:
        refuse("vLLM chooses its device itself", device=given_device(device))
    return device_of(device)


def _variant(route: str | None, ablate: list[str], insert: list[str], strength: float | None) -> BenchmarkVariant:
    from tl_adapters.study.benchmark import BenchmarkVariant

    if ablate and insert:
        raise UserError("--ablate and --insert exclude each other; give one of them.")
    return BenchmarkVariant(
        route or ("hybrid" if insert else "replacement"),
        tuple(feature_ids(ablate)),
        tuple(feature_ids(insert)),
        strength_of(strength, insert),
    )


def _benchmark_lines(result: BenchmarkResult) -> str:
    from tl_adapters.utils.html import interval_text

    score = result.score
    right = interval_text(vars(score.ci["pass_at_1"]), lambda share: f"{100 * share:.1f}")
    hesitates = "-" if score.hesitation_per_1k is None else f"{score.hesitation_per_1k:.1f}"
    return (
        f"{result.task}, {result.variant}: pass@1 {100 * score.pass_at_1:.1f} % ({right}) of {score.n} problems, "
        f"{score.length:.0f} tokens, {hesitates} {'/'.join(score.words)} per 1,000, {100 * score.truncated:.1f} % "
        f"cut, {100 * score.looping:.1f} % looping\n"
        f"decoding: {result.sampling.parameters}, up to {result.sampling.max_new_tokens:,} tokens; of 1,000 tokens "
        f"{score.near_ties_per_1k:.2f} are chosen by a margin below rounding"
    )
