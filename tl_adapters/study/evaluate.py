"""The stages of a study, each adding its block to a run folder's results.json.

`demo` is all of them on the built-in pair; `train` and `evaluate` on the command line are some of them on any pair.
Every stage reads what the one before left in the folder, and every figure names the split it was measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tl_adapters import organism
from tl_adapters.circuits.subject import builtin_subject
from tl_adapters.config import Dtype, RunConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.errors import UserError
from tl_adapters.generation.responses import traces_of
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.attribution import attribution_stage
from tl_adapters.study.evaluation_stages import baselines_stage, behavior_stage, faithfulness_stage
from tl_adapters.study.features import features_stage
from tl_adapters.study.hesitation import hesitation_stage
from tl_adapters.study.open_run import (
    is_builtin,
    open_held_out,
    open_run,
    require_adapters,
)
from tl_adapters.study.scale import Scale


def evaluate_run(folder: Path, data: str | None, device: str = "auto", dtype: Dtype | None = None) -> None:
    """Measure a run's adapters: on held-out traces, or (the built-in pair) on its own report split.

    Args:
        folder: made by train or demo.
        data: a .jsonl file or a dataset's name; None for the built-in pair's own problems.
        device: where to run; "auto" is the first there is of cuda, mps and cpu.
        dtype: of the models, instead of the run's.
    """
    require_adapters(folder)
    if data is None and not is_builtin(folder):
        raise UserError("--data is missing: a .jsonl file of held-out prompts and responses, or a dataset's name.")
    config = RunConfig.load(folder / "config.json")
    pair = open_run(folder, device, dtype)
    if data is not None:
        documents = open_held_out(config, data, pair)
        documents.log_survey()
        faithfulness_stage(pair, documents.traces(), folder, split=Path(data).name)
    else:
        fit = encode_traces(organism.reasoning_pairs("train", Scale().documents), pair.model.tokenizer)
        evaluate_builtin(pair, folder, Scale(), fit)


def evaluate_builtin(pair: PairedModel, folder: Path, scale: Scale, fit: Sequence[Trace]) -> None:
    """Every evaluation stage on the report split; ``fit`` are training traces, for the low-rank baseline."""
    target = behavior_stage(
        pair, organism.problems("report", scale.documents), scale.problems, folder, scale.max_new_tokens
    )
    traces = traces_of(target, pair.model.tokenizer)
    sums = faithfulness_stage(pair, traces, folder, "report")
    baselines_stage(
        pair, fit[: 2 * scale.baseline_documents], traces[: scale.baseline_documents], sums, folder, "report"
    )
    store = features_stage(pair, traces, folder, "report")
    attribution_stage(pair, target, folder, "report", store)
    subject = builtin_subject(*scale.hesitation, max_new_tokens=scale.max_new_tokens)
    hesitation_stage(pair, subject, folder, scale.circuit)
