"""What a pair of a published model's full size takes on an accelerator: ``make gpu``, or ``python benchmarks/gpu.py``.

Weights are random (`large_pair`), so nothing is downloaded. Every step writes one JSON file into OUT as soon as it is
done, with the device's name, its seconds, and the peak of memory beside what the planner predicts; a step that does not
fit into memory says so, and the next one runs. ``--record`` writes all files of OUT into results.json.

    tests       the tests of tl_adapters that run on a device, and the same numbers on it as on the CPU
    precision   training on the built-in pair, with adapters that compute in float32, TF32 and bfloat16
    forward     a forward pass of the routes, with adapters in float32 and bfloat16
    train       one step of the paper's objective, for documents of several lengths, and with blocks computed again
    local       the streaming local stage, and one revision of its features
    attribute   rows of attribution graphs, for prompts of several lengths
    collect     features collected over documents
    generate    tokens generated, greedily, in a batch
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from large_pair import SHAPES, configuration, install_adapters, random_documents, random_pair, random_tokens
from recorded import commit, here, record
from transformers import AutoTokenizer

from tl_adapters import organism
from tl_adapters.attribution.attribute import attribute, default_batch_size, estimated_memory
from tl_adapters.config import AdapterPrecision, LocalConfig, RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace, batches_by_length
from tl_adapters.features.collect import collect_features
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.generation.completions import complete
from tl_adapters.local_stage.regression_data import MLPDifferences
from tl_adapters.local_stage.stage import LocalStage
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.study.run_size import estimate_size
from tl_adapters.training.end_to_end_stage import EndToEndStage
from tl_adapters.training.objective import held_out_terms
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.files import write_text
from tl_adapters.utils.precision import adapter_dtype

Measured = dict[str, Any]
L0 = 1.4
"""Active features per token and layer of random adapters, as the sparsest set that the paper published."""


class Bench:
    """The pair, and what all steps share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.small = args.shape == "tiny"
        longest = max(*args.lengths, *args.prompts)
        self.started = time.perf_counter()
        # The tokenizer of the organism has a chat template and few tokens, all of which the pair embeds.
        tokenizer = AutoTokenizer.from_pretrained(organism.BASE)
        self.pair: PairedModel = random_pair(args.shape, self.device, longest, tokenizer)
        self.described = configuration(args.shape, longest)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], object], repeats: int = 1) -> float:
        """Seconds of one call; it is called once more, before, if it is repeated."""
        if repeats > 1:
            act()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            act()
        self.synchronize()
        return (time.perf_counter() - started) / repeats

    def peak(self) -> float | None:
        """The most memory in use since `fresh`, in GB; None where it is not counted."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None

    def fresh(self) -> None:
        """Free what an earlier step has left, and count anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def adapters(self) -> float:
        """Install new adapters; returns their active features per token and layer."""
        return install_adapters(self.pair, self.args.features, L0)

    # -- steps --------------------------------------------------------------------------------------------------------

    def built(self) -> Iterator[tuple[str, Measured]]:
        """The pair itself."""
        self.synchronize()
        cfg = self.pair.model.cfg
        shape = {name: getattr(cfg, name) for name in ("n_layers", "d_model", "d_mlp", "d_vocab")}
        yield "pair", {"seconds": time.perf_counter() - self.started, "gb": self.peak(), **shape}

    def precision(self) -> Iterator[tuple[str, Measured]]:
        """Loss curves, KL and L0 on the built-in pair by the precision of its adapters, the model in bfloat16."""
        steps, recipe = 10 if self.small else 200, RunConfig.load("builtin_end_to_end").training
        pair = load_organism_pair(str(self.device), torch.bfloat16)
        limit = pair.model.cfg.n_ctx
        traces, held_out = (
            encode_traces(organism.reasoning_pairs(split, n, 0), pair.model.tokenizer, limit)
            for split, n in (("train", 100 if self.small else 6000), ("tune", 100))
        )
        found: Measured = {}
        for precision in ("float32", "tf32", "bfloat16"):
            losses: list[float] = []
            options = replace(recipe, steps=steps, adapter_precision=precision)
            trainer = Trainer(pair, traces, options, progress=False)
            started = time.perf_counter()
            trainer.run(lambda step, terms, losses=losses: losses.append(float(terms.total)))
            seconds = time.perf_counter() - started
            batches = [batch for _, batch in batches_by_length(held_out, 1024, options.count)]
            terms = held_out_terms(pair, batches)
            found[precision] = {"seconds": seconds, "loss_every_20": losses[::20], "output_kl": terms["output_kl"],
                                "nmse": terms["nmse"], "l0": sum(terms["l0"])}  # fmt: skip
        yield "precision", {"steps": steps, "model": "bfloat16", **found}

    def forward(self) -> Iterator[tuple[str, Measured]]:
        """Forward passes of the routes."""
        tokens = random_tokens(self.pair, 1, min(4096, self.pair.model.cfg.n_ctx)).to(self.device)
        found: dict[str, float] = {}

        def run() -> None:
            self.pair.model(tokens, return_type=None)

        for dtype in (torch.float32, torch.bfloat16):
            self.adapters()
            self.pair.installed_adapters().compute_in(dtype)
            for route in ("target", "hybrid", "replacement"):
                with torch.no_grad(), self.pair.routed(route):
                    found[f"{route}, adapters in {str(dtype).removeprefix('torch.')}"] = self.seconds(run, 3)
        yield "forward", {"tokens": tokens.numel(), "seconds": found}

    def train(self) -> Iterator[tuple[str, Measured]]:
        """A step of the paper's objective, Adam included, by the length of its one document."""
        for length, precision, recompute in self._training_options():
            training = TrainingConfig(
                stages=("end_to_end",), n_features=self.args.features, tokens_per_batch=length, steps=1000,
                recompute=recompute, adapter_precision=precision,
            )  # fmt: skip
            self.fresh()
            self.adapters()
            self.pair.installed_adapters().compute_in(adapter_dtype(torch.bfloat16, self.device, precision))
            documents = random_documents(self.pair, 2, length)
            stage = EndToEndStage(self.pair, self._order(documents, training), training)
            measured: Measured = {"tokens": length, "predicted_gb": self._predicted_gb(training, length)}
            name = "-".join(["train", str(length), precision, *(["recompute"] if recompute else [])])
            yield from self._measure(name, measured, lambda: stage.advance(False), 2)
            del stage

    def _training_options(self) -> Iterator[tuple[int, AdapterPrecision, bool]]:
        for length in self.args.lengths:
            yield length, "bfloat16", False
            yield length, "bfloat16", True
        for precision in ("float32", "tf32"):
            yield self.args.lengths[0], precision, False

    def _predicted_gb(self, training: TrainingConfig, length: int) -> float:
        config = RunConfig(dtype="bfloat16", training=training)
        return estimate_size(config, self.described, length, self.device).memory / 1e9

    def local(self) -> Iterator[tuple[str, Measured]]:
        """The start of the streaming local stage, which fills its buffer; its steps; one revision of one layer."""
        per_step = 128 if self.small else 2048
        options = LocalConfig(
            steps=40, tokens_per_step=per_step, max_tokens=8 * per_step, streaming=True, revisions=(), polish=False
        )
        training = TrainingConfig(
            n_features=self.args.features, stages=("local",), local=options, tokens_per_batch=per_step
        )
        self.fresh()
        self.adapters()
        length = min(per_step, self.pair.model.cfg.n_ctx)
        documents = random_documents(self.pair, 60, length)
        stages: list[LocalStage] = []

        def fill() -> None:
            data, order = MLPDifferences(self.pair), self._order(documents, training)
            stages.append(LocalStage(data, order, training, options))

        measured: Measured = {"predicted_gb": self._predicted_gb(training, length)}
        yield from self._measure("local-start", {"tokens": 8 * per_step, **measured}, fill, 1)
        (stage,) = stages
        yield from self._measure("local", {"tokens": 10 * per_step, **measured}, lambda: stage.advance(10), 2)

        def revise() -> None:
            layer = stage.layers[0]
            with layer.layer.adapter.computing_in(None):
                layer.revise(20, births=True)

        yield from self._measure("local-revision", {"tokens": 8 * per_step, "layers": 1}, revise, 1)

    def attribute(self) -> Iterator[tuple[str, Measured]]:
        """Attribution graphs by the length of the prompt; rows are the part that grows with a graph."""
        for length in self.args.prompts:
            self.fresh()
            l0, tokens = self.adapters(), random_tokens(self.pair, 1, length)[0]
            rows, resident = 16 if self.small else 256, self._resident()
            graphs: list[Any] = []

            def graph(tokens: torch.Tensor = tokens, rows: int = rows, graphs: list[Any] = graphs) -> None:
                graphs[:] = [attribute(self.pair, tokens, max_feature_nodes=rows, progress=False)]

            measured: Measured = {"tokens": length, "l0": l0, "rows": rows}
            for name, step in self._measure(f"attribute-{length}", measured, graph, 1):
                if graphs:
                    step["active_features"] = active = graphs[0].about["active_features"]
                    beside = estimated_memory(self.pair, length, active, default_batch_size(self.pair, length), rows)
                    step["predicted_gb"] = (resident + beside) / 1e9
                yield name, step

    def collect(self) -> Iterator[tuple[str, Measured]]:
        """Features collected over documents, in memory."""
        self.fresh()
        self.adapters()
        length = min(1024, self.pair.model.cfg.n_ctx)
        documents = random_documents(self.pair, 2 if self.small else 20, length)
        options = StoreOptions(tokens_per_batch=4 * length)
        measured: Measured = {"tokens": length * len(documents)}
        yield from self._measure(
            "collect", measured, lambda: collect_features(self.pair, documents, options=options, progress=False), 1
        )

    def generate(self) -> Iterator[tuple[str, Measured]]:
        """Tokens generated greedily by the target and the replacement."""
        self.adapters()
        prompts, new = random_tokens(self.pair, 16, 64).tolist(), 8 if self.small else 64
        for route in ("target", "replacement"):
            self.fresh()
            with self.pair.routed(route):
                yield from self._measure(
                    f"generate-{route}",
                    {"tokens": 16 * new, "batch": 16},
                    lambda: complete(self.pair.model, prompts, max_new_tokens=new, batch_size=16, stop_at=[]),
                    1,
                )

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _resident(self) -> int:
        """Bytes of the pair and its adapters."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _order(self, documents: list[Trace], training: TrainingConfig) -> BatchOrder:
        source = TracesInMemory(documents, training.count)
        return BatchOrder(source, training.tokens_per_batch, training.seed, training.count)

    def _measure(
        self, name: str, measured: Measured, act: Callable[[], object], repeats: int
    ) -> Iterator[tuple[str, Measured]]:
        try:
            measured["seconds"] = self.seconds(act, repeats)
            measured["tokens_per_second"] = measured["tokens"] / measured["seconds"]
        except torch.OutOfMemoryError as error:
            measured["out_of_memory"] = str(error).partition(". GPU")[0]
        measured["gb"] = self.peak()
        yield name, measured


STEPS = ("precision", "forward", "train", "local", "attribute", "collect", "generate")


def run_tests(out: Path) -> bool:
    """The tests of a device, in a process of their own; returns whether they passed."""
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/models/test_devices.py",
        "-k",
        "real_cuda",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "TL_ADAPTERS_TEST_CUDA": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    sys.stdout.write(done.stdout[-6000:])
    write_step(out, "tests", {"passed": done.returncode == 0, "last_line": done.stdout.strip().rpartition("\n")[2],
                              "seconds": time.perf_counter() - started})  # fmt: skip
    return done.returncode == 0


def write_step(out: Path, name: str, measured: Measured) -> None:
    """Write and print one step."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    step = {"device": where, "commit": commit(), "made_on": here(), **measured}
    write_text(out / f"{name}.json", json.dumps(step, indent=1) + "\n")
    sys.stdout.write(f"{name}: {json.dumps(step)}\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the steps' JSON files")
    parser.add_argument("--steps", nargs="+", choices=["tests", *STEPS], default=["tests", *STEPS])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--features", type=int, default=8192, help="features per layer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 10_000], help="tokens of a document")
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 2000, 6000], help="tokens of a prompt")
    parser.add_argument("--record", action="store_true", help="write all steps of OUT to benchmarks/results.json")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    passed = run_tests(args.out) if "tests" in args.steps else True
    wanted = [name for name in STEPS if name in args.steps]
    if wanted:
        bench = Bench(args)
        for name in ("built", *wanted):
            for step, measured in getattr(bench, name)():
                write_step(args.out, step, measured)
    if args.record:
        steps = {path.stem: json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))}
        commits, machines = ([step.pop(name) for step in steps.values()] for name in ("commit", "made_on"))
        record("gpu", {"steps": steps}, commits, measured_on=machines[0])
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
