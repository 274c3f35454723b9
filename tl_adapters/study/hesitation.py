"""The stage hesitation of a run: its circuit, the page, and the block in results.json."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_adapters.circuits.circuit import CIRCUIT_FILE
from tl_adapters.circuits.search import SearchMethod
from tl_adapters.circuits.study import BehaviorStudy, StudyOptions, analyze_behavior
from tl_adapters.circuits.subject import Subject, builtin_subject, halves
from tl_adapters.errors import UserError
from tl_adapters.evaluation.behaviors import GivenBehavior
from tl_adapters.evaluation.tasks import load_problems
from tl_adapters.interop.vllm_run import SPARE_CONDITIONS, VLLM_HERE, opened_engine
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.circuit_page import write_circuit_page
from tl_adapters.study.features import features_if_begun
from tl_adapters.study.open_run import alone_in_run, is_organism_run, open_run, require_adapters
from tl_adapters.utils.devices import GivenDtype
from tl_adapters.utils.results import plain, read_results, stage, write_output, write_results
from tl_adapters.utils.strict_json import dumps

EXAMPLES_FILE = "hesitation.jsonl"
ORGANISM_PROBLEM_COUNTS = (600, 1_000)
"""Numbers of select and report problems of the model organism."""


def hesitation_stage(
    pair: PairedModel,
    subject: Subject,
    folder: Path,
    options: StudyOptions | None = None,
    behavior: GivenBehavior = None,
    *,
    progress: bool = False,
) -> BehaviorStudy:
    """Study a behavior and write circuit.json, hesitation.jsonl, hesitation.html and the block in results.json.

    Args:
        pair: with adapters on every layer.
        subject: problems to choose on and to report on.
        folder: of the run.
        options, behavior, progress: as in `analyze_behavior`.
    """
    seeds = tuple(read_results(folder).get("seeds", [0]))
    store = features_if_begun(folder)  # before the study, so that an error does not end it when it is done
    with stage(folder, "hesitation"):
        study = analyze_behavior(pair, subject, behavior, options=options, seeds=seeds, progress=progress)
        write_output(folder, CIRCUIT_FILE, study.circuit.json_text())
        write_output(folder, EXAMPLES_FILE, "".join(dumps(e) + "\n" for e in study.examples))
        page = write_circuit_page(folder, plain(study.block), study.circuit, store, study.examples)
        study.block["page"] = page.name
        write_results(folder, hesitation=study.block)
    return study


@alone_in_run
def hesitation_of_run(
    folder: Path,
    task: tuple[str, str | None] | None = None,
    *,
    behavior: GivenBehavior = None,
    share: float | None = None,
    rounds: int | None = None,
    method: SearchMethod | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    engine: str | None = None,
    device: str = "auto",
    dtype: GivenDtype | None = None,
    progress: bool = True,
) -> BehaviorStudy:
    """Find and test the hesitation circuit of a run.

    Args:
        folder: of a run, made by train or demo.
        task: name of a benchmark's problems, and a local copy of them or None for the hub's; None takes the problems of
            the model organism.
        behavior: as in `analyze_behavior`.
        share: size of the circuit as a share of the alive features; None takes the default of the search.
        rounds: most rounds of the search until the circuit has its size; None takes the default of the search.
        method: how the search chooses features; None takes its default.
        limit: number of problems, select and report problems together; None takes all.
        max_new_tokens: longest answer; None takes the limit of the task or the model (`responses.response_limit`).
        seed: of every draw.
        engine: what answers the problems: None is our own, "vllm" vLLM in this process, and an address a `vllm serve`.
            Conditions that are no factors of features (steering, a banned word), and those that a server does not
            serve, are answered by our own in any case.
        device, dtype: as in `open_run.open_run`.
        progress: show bars.

    Raises UserError where a pair that is not the model organism is given no task, VllmError, and what opening a run
    raises.
    """
    require_adapters(folder)
    if task is None:
        if not is_organism_run(folder):
            raise UserError("--task is missing. Name problems, such as gsm8k, math500=FILE or another benchmark.")
        select, report = ORGANISM_PROBLEM_COUNTS if limit is None else (limit // 2, limit - limit // 2)
        subject = builtin_subject(select, report, seed=seed)
    else:
        loaded = load_problems(*task, n=limit, seed=seed)
        subject = halves(loaded.problems, max_new_tokens, republish=loaded.republish)
    defaults = StudyOptions()
    search: dict[str, Any] = {"share": share, "rounds": rounds, "method": method}
    given = {name: value for name, value in search.items() if value is not None}
    options = replace(defaults, search=replace(defaults.search, **given), seed=seed)
    with ExitStack() as closing:
        if engine is not None:
            of_engine = dtype if engine == VLLM_HERE else None
            opened = opened_engine(folder, engine, dtype=of_engine, spare=SPARE_CONDITIONS)
            subject = replace(subject, engine=closing.enter_context(opened))
        pair = open_run(folder, device, dtype)
        return hesitation_stage(pair, subject, folder, options, behavior, progress=progress)
