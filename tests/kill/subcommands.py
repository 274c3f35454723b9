"""The long subcommands on the smallest sizes that reach every file they write, and what each is started on."""

from __future__ import annotations

import atexit
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import conftest
import yaml
from helpers.fake_chat import FakeChat
from helpers.judges import knowing

import tl_adapters.cli.evaluate
import tl_adapters.study.benchmark  # noqa: F401
import tl_adapters.study.demo as study_demo
import tl_adapters.study.evaluate as study_evaluate
import tl_adapters.study.open_run as study_open_run
from tl_adapters import organism
from tl_adapters.circuits.search import SearchOptions
from tl_adapters.circuits.study import StudyOptions
from tl_adapters.cli.main import main
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.features.store_description import StoreOptions
from tl_adapters.interop.circuit_tracer import listed_graphs
from tl_adapters.pages.graph_page import require_new_graph
from tl_adapters.study.features import features_run
from tl_adapters.study.run_size import StudyScale
from tl_adapters.utils.files import locked, working_folder

TRAINING = {
    "stages": ["end_to_end"],
    "steps": 12,
    "n_features": 48,
    "tokens_per_batch": 512,
    "log_every": 1,
    "checkpoint_every": 2,
}
SCALE = StudyScale(
    training_traces=60,
    problems=6,
    documents=8,
    baseline_documents=2,
    max_new_tokens=48,
    hesitation=(12, 6),
    circuit=StudyOptions(SearchOptions(per_round=8, documents=6), draws=1, probability_draws=1, curve_factors=(1.0,)),
    training=replace(RunConfig.from_dict({"training": TRAINING}).training, steps=6),
)


@dataclass(frozen=True)
class Subcommand:
    """One subcommand, run in a folder of its own that holds a copy of what it needs."""

    run: Callable[[Path], int | None]
    """Run it, or run it again after a kill; in the folder, with relative paths, so that all runs write the same."""
    kills: int = 5
    """How often `make kill` kills it."""
    without: str = ""
    """What is taken out of the folder before: the finished run with features is there as "run"."""


def shrink() -> None:
    """Make the sizes that the command line cannot set small, in this process and those that it forks; start a judge."""
    study_open_run.ORGANISM_TRACES = 60
    study_demo.DEMO_SCALE = SCALE
    study_evaluate.StudyScale = lambda: SCALE  # type: ignore[assignment, misc]
    judge_address()


def prepare(folder: Path) -> None:
    """Write the inputs of all subcommands, and a finished run with its features."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
    pairs = organism.reasoning_pairs("report", 40)
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in pairs]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    code = main(["train", "--config", "config.yaml", "--out", "run", "--quiet"])
    assert code == 0, "the run that the others start from"
    assert collect(folder) == 0


def train(folder: Path) -> int:
    how = ["--resume", "trained"] if (folder / "trained").exists() else ["--config", "config.yaml", "--out", "trained"]
    return main(["train", *how, "--quiet"])


def collect(folder: Path) -> int:
    options = StoreOptions(examples=3, sample=3, before=3, after=2, tokens_per_part=1200, tokens_per_batch=600)
    try:
        features_run(Path("run"), "documents.jsonl", options=options, progress=False)
    except UserError as error:  # as the command line does it, which has no option for the size of a part
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def attribute(folder: Path) -> int:
    graphs = folder / "run" / "graphs"
    if graphs.exists():
        require_new_graph(graphs, "another")
        list_of_graphs = graphs / "circuit-tracer" / "graph-metadata.json"
        with locked(graphs / "graphs"), working_folder(graphs / "graphs"), locked(list_of_graphs):
            pass  # as whoever writes the next graph does
    if "one" in listed_graphs(graphs / "circuit-tracer"):  # it was killed after its last write
        return 0
    prompt = ["--prompt", "<|user|>12+7=?", "--max-feature-nodes", "20"]
    return main(["attribute", "run", *prompt, "--name", "one", "--quiet"])


def export(to: str) -> Callable[[Path], int]:
    def run(folder: Path) -> int:
        return 0 if (folder / to).exists() else main(["export", "run", "--to", to, "--out", to, *extra, "--quiet"])

    extra = ["--model-id", "mine"] if to == "neuronpedia" else []
    return run


@cache
def judge_address() -> str:
    """The address of one server for all processes: it is part of every cached reply, which are compared."""
    server = FakeChat(knowing)
    atexit.register(server.__exit__, None, None, None)
    return f"{server.__enter__().server.url}/v1"


def label(folder: Path) -> int:
    judge = ["--base-url", judge_address(), "--model", "judge", "--judge", "6", "--retest", "2"]
    return main(["label", "run", *judge, "--concurrency", "2", "--quiet"])


def transcoders(folder: Path) -> int:
    options = ["--config", "config.yaml", "--set", "local.steps=4"]
    return 0 if (folder / "own").exists() else main(["transcoders", *options, "--out", "own", "--quiet"])


def open_set(folder: Path) -> int:
    return 0 if (folder / "opened").exists() else main(["open", "run/adapters", "--out", "opened", "--quiet"])


def demo(folder: Path) -> int:
    """A second demo takes the next free name, so what a killed one left is put out of the way, as a user would."""
    if (folder / "again").exists() and (folder / "demo").exists():
        shutil.rmtree(folder / "demo")
    return main(["demo", "--out", "demo", "--quiet"])


SUBCOMMANDS = {
    "train": Subcommand(train, kills=30, without="run"),
    "features": Subcommand(collect, kills=30, without="run/features"),
    "evaluate": Subcommand(lambda folder: main(["evaluate", "run", "--quiet"])),
    "hesitation": Subcommand(lambda folder: main(["hesitation", "run", "--limit", "16", "--quiet"])),
    "benchmark": Subcommand(
        lambda folder: main(["benchmark", "run", "--limit", "12", "--max-new-tokens", "24", "--quiet"])
    ),
    "sweep": Subcommand(
        lambda folder: main(
            ["sweep", "--config", "config.yaml", "--over", "seed=0,1", "--documents", "4", "--out", "sweep", "--quiet"]
        ),
        without="run",
    ),
    "transcoders": Subcommand(transcoders, without="run"),
    "open": Subcommand(open_set),
    "label": Subcommand(label),
    "attribute": Subcommand(attribute),
    "export --to saelens": Subcommand(export("saelens")),
    "export --to neuronpedia": Subcommand(export("neuronpedia")),
    "export --to hybrid": Subcommand(export("hybrid")),
    "demo": Subcommand(demo, without="run"),
}
assert conftest.small_scale  # the tests' settings: no network, types checked
