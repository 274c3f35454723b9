"""Evaluation stages of a study: faithfulness, behavior and baselines, each a block of results.json."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tl_adapters import organism
from tl_adapters.checkpoints.compatibility import require_same_ids
from tl_adapters.checkpoints.hf_model import load_hf_model
from tl_adapters.checkpoints.model_files import read_vocabulary
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.baselines import Correction, baseline_kl, difference_directions, low_rank, top_neurons
from tl_adapters.evaluation.faithfulness import DocumentSums, faithfulness_block, features_block, measure_faithfulness
from tl_adapters.evaluation.response_metrics import correctness, measure_responses
from tl_adapters.generation.responses import Response, respond
from tl_adapters.models.build import build_model
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.processes import processes
from tl_adapters.utils.bootstrap import bootstrap_ratio, bootstrap_recovered
from tl_adapters.utils.clustered_intervals import paired_difference
from tl_adapters.utils.results import changed_results, read_results, stage, write_output, write_results
from tl_adapters.utils.strict_json import dumps

LOW_RANKS = (1, 2, 4, 8, 16, 32)
"""Ranks of the low-rank baseline."""
N_SHOWN_ANSWERS = 4
"""Answers that answers.jsonl holds for the report."""


def faithfulness_stage(pair: PairedModel, traces: Sequence[Trace], folder: Path, split: str) -> DocumentSums:
    """Adds the block faithfulness, and the block features where no features were collected, measured on ``traces``."""
    seeds = tuple(read_results(folder).get("seeds", [0]))

    def record() -> None:
        with changed_results(folder) as results:
            results["faithfulness"] = faithfulness_block(sums, split, seeds)
            if "documents" not in results.get("features", {}):  # otherwise it holds more than this stage knows
                results["features"] = features_block(sums)

    with processes().held_by_main(stage(folder, "faithfulness")):
        sums = measure_faithfulness(pair, traces)
        processes().on_main(record)
    return sums


def behavior_stage(
    pair: PairedModel, problems: Sequence[organism.Problem], n_compared: int, folder: Path, max_new_tokens: int = 160
) -> list[Response]:
    """Adds the block behaviour and answers.jsonl; returns the target's responses to all ``problems``.

    The real base, the hybrid and the replacement answer the first ``n_compared`` problems too. The real base is loaded
    here once and freed.
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
        # The real base reads the target's token ids, so both vocabularies must agree on them.
        require_same_ids(read_vocabulary(organism.BASE), pair.model.tokenizer.get_vocab())
        base = build_model(
            *load_hf_model(
                organism.BASE, dtype=pair.model.cfg.dtype, device=pair.device, tokenizer=pair.model.tokenizer
            ),
            pair.backend.name,
        )
        responses["base"] = answer(base, compared)
        right = {name: correctness(r) for name, r in responses.items()}
        seeds = tuple(read_results(folder).get("seeds", [0]))
        recovered = {
            floor: bootstrap_recovered(right["replacement"], right[floor], right["target"]).measurement(
                len(compared), f"share of the accuracy gained over the {floor}", split, seeds
            )
            for floor in ("hybrid", "base")
        }
        gained = {
            floor: {
                model: paired_difference(right[model], right[floor]).measurement(
                    len(compared), "accuracy", split, seeds
                )
                for model in ("target", "replacement")
            }
            for floor in ("hybrid", "base")
        }
        rates = {name: measure_responses(r, split) for name, r in responses.items()}
        write_results(folder, behaviour={**rates, "recovered": recovered, "gained": gained})
        shown = sorted(range(len(compared)), key=lambda i: -min(responses["target"][i].hesitations, 2))[
            :N_SHOWN_ANSWERS
        ]
        answers = [
            {"question": compared[i].question, **{name: r[i].text for name, r in responses.items()}} for i in shown
        ]
        write_output(folder, "answers.jsonl", "".join(dumps(a) + "\n" for a in answers))
    return target


def baselines_stage(
    pair: PairedModel, fit: Sequence[Trace], traces: Sequence[Trace], sums: DocumentSums, folder: Path, split: str
) -> None:
    """Adds the block baselines: KL of the adapters and of simpler corrections of equal sparsity, on the same traces."""
    l0 = sums.l0.ceil().int().clamp(min=1).tolist()
    seeds = tuple(read_results(folder).get("seeds", [0]))

    def row(name: str, numbers: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        return {
            "name": name,
            "kl": bootstrap_ratio(*numbers).measurement(len(traces), "nats per response token", split, seeds),
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
        for rank in [r for r in LOW_RANKS if r < pair.model.cfg.d_model]:
            projected = [low_rank(mlp, d[:, :rank]) for mlp, d in zip(pair.mlps, directions, strict=True)]
            by_rank[rank] = row(f"the MLP difference at rank {rank}", baseline_kl(pair, projected, traces))
        rows += by_rank.values()
        adapters_kl = rows[0]["kl"].value
        sufficient = [rank for rank, r in by_rank.items() if r["kl"].value <= adapters_kl]
        write_results(folder, baselines={"n": l0, "rows": rows, "rank_for_same_kl": min(sufficient, default=None)})
