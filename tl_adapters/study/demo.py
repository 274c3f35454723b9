"""The demo: every stage of a study on the model organism."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tl_adapters import organism
from tl_adapters.circuits.search import SearchOptions
from tl_adapters.circuits.study import StudyOptions
from tl_adapters.config import LocalConfig, RunConfig, TrainingConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.pages.report import write_report
from tl_adapters.study.evaluate import evaluate_organism
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.study.run_size import StudyScale
from tl_adapters.study.train import train_stage
from tl_adapters.training.run_folder import require_new
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.results import changed_results

DEMO_SCALE = StudyScale(
    training_traces=8_000,
    problems=300,
    documents=300,
    baseline_documents=60,
    hesitation=(48, 32),
    circuit=StudyOptions(
        SearchOptions(per_round=8, documents=40), draws=1, probability_draws=3, curve_factors=(0.5, 1.0)
    ),
    training=TrainingConfig(local=LocalConfig(steps=600, max_tokens=50_000)),
)
"""Every stage, on fewer documents and problems than a study has, so that intervals are wider."""


def demo(
    folder: Path, scale: StudyScale, device: str = "auto", dtype: torch.dtype | None = None, progress: bool = True
) -> Path:
    """Runs every stage of a study on the model organism in a new ``folder`` and returns the path of report.html.

    Raises FolderExistsError where ``folder`` exists.
    """
    require_new(folder)
    pair = load_organism_pair(device, dtype)
    tokenizer = pair.model.tokenizer
    training = encode_traces(organism.reasoning_pairs("train", scale.training_traces, scale.training.seed), tokenizer)
    train_stage(Trainer(pair, training, scale.training, folder, origin=RunConfig(), progress=progress), folder)
    recipe = json.loads((organism.PAIR / "recipe.json").read_text())["hash"]
    with changed_results(folder) as results:
        results["pair"]["recipe"] = recipe
    evaluate_organism(pair, folder, scale, training)
    return write_report(folder)
