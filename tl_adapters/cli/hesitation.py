"""The subcommand hesitation: find and test the circuit of a behavior."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from tl_adapters.cli.common import (
    AsJson,
    Device,
    Dtype,
    Engine,
    Quiet,
    RunFolder,
    Seed,
    device_of,
    joined,
    tasks_of,
)
from tl_adapters.cli.parsing import Words, number, refuse, whole, words
from tl_adapters.cli.result import Result
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import command

_Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME[=FILE]",
        help="problems: gsm8k, ... (default: those of the model organism)",
    ),
]
_BehaviorWords = Annotated[
    list[Words] | None,
    words("--words", 'words or phrases of the behavior, such as Wait "Hold on" (default: Wait)', "WORD"),
]
_Share = Annotated[
    float | None,
    number("--share", "size of the circuit, as a share of alive features (default: 0.03)", 0, 1, above=True),
]
_Rounds = Annotated[int | None, whole("--rounds", "most rounds of the search (default: 40)")]
SearchName = Literal["greedy", "sampled", "graphs"]
_Search = Annotated[
    SearchName | None,
    typer.Option(
        "--search",
        help="how features are chosen: greedy reads all texts in every round (default), sampled a part of them, graphs "
        "ranks by influence in attribution graphs",
    ),
]
_Limit = Annotated[int | None, whole("--limit", "number of problems: half to choose on, half to report on", 2)]
_MaxNewTokens = Annotated[
    int | None,
    whole("--max-new-tokens", "longest answer (default: the task's, or generation_config.json's, or 32,768)"),
]


def hesitation(
    run_folder: RunFolder,
    task: _Task = None,
    behavior_words: _BehaviorWords = None,
    share: _Share = None,
    rounds: _Rounds = None,
    search: _Search = None,
    limit: _Limit = None,
    max_new_tokens: _MaxNewTokens = None,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    engine: Engine = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Find the features that say a word, and test them by intervention.

    Examples:
        tl-adapters hesitation runs/demo
        tl-adapters hesitation runs/mine --task gsm8k --words Wait "Hold on" --limit 1000
    """
    from tl_adapters.circuits.circuit import CIRCUIT_FILE
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.hesitation import hesitation_of_run
    from tl_adapters.utils.results import output_file

    tasks = tasks_of([] if task is None else [task])
    if len(tasks) > 1:
        raise UserError(f"--task is {task}; give one task, as NAME or NAME=FILE.")
    if not tasks:
        refuse("The problems of the model organism have a limit of their own", max_new_tokens=max_new_tokens)
    study = hesitation_of_run(
        run_folder,
        next(iter(tasks.items()), None),
        behavior=joined(behavior_words) or None,
        share=share,
        rounds=rounds,
        method=search,
        limit=limit,
        max_new_tokens=max_new_tokens,
        seed=seed or 0,
        engine=engine,
        device=device_of(device),
        dtype=dtype,
        progress=not quiet,
    )
    page, circuit = run_folder / study.block["page"], output_file(run_folder, CIRCUIT_FILE)
    return Result(
        paths={"page": page, "circuit": circuit, "report": write_report(run_folder)},
        values={"circuit": study.block["circuit"], "criteria": study.block.get("criteria", [])},
        text="\n".join(_lines(study.block)),
        next=command("serve", run_folder),
    )


def _lines(block: dict[str, Any]) -> list[str]:
    from tl_adapters.circuits.criteria import OUTCOME_NAMES

    size = block["circuit"]
    if not size["n"]:
        return [f"no circuit: the target's answers have {block['moments']['select']['moments']} onsets"]
    roles = ", ".join(f"{size[role]} {role}" for role in ("output", "template", "continuation"))
    lines = [f"{size['n']} features ({100 * size['share_of_alive']:.1f} % of the alive): {roles}"]
    for criterion in block["criteria"]:
        value = "-" if criterion["value"] is None else f"{criterion['value']:.3g}"
        lines.append(f"{OUTCOME_NAMES[criterion['reached']]:9}  {criterion['name']}: {value}, {criterion['bar']}")
    return lines
