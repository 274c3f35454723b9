"""Training adapters: Adam on the five-term objective, one cut a step (arXiv 2602.20904, section 3.2 and appendix).

    for each step:
        learning rate: linear warm-up, then a cosine to zero;  l1 weight: linear warm-up
        draw a batch of traces and a cut
        value and gradient of the objective (objective.py)
        clip, step

Batches and cuts are pure functions of seed and step, so a run that stops resumes where it was. A run folder holds
config.json and versions.json (written once), metrics.jsonl, checkpoints/ and, at the end, adapters/.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tl_adapters.adapter import AdapterSet
from tl_adapters.atomic import new_folder, write_text
from tl_adapters.config import TrainingConfig
from tl_adapters.data import BatchOrder, Trace
from tl_adapters.errors import UserError
from tl_adapters.objective import StepTerms, shared_prefix_step
from tl_adapters.paired import PairedModel
from tl_adapters.results import versions

log = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 2


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


def warmup_cosine(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the peak learning rate at ``step`` (from 0): linear rise, then a cosine to 0."""
    warmup = max(1.0, warmup_fraction * steps)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear_warmup(step: int, steps: int, fraction: float) -> float:
    """Factor of the l1 weight at ``step`` (from 0): linear rise to 1."""
    return min(1.0, (step + 1) / max(1.0, fraction * steps))


class Trainer:
    """One training run. ``pair`` gets fresh adapters, which `run` trains.

    Args:
        pair: base and target; its weights stay frozen.
        traces: the training documents.
        config: the options.
        folder: the run folder to make; None trains in memory and writes nothing.
        progress: show a progress bar.

    Raises:
        FolderExistsError: ``folder`` exists; `Trainer.resume` goes on with a run.
        DataError: there are no traces.
    """

    def __init__(
        self,
        pair: PairedModel,
        traces: Sequence[Trace],
        config: TrainingConfig,
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.pair, self.config, self.progress = pair, config, progress
        self.folder = None if folder is None else Path(folder)
        self.order = BatchOrder(traces, config.tokens_per_batch, config.seed)
        self.adapters = pair.new_adapters(config.n_features, seed=config.seed)
        self.optimizer = torch.optim.Adam(
            self.adapters.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
        )
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        if self.folder is not None:
            with new_folder(self.folder) as out:
                (out / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
                (out / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
                (out / "metrics.jsonl").touch()

    @classmethod
    def resume(cls, pair: PairedModel, traces: Sequence[Trace], folder: str | Path, progress: bool = True) -> Trainer:
        """Go on from the latest checkpoint of a run folder, as if it had never stopped.

        ``pair`` and ``traces`` must be those the run was started with. Raises TrainingError without a checkpoint.
        """
        folder = Path(folder)
        checkpoints = sorted((folder / "checkpoints").glob("step-*"))
        if not checkpoints:
            raise TrainingError(f"{folder} holds no checkpoint to resume from; start the run anew in another folder.")
        trainer = cls(pair, traces, TrainingConfig.load(folder / "config.json"), progress=progress)
        trainer.folder = folder
        trainer._load_checkpoint(checkpoints[-1])
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= trainer.step]
        write_text(folder / "metrics.jsonl", "".join(kept))
        return trainer

    def run(self, on_step: Callable[[int, StepTerms], None] | None = None) -> AdapterSet:
        """Train to the end and return the adapters; with a folder, they are saved there.

        Raises TrainingError where a term is not finite; the last checkpoint is kept.
        """
        config, began = self.config, time.perf_counter() - self.seconds
        # Where the output is a file, not a terminal, a line every ten seconds is enough.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(
            total=config.steps, initial=self.step, desc="train", disable=not self.progress, mininterval=interval
        ) as bar:
            while self.step < config.steps:
                log_this = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
                terms = self._one_step(want_l0=log_this)
                self.step += 1
                self.seconds = time.perf_counter() - began
                if on_step is not None:
                    on_step(self.step, terms)
                if log_this:
                    self._record(terms, bar)
                if self.step % config.checkpoint_every == 0 and self.step < config.steps:
                    self._save_checkpoint()
                bar.update()
        if self.folder is not None:
            self.adapters.save_pretrained(self.folder / "adapters")
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return self.adapters

    def _one_step(self, want_l0: bool) -> StepTerms:
        config, step = self.config, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warmup_cosine(step, config.steps, config.warmup_fraction)
        l1_weight = config.l1_weight * linear_warmup(step, config.steps, config.l1_warmup_fraction)
        weights = config.loss_weights
        batch = self.order[step].to(self.pair.model.W_E.device)
        cut = random.Random(f"{config.seed}-cut-{step}").randint(weights.lowest_cut, self.pair.n_layers)
        terms = shared_prefix_step(self.pair, batch, cut, weights, l1_weight, want_l0)
        norm = torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), config.grad_clip)
        if not (torch.isfinite(terms.total) and torch.isfinite(norm)):
            raise TrainingError(self._not_finite(terms, float(norm)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += int(batch.attention_mask.sum())
        return terms

    def _not_finite(self, terms: StepTerms, norm: float) -> str:
        names = ("output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity")
        bad = [name for name in names if not math.isfinite(float(getattr(terms, name)))]
        what = ", ".join(bad) or f"the gradient's norm ({norm})"
        kept = f" Checkpoints in {self.folder} are kept." if self.folder else ""
        return f"Step {self.step + 1}: {what} is not finite. Lower lr, or look at the data of this step.{kept}"

    def _record(self, terms: StepTerms, bar: Any) -> None:
        assert terms.l0 is not None
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "lr": self.optimizer.param_groups[0]["lr"],
            **{
                name: float(getattr(terms, name))
                for name in ("total", "output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity")
            },
            "l0": terms.l0,
        }
        mean_l0 = sum(terms.l0) / len(terms.l0)
        figures = {"kl": f"{line['output_kl']:.4f}", "nmse": f"{line['nmse']:.4f}", "l0": f"{mean_l0:.1f}"}
        bar.set_postfix(figures, refresh=False)
        if self.folder is not None:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        if self.folder is None:
            return
        where = self.folder / "checkpoints" / f"step-{self.step:08d}"
        state = {
            f"{index}.{key}": value.contiguous()
            for index, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }
        counters = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        with new_folder(where) as out:
            self.adapters.save_pretrained(out / "adapters")
            save_file(state, out / "optimizer.safetensors")
            (out / "counters.json").write_text(json.dumps(counters))
        for old in sorted(where.parent.glob("step-*"))[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old)

    def _load_checkpoint(self, where: Path) -> None:
        saved = AdapterSet.from_pretrained(where / "adapters", device=self.pair.model.W_E.device)
        self.adapters.load_state_dict(saved.state_dict())
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(where / "optimizer.safetensors").items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        counters = json.loads((where / "counters.json").read_text())
        self.step, self.tokens, self.seconds = counters["step"], counters["tokens"], counters["seconds"]


def train(
    pair: PairedModel,
    traces: Sequence[Trace],
    config: TrainingConfig | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> AdapterSet:
    """Train adapters for ``pair``: `Trainer` in one call; keyword options replace fields of ``config``."""
    config = replace(config or TrainingConfig(), **options)
    return Trainer(pair, traces, config, folder, progress).run()
