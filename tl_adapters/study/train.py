"""Training as a stage of a study: a new run, a resumed run, and the stage that demo and sweep share."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

from tl_adapters.config import BadRows, RunConfig
from tl_adapters.study.open_run import open_data, open_pair
from tl_adapters.training.run_folder import RunFolder, require_new
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.files import require_writable, write_text
from tl_adapters.utils.results import read_results, stage, versions, write_results
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)


def train_run(config: RunConfig, folder: Path, device: str = "auto", progress: bool = True) -> None:
    """Makes a new run: surveys the data, trains, writes results.json.

    Raises FolderExistsError before anything is loaded.
    """
    require_new(folder)
    require_writable(folder)
    pair = open_pair(config, device)
    data = open_data(config, pair)
    statistics = data.log_survey()
    trainer = Trainer(
        pair, data, config.training, folder, validation=data.validation(), origin=config, progress=progress
    )
    write_text(folder / "data.json", dumps({"schema_version": 1, **asdict(statistics)}, indent=1) + "\n")
    train_stage(trainer, folder)


def resume_run(folder: Path, device: str = "auto", progress: bool = True, bad_rows: BadRows | None = None) -> None:
    """Resumes a run that was stopped. Raises RunFolderError where it would not be the same run.

    ``bad_rows`` replaces the run's own option, so that a row that stopped the run can be dropped from now on.
    """
    config = RunConfig.of_run(folder) if folder.is_dir() else RunConfig()
    RunFolder.open(folder).release()
    if bad_rows is not None:
        config = replace(config, data=replace(config.data, bad_rows=bad_rows))
    pair = open_pair(config, device)
    data = open_data(config, pair)
    trainer = Trainer.resume(pair, data, folder, validation=data.validation(), progress=progress)
    if bad_rows is not None:
        write_text(folder / "config.json", dumps(config.to_dict(), indent=1) + "\n")
    log.info("resuming at step %d of %d", trainer.step, trainer.config.steps)
    train_stage(trainer, folder)


def train_stage(trainer: Trainer, folder: Path) -> None:
    """Trains to the end and adds the blocks pair, train, seeds and versions to results.json.

    The blocks of a finished run stay as they are.
    """
    if trainer.finished and "train" in read_results(folder):
        trainer.run()  # the run may have been stopped while it removed temporary files
        return
    with stage(folder, "train"):
        trainer.run()
    pair, config, cfg, noise = trainer.pair, trainer.config, trainer.pair.model.cfg, trainer.signal_to_noise()
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
            "signal_to_noise": None if noise is None else [vars(of_layer) for of_layer in noise],
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
