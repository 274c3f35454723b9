"""The evaluation of a run: every stage after training, each adding its block to results.json.

On the model organism these are all stages; on another pair it is the faithfulness stage. Every stage reads what the
stage before it left in the run folder, and every value names the split that it was measured on.
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
from tl_adapters.processes import processes
from tl_adapters.study.attribution import attribution_stage
from tl_adapters.study.evaluation_stages import baselines_stage, behavior_stage, faithfulness_stage
from tl_adapters.study.features import features_stage
from tl_adapters.study.hesitation import hesitation_stage
from tl_adapters.study.open_run import (
    alone_in_run,
    is_organism_run,
    open_held_out,
    open_run,
    require_adapters,
)
from tl_adapters.study.run_size import StudyScale


@alone_in_run
def evaluate_run(folder: Path, data: str | None, device: str = "auto", dtype: Dtype | None = None) -> None:
    """Measures a run's adapters on held-out traces, or, for the model organism, on its report split.

    Several processes of one launch share the held-out traces among them.

    Args:
        folder: a run that train or demo made.
        data: a .jsonl file or a dataset's name; None for the model organism's own problems.
        device: where to run; "auto" is the first available of cuda, mps and cpu.
        dtype: dtype of the models, instead of the run's own.
    """
    if data is not None:
        pair, traces = processes().together(lambda: _opened(folder, data, device, dtype))
        faithfulness_stage(pair, traces, folder, split=Path(data).name)
    else:
        processes().require_one("evaluate without --data, which runs every stage of the model organism's evaluation,")
        require_adapters(folder)
        if not is_organism_run(folder):
            raise UserError(
                "--data is missing; give a .jsonl file of held-out prompts and responses, or a dataset's name."
            )
        pair = open_run(folder, device, dtype)
        fit = encode_traces(organism.reasoning_pairs("train", StudyScale().documents), pair.model.tokenizer)
        evaluate_organism(pair, folder, StudyScale(), fit)


def _opened(folder: Path, data: str, device: str, dtype: Dtype | None) -> tuple[PairedModel, list[Trace]]:
    """The pair of a run with its adapters, and held-out documents."""
    require_adapters(folder)
    config, pair = RunConfig.of_run(folder), open_run(folder, device, dtype)
    documents = open_held_out(config, data, pair)
    documents.log_survey()
    return pair, documents.traces()


def evaluate_organism(pair: PairedModel, folder: Path, scale: StudyScale, fit: Sequence[Trace]) -> None:
    """Runs every evaluation stage on the report split of the model organism.

    ``fit`` holds training traces, on which the low-rank baseline is fitted.
    """
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
