"""Training: a new run, a resumed run, the stage that demo and sweep share, and transcoders of one model's own MLPs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tl_adapters import organism
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.checkpoints.hf_model import load_hf_model
from tl_adapters.checkpoints.model_reference import model_commit
from tl_adapters.config import BadRows, ConfigError, RunConfig
from tl_adapters.data.documents import DataStatistics, EncodedDocuments
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.local_stage.transcoders import TranscoderFit, measure_transcoders, train_transcoders
from tl_adapters.models.build import build_model
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.processes import processes
from tl_adapters.study.open_run import open_data, open_held_out, open_pair
from tl_adapters.training.run_folder import RunFolder, require_new
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.devices import resolve_device
from tl_adapters.utils.files import require_absent, require_writable, write_text
from tl_adapters.utils.results import read_results, stage, versions, write_results
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.02
"""Share of the documents on which transcoders are measured, where neither configuration nor call names others."""


def train_run(config: RunConfig, folder: Path, device: str = "auto", progress: bool = True) -> None:
    """Makes a new run: surveys the data, trains, writes results.json.

    Raises FolderExistsError before anything is loaded.
    """

    def opened() -> tuple[PairedModel, EncodedDocuments, DataStatistics, list[Trace]]:
        require_new(folder)
        require_writable(folder)
        pair = open_pair(config, device)
        data = open_data(config, pair)
        return pair, data, data.log_survey(), data.validation()

    pair, data, statistics, validation = processes().together(opened)
    trainer = Trainer(pair, data, config.training, folder, validation=validation, origin=config, progress=progress)
    text = dumps({"schema_version": 1, **asdict(statistics)}, indent=1) + "\n"
    processes().on_main(lambda: write_text(folder / "data.json", text))
    train_stage(trainer, folder)


def resume_run(folder: Path, device: str = "auto", progress: bool = True, bad_rows: BadRows | None = None) -> None:
    """Resumes a run that was stopped. Raises RunFolderError where it would not be the same run.

    ``bad_rows`` replaces the run's own option, so that a row that stopped the run can be dropped from now on.
    """
    config = RunConfig.of_run(folder) if folder.is_dir() else RunConfig()
    RunFolder.open(folder).release()
    if bad_rows is not None:
        config = replace(config, data=replace(config.data, bad_rows=bad_rows))

    def opened() -> tuple[PairedModel, EncodedDocuments, list[Trace]]:
        pair = open_pair(config, device)
        data = open_data(config, pair)
        return pair, data, data.validation()

    pair, data, validation = processes().together(opened)
    trainer = Trainer.resume(pair, data, folder, validation=validation, progress=progress)
    if bad_rows is not None:
        processes().on_main(lambda: write_text(folder / "config.json", dumps(config.to_dict(), indent=1) + "\n"))
    log.info("resuming at step %d of %d", trainer.step, trainer.steps)
    train_stage(trainer, folder)


def train_stage(trainer: Trainer, folder: Path) -> None:
    """Trains to the end and adds the blocks pair, train, seeds and versions to results.json.

    The blocks of a finished run stay as they are.
    """
    if trainer.finished and "train" in read_results(folder):
        trainer.run()  # the run may have been stopped while it removed temporary files
        return
    with processes().held_by_main(stage(folder, "train")):
        trainer.run()
    processes().on_main(lambda: _record(trainer, folder))


def _record(trainer: Trainer, folder: Path) -> None:
    """Adds what training has cost, and on which models, to results.json."""
    config, noise = trainer.config, trainer.signal_to_noise()
    write_results(
        folder,
        pair={
            **pair_block(trainer.pair),
            "signal_to_noise": None if noise is None else [vars(of_layer) for of_layer in noise],
        },
        train={
            "stages": list(config.stages),
            "steps": trainer.steps,
            "tokens": trainer.tokens,
            "seconds": round(trainer.seconds, 1),
            "n_features": config.n_features,
        },
        seeds=[config.seed],
        versions=versions(),
    )


def pair_block(pair: PairedModel) -> dict[str, Any]:
    """What results.json says of the models of a run."""
    cfg = pair.model.cfg
    return {
        "base": pair.base_id,
        "target": pair.target_id,
        "n_layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
        "fingerprints": pair.fingerprints,
    }


# -- transcoders ------------------------------------------------------------------------------------------------------


def transcoders_run(
    config: RunConfig, out: Path, held_out: str | None = None, device: str = "auto", progress: bool = True
) -> list[TranscoderFit]:
    """Train transcoders of a model's MLPs, measure them on held-out documents, and write them into a new folder.

    Args:
        config: its target is the model ("" is the base of the model organism); the base is not read.
        out: folder to make: a SAELens folder per layer, and the set's own files (`AdapterSet.save_pretrained`).
        held_out: a .jsonl file or a dataset's name; None holds out a share of the documents.
        device: where the model is; "auto" is the first available of cuda, mps and cpu.
        progress: show a progress bar.

    Raises UserError for a model, documents or a folder that cannot be used, before anything is trained.
    """
    require_absent(out)
    require_writable(out)
    pair = _open_model(config, device)
    data = config.data
    if held_out is None and not data.validation_fraction and not data.validation_split:
        config = replace(config, data=replace(data, validation_fraction=HELD_OUT_SHARE))
    documents = open_data(config, pair)
    documents.log_survey()
    measured = documents.validation() if held_out is None else open_held_out(config, held_out, pair).traces()
    if not measured:
        raise DataError("No document is held out to measure on; give some with --held-out, or more training documents.")
    transcoders = train_transcoders(pair.model, documents, config.training, progress=progress)
    fits = measure_transcoders(
        pair.model,
        transcoders,
        measured,
        count=config.training.count,
        tokens_per_batch=config.training.tokens_per_batch,
    )
    transcoders.metadata = _described(transcoders.metadata, config, fits, len(measured))
    transcoders.save_pretrained(out)
    return fits


def format_fits(fits: Sequence[TranscoderFit]) -> str:
    """What was measured, as a Markdown table with a row per layer."""
    rows = [f"| {f.layer} | {'-' if f.fvu is None else f'{f.fvu:.3f}'} | {f.l0:.1f} | {f.alive:,} |" for f in fits]
    head = ["| layer | fraction of variance unexplained | L0 | features active at all |", "|---:|---:|---:|---:|"]
    return "\n".join([*head, *rows])


def _open_model(config: RunConfig, device: str) -> PairedModel:
    """The model as a pair without a base."""
    name = config.target or organism.BUILTIN_BASE
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    if config.device_map is not None:
        raise ConfigError("device_map is for pairs; a model alone is on one device: leave it out, with max_memory.")
    hf_model, tokenizer = load_hf_model(name, dtype=dtype, device=resolve_device(device))
    return PairedModel(build_model(hf_model, tokenizer, config.backend), None, target=name)


def _described(
    metadata: AdapterMetadata, config: RunConfig, fits: Sequence[TranscoderFit], documents: int
) -> AdapterMetadata:
    """The metadata with the model, the data and what was measured."""
    figures: dict[str, Any] = {}
    about = {"n": documents, "split": "held out", "seeds": [config.training.seed]}
    for fit in fits:
        figures[f"fraction of variance unexplained, layer {fit.layer}"] = {"value": fit.fvu, "unit": "", **about}
        figures[f"L0, layer {fit.layer}"] = {"value": fit.l0, "unit": "features per token", **about}
    name = config.target or organism.BUILTIN_BASE
    return replace(
        metadata,
        target=name,
        target_revision=model_commit(name),
        datasets=[config.data.source or organism.BUILTIN_TEXT],
        figures=figures,
    )
