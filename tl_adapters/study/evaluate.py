"""The stages of a study, each adding its block to a run folder's results.json.

`demo` is all of them on the built-in pair; `train` and `evaluate` on the command line are some of them on any pair.
Every stage reads what the one before left in the folder, and every figure names the split it was measured on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from tl_adapters import organism
from tl_adapters.attribution.attribute import LogitTarget, token_id
from tl_adapters.attribution.validation import LINEARISATIONS
from tl_adapters.checkpoints.architectures import load_hf_model
from tl_adapters.checkpoints.compatibility import require_same_ids
from tl_adapters.checkpoints.model_files import read_vocabulary
from tl_adapters.circuits.search import SearchOptions
from tl_adapters.circuits.study import StudyOptions
from tl_adapters.circuits.subject import builtin_subject
from tl_adapters.config import BadRows, Dtype, RunConfig, TrainingConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.errors import UserError
from tl_adapters.evaluation.baselines import Correction, baseline_kl, difference_directions, low_rank, top_neurons
from tl_adapters.evaluation.faithfulness import DocumentSums, faithfulness_block, features_block, measure_faithfulness
from tl_adapters.evaluation.response_metrics import Response, correctness, rate, respond, traces_of
from tl_adapters.features.store import FeatureStore
from tl_adapters.models.backend import build_model
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_page import examine_moment, remove_graph
from tl_adapters.pages.report import write_report
from tl_adapters.study.features import features_stage
from tl_adapters.study.hesitation import PROBLEMS, hesitation_stage
from tl_adapters.study.open_run import (
    BUILTIN_TRACES,
    is_builtin,
    load_builtin_pair,
    open_data,
    open_held_out,
    open_pair,
    open_run,
    require_adapters,
)
from tl_adapters.training.run_folder import RunFolder, require_new
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.confidence_intervals import bootstrap_ratio, bootstrap_recovered, paired_difference
from tl_adapters.utils.files import write_text
from tl_adapters.utils.results import read_results, stage, versions, write_results
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

RANKS = (1, 2, 4, 8, 16, 32)
SHOWN_ANSWERS = 4
HESITATION, GRAPHS = "Wait", 3


@dataclass(frozen=True)
class Scale:
    """How much of everything a study does. The defaults are the full demo's."""

    training_traces: int = BUILTIN_TRACES
    """Training documents of the built-in pair."""
    problems: int = 1_000
    """Held-out problems whose answers are compared between models."""
    documents: int = 1_800
    """Greedy traces of the target for KL, NMSE, L0 and alive features; the first ``problems`` are the same."""
    baseline_documents: int = 200
    """Of these, how many the baselines are measured on."""
    max_new_tokens: int = 160
    """The limit of an answer."""
    hesitation: tuple[int, int] = PROBLEMS
    """Problems that the hesitation circuit is chosen on, and others that it is reported on."""
    circuit: StudyOptions = field(default_factory=StudyOptions)
    """How much of the circuit is measured."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Options of the training run."""


QUICK = Scale(
    training_traces=4_000,
    problems=200,
    documents=300,
    baseline_documents=60,
    hesitation=(120, 100),
    circuit=StudyOptions(SearchOptions(per_round=8, documents=40), draws=1, probability_draws=3),
    training=TrainingConfig(steps=150),
)
"""A look at everything in a few minutes; the adapters are not yet sparse."""


def train_run(config: RunConfig, folder: Path, device: str = "auto", progress: bool = True) -> None:
    """A new run: survey the data, train, write results.json. Raises FolderExistsError before anything is loaded."""
    require_new(folder)
    pair = open_pair(config, device)
    data = open_data(config, pair)
    statistics = data.log_survey()
    trainer = Trainer(
        pair, data, config.training, folder, validation=data.validation(), origin=config, progress=progress
    )
    write_text(folder / "data.json", dumps(asdict(statistics), indent=1) + "\n")
    train_stage(trainer, folder)


def resume_run(folder: Path, device: str = "auto", progress: bool = True, bad_rows: BadRows | None = None) -> None:
    """Go on with a run that was stopped. Raises RunFolderError where it cannot be the same run.

    ``bad_rows`` replaces the run's own option: a row that stopped it may be left out from now on.
    """
    config = RunConfig.load(folder / "config.json") if folder.is_dir() else RunConfig()
    RunFolder.open(folder).release()
    if bad_rows is not None:
        config = replace(config, data=replace(config.data, bad_rows=bad_rows))
    pair = open_pair(config, device)
    data = open_data(config, pair)
    trainer = Trainer.resume(pair, data, folder, validation=data.validation(), progress=progress)
    if bad_rows is not None:
        write_text(folder / "config.json", dumps(config.to_dict(), indent=1) + "\n")
    log.info("going on from step %d of %d", trainer.step, trainer.config.steps)
    train_stage(trainer, folder)


def train_stage(trainer: Trainer, folder: Path) -> None:
    """Train to the end and add the blocks pair, train, seeds and versions; of a finished run they stay as they are."""
    if trainer.finished and "train" in read_results(folder):
        trainer.run()  # it may have been stopped while it cleaned up
        return
    with stage(folder, "train"):
        trainer.run()
    pair, config, cfg = trainer.pair, trainer.config, trainer.pair.model.cfg
    write_results(
        folder,
        pair={
            "base": pair.base_id,
            "target": pair.target_id,
            "n_layers": cfg.n_layers,
            "d_model": cfg.d_model,
            "d_mlp": cfg.d_mlp,
            "d_vocab": cfg.d_vocab,
            "fingerprints": pair.fingerprints,
        },
        train={
            "steps": config.steps,
            "tokens": trainer.tokens,
            "seconds": round(trainer.seconds, 1),
            "n_features": config.n_features,
        },
        seeds=[config.seed],
        versions=versions(),
    )


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


def faithfulness_stage(pair: PairedModel, traces: Sequence[Trace], folder: Path, split: str) -> DocumentSums:
    """Add the blocks faithfulness and, where no features were collected, features, measured on ``traces``."""
    results = read_results(folder)
    seeds = tuple(results.get("seeds", [0]))
    collected = "documents" in results.get("features", {})  # what is known of the run's features is not replaced
    with stage(folder, "faithfulness"):
        sums = measure_faithfulness(pair, traces)
        blocks = {} if collected else {"features": features_block(sums)}
        write_results(folder, faithfulness=faithfulness_block(sums, split, seeds), **blocks)
    return sums


def behaviour_stage(
    pair: PairedModel, problems: Sequence[organism.Problem], n_compared: int, folder: Path, max_new_tokens: int = 160
) -> list[Response]:
    """Add the block behaviour and answers.jsonl; returns the target's responses to all ``problems``.

    The first ``n_compared`` are also answered by the real base, the hybrid and the replacement. The real base is
    loaded once, here, and freed.
    """
    split, compared = problems[0].split, problems[:n_compared]
    answer = partial(respond, max_new_tokens=max_new_tokens)
    with stage(folder, "behaviour"):
        with pair.routed("target"):
            target = answer(pair.model, problems)
        responses = {"target": target[:n_compared]}
        for route in ("hybrid", "replacement"):
            with pair.routed(route):
                responses[route] = answer(pair.model, compared)
        # The real base reads the target's token ids here, so they must mean the same to it.
        require_same_ids(read_vocabulary(organism.BASE), pair.model.tokenizer.get_vocab())
        base = build_model(
            *load_hf_model(organism.BASE, pair.model.cfg.dtype, pair.model.W_E.device, pair.model.tokenizer),
            pair.backend.name,
        )
        responses["base"] = answer(base, compared)
        right = {name: correctness(r) for name, r in responses.items()}
        seeds = tuple(read_results(folder).get("seeds", [0]))
        recovered = {
            floor: bootstrap_recovered(right["replacement"], right[floor], right["target"]).figure(
                len(compared), f"share of the accuracy gained over the {floor}", split, seeds
            )
            for floor in ("hybrid", "base")
        }
        gained = {
            floor: {
                model: paired_difference(right[model], right[floor]).figure(len(compared), "accuracy", split, seeds)
                for model in ("target", "replacement")
            }
            for floor in ("hybrid", "base")
        }
        rates = {name: rate(r, split) for name, r in responses.items()}
        write_results(folder, behaviour={**rates, "recovered": recovered, "gained": gained})
        shown = sorted(range(len(compared)), key=lambda i: -min(responses["target"][i].hesitations, 2))[:SHOWN_ANSWERS]
        answers = [
            {"question": compared[i].question, **{name: r[i].text for name, r in responses.items()}} for i in shown
        ]
        write_text(folder / "answers.jsonl", "".join(dumps(a) + "\n" for a in answers))
    return target


def baselines_stage(
    pair: PairedModel, fit: Sequence[Trace], traces: Sequence[Trace], sums: DocumentSums, folder: Path, split: str
) -> None:
    """Add the block baselines: KL of simpler stand-ins at equal activity, and of the adapters on the same traces."""
    l0 = (sums.active.sum(0) / sums.tokens.sum()).ceil().int().clamp(min=1).tolist()
    seeds = tuple(read_results(folder).get("seeds", [0]))

    def row(name: str, numbers: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        return {
            "name": name,
            "kl": bootstrap_ratio(*numbers).figure(len(traces), "nats per response token", split, seeds),
        }

    with stage(folder, "baselines"):
        directions = difference_directions(pair, fit)
        n = len(traces)
        rows = [row("adapters", (sums.kl["replacement"][:n], sums.positions[:n]))]
        for factor in (1, 8):
            swapped: list[Correction] = [top_neurons(mlp, factor * k) for mlp, k in zip(pair.mlps, l0, strict=True)]
            label = f"the {factor} x n most changed neurons of each token" if factor > 1 else (
                "the n most changed neurons of each token"
            )  # fmt: skip
            rows.append(row(label, baseline_kl(pair, swapped, traces)))
        by_rank = {}
        for rank in [r for r in RANKS if r < pair.model.cfg.d_model]:
            projected = [low_rank(mlp, d[:, :rank]) for mlp, d in zip(pair.mlps, directions, strict=True)]
            by_rank[rank] = row(f"the MLP difference at rank {rank}", baseline_kl(pair, projected, traces))
        rows += by_rank.values()
        adapters_kl = rows[0]["kl"].value
        enough = [rank for rank, r in by_rank.items() if r["kl"].value <= adapters_kl]  # KLs of tokens that are there
        write_results(folder, baselines={"n": l0, "rows": rows, "rank_for_same_kl": min(enough, default=None)})


def demo(
    folder: Path, scale: Scale, device: str = "auto", dtype: torch.dtype | None = None, progress: bool = True
) -> Path:
    """The whole study on the built-in pair, into ``folder``; returns the path of report.html.

    Raises FolderExistsError where ``folder`` exists.
    """
    require_new(folder)
    pair = load_builtin_pair(device, dtype)
    tokenizer = pair.model.tokenizer
    training = encode_traces(organism.reasoning_pairs("train", scale.training_traces, scale.training.seed), tokenizer)
    train_stage(Trainer(pair, training, scale.training, folder, origin=RunConfig(), progress=progress), folder)
    recipe = json.loads((organism.PAIR / "recipe.json").read_text())["hash"]
    write_results(folder, pair={**read_results(folder)["pair"], "recipe": recipe})
    evaluate_builtin(pair, folder, scale, training)
    return write_report(folder)


def evaluate_builtin(pair: PairedModel, folder: Path, scale: Scale, fit: Sequence[Trace]) -> None:
    """Every evaluation stage on the report split; ``fit`` are training traces, for the low-rank baseline."""
    target = behaviour_stage(
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


def attribution_stage(
    pair: PairedModel, responses: Sequence[Response], folder: Path, split: str, store: FeatureStore | None = None
) -> None:
    """Add the block attribution: graphs of the first hesitation in three of the target's answers, and their truth."""
    word = token_id(pair, HESITATION)
    moments = [
        (*response.prompt, *response.tokens[: response.tokens.index(word)])
        for response in responses
        if word in response.tokens and not response.truncated
    ][:GRAPHS]
    graphs = folder / "graphs"
    with stage(folder, "attribution"):
        for earlier in (read_results(folder).get("attribution") or {}).get("moments", []):
            remove_graph(graphs, Path(earlier["page"]).stem)  # of an earlier evaluation; other graphs stay
        names = (name for i in count(1) if not (graphs / (name := f"moment-{i}")).exists())
        found = [
            examine_moment(pair, tokens, LogitTarget(word), graphs, name, store)
            for tokens, name in zip(moments, names, strict=False)
        ]
        mean = lambda values: sum(values) / len(values) if values else None  # noqa: E731
        write_results(
            folder,
            attribution={
                "graphs": len(found),
                "split": split,
                "conservation": max((m["residual"] for m in found), default=None),
                "influence_through_features": mean([m["influence_through_features"] for m in found]),
                "rank_correlation": {
                    name: mean([r for m in found if (r := m["rank_correlation"][name]) is not None])
                    for name in LINEARISATIONS
                },
                "moments": found,
            },
        )
