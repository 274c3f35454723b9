"""The paper's own model: the five published adapter sets of DeepSeek-R1-Distill-Qwen-7B (arXiv 2602.20904).

    python examples/r1_distill_7b/study.py runs/r1        everything, on one GPU of 80 GB
    python examples/r1_distill_7b/study.py runs/r1 --stages open faithfulness   L0 against the number in each name
    python examples/r1_distill_7b/study.py runs/r1 --table                      the table of what was measured so far

Each set becomes a run folder of its own in the folder that is given, so every subcommand of tl-adapters takes it. A
stage whose results are there is not run again. table.md beside the runs has the paper's figures and the measured ones.

    open           the set is downloaded, loaded into its pair, and written as a run
    faithfulness   L0, KL and NMSE by layer, on documents of the training data that were held out
    features       the features of the studied set, their examples and labels
    circuit        the hesitation circuit of the studied set: found, and removed and inserted on benchmark problems
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_adapters import load_traces
from tl_adapters.circuits.search import SearchOptions
from tl_adapters.circuits.study import StudyOptions
from tl_adapters.circuits.subject import halves
from tl_adapters.config import RunConfig
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.tasks import load_problems
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.by_name import open_set
from tl_adapters.study.evaluation_stages import faithfulness_stage
from tl_adapters.study.features import features_stage
from tl_adapters.study.hesitation import hesitation_stage
from tl_adapters.study.open_run import open_run
from tl_adapters.utils.files import write_text
from tl_adapters.utils.results import read_results

AUTHOR = "nathu0/transcoder-adapters-R1-Distill-Qwen-7B"
L1_WEIGHTS_AND_L0 = [("0.01", "0.1"), ("0.003", "0.4"), ("0.001", "1.4"), ("0.0003", "4.3"), ("0.0001", "10.3")]
SETS = [f"{AUTHOR}-l1w{weight}-l0-{l0}" for weight, l0 in L1_WEIGHTS_AND_L0]
"""The published sets; each name says the weight of the L1 term and the L0."""
STUDIED = f"{AUTHOR}-l1w0.001-l0-1.4"
"""The set whose features and circuit the paper studies."""
STAGES = ("open", "faithfulness", "features", "circuit")
NOT_RUN = "not yet run"
SPLIT = "held out"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    figure: str
    """What is measured."""
    paper: str
    """The paper's figure; "-" where it gives none."""
    read: Callable[[dict[str, Any]], str]
    """The measured figure, from the results of a run. KeyError where its stage was not run."""


def number(figure: dict[str, Any], form: str = "{:.2f}") -> str:
    """A measured figure with its 95 % interval."""
    low, high = figure.get("low"), figure.get("high")
    value = form.format(figure["value"])
    return value if low is None or high is None else f"{value} ({form.format(low)} to {form.format(high)})"


def mean(figures: Sequence[dict[str, Any]]) -> float:
    return sum(figure["value"] for figure in figures) / len(figures)


def arm(group: str, name: str, key: str, form: str = "{:.1f}") -> Callable[[dict[str, Any]], str]:
    """A figure of the answers under one condition of the circuit's study."""

    def read(results: dict[str, Any]) -> str:
        block = results["hesitation"]
        if group not in block:
            return "no circuit: the target's answers have too few onsets"
        answers = block[group][name]
        return number({"value": answers[key], **answers["ci"].get(key, {})}, form)

    return read


def accepted(l0: str) -> Callable[[dict[str, Any]], str]:
    """Whether the measured L0 is the one that a set's name says, to its last digit or a tenth of it."""

    def read(results: dict[str, Any]) -> str:
        measured, said = mean(results["faithfulness"]["l0_all_tokens"]), float(l0)
        return "yes" if abs(measured - said) <= max(0.05, 0.1 * said) else f"no: {measured / said - 1:+.0%}"

    return read


def faithfulness_rows(name: str) -> list[Row]:
    """What every set is compared by."""
    _, says, l0 = name.rpartition("-l0-")
    return [
        Row("L0 per token and layer", l0 if says else "-", lambda r: f"{mean(r['faithfulness']['l0_all_tokens']):.2f}"),
        *([Row("L0 is that of the name, to 0.05 or a tenth", "yes", accepted(l0))] if says else []),
        Row("KL(target || replacement), nats", "-", lambda r: number(r["faithfulness"]["kl"]["replacement"], "{:.4f}")),
        Row("as a share of the hybrid's KL", "-", lambda r: number(r["faithfulness"]["kl_of_hybrid"], "{:.3f}")),
        Row("NMSE after the last layer", "-", lambda r: number(r["faithfulness"]["nmse"][-1], "{:.4f}")),
        Row(
            "largest KL with adapters on some layers, of that on all",
            "at most 1",
            lambda r: f"{max(x['value'] for part in r['faithfulness']['partial_of_full'].values() for x in part):.2f}",
        ),
    ]


def by_layer(name: str, results: dict[str, Any]) -> str:
    """The table of a set's figures by layer, in Markdown."""
    block = results["faithfulness"]
    head = ["layer", "L0", "NMSE after it", "KL with adapters up to it", "KL with its adapter alone"]
    columns = [block["l0_all_tokens"], block["nmse"][1:], block["kl_first"], block["kl_only"]]
    lines = [f"\n## {name}, by layer\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for layer, figures in enumerate(zip(*columns, strict=True)):
        lines.append(f"| {layer} | {' | '.join(number(figure, '{:.4f}') for figure in figures)} |")
    return "\n".join(lines) + "\n"


CIRCUIT_ROWS = [
    Row("features that fired", "-", lambda r: f"{r['features']['alive']:,} of {r['features']['total']:,}"),
    Row("features of the circuit", "5,623 of 229,376", lambda r: f"{r['hesitation']['circuit']['n']:,}"),
    Row('"wait" per 1,000 tokens, replacement', "5.5", arm("necessity", "none", "hesitation_per_1k")),
    Row("without output features", "1.5", arm("necessity", "output", "hesitation_per_1k")),
    Row("without the circuit", "0.5", arm("necessity", "circuit", "hesitation_per_1k")),
    Row("response length in tokens, replacement", "7,800", arm("necessity", "none", "length", "{:,.0f}")),
    Row("without the circuit", "3,500", arm("necessity", "circuit", "length", "{:,.0f}")),
    Row("accuracy, replacement", "-", arm("necessity", "none", "accuracy", "{:.2f}")),
    Row(
        "without the circuit",
        "unchanged on three of four benchmarks",
        arm("necessity", "circuit", "accuracy", "{:.2f}"),
    ),
    Row('"wait" per 1,000, hybrid with template features', "0.2", arm("sufficiency", "template", "hesitation_per_1k")),
    Row("hybrid with output features", "1.5", arm("sufficiency", "output", "hesitation_per_1k")),
    Row("hybrid with the circuit", "8.2", arm("sufficiency", "circuit", "hesitation_per_1k")),
]
"""What the paper measures of the studied set (section 5)."""


class Study:
    """The stages over all sets."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._documents: list[Trace] | None = None

    def folder(self, name: str) -> Path:
        """The run of a set."""
        return Path(self.args.out) / Path(name).name

    def run(self) -> None:
        """All stages of all sets that were not run yet."""
        for name in self.args.sets:
            folder = self.folder(name)
            if "open" in self.args.stages and not folder.is_dir():
                open_set(name, folder, base=self.args.base, target=self.args.target, device=self.args.device)
            todo = [stage for stage in self.args.stages if self._missing(name, stage)]
            if todo:
                pair = open_run(folder, self.args.device)
                for stage in todo:
                    logging.info("%s: %s", folder.name, stage)
                    getattr(self, stage)(pair, folder)
            self.table()

    def _missing(self, name: str, stage: str) -> bool:
        results = read_results(self.folder(name))
        if stage == "faithfulness":
            return "faithfulness" not in results
        if name != self.args.studied or stage == "open":
            return False
        return "documents" not in results.get("features", {}) if stage == "features" else "hesitation" not in results

    # -- stages -------------------------------------------------------------------------------------------------------

    def documents(self, pair: PairedModel) -> list[Trace]:
        """Held-out documents, the same for every set."""
        if self._documents is None:
            data = RunConfig.load("openthoughts3").data if self.args.traces is None else None
            source = self.args.traces or "open-thoughts/OpenThoughts3-1.2M"
            self._documents = load_traces(source, pair, n=self.args.documents, data=data, seed=1)
        return self._documents

    def faithfulness(self, pair: PairedModel, folder: Path) -> None:
        faithfulness_stage(pair, self.documents(pair), folder, SPLIT)

    def features(self, pair: PairedModel, folder: Path) -> None:
        features_stage(pair, self.documents(pair), folder, SPLIT)

    def circuit(self, pair: PairedModel, folder: Path) -> None:
        task, _, source = self.args.task.partition("=")
        problems = load_problems(task, source or None, n=self.args.problems).problems
        search = SearchOptions(share=self.args.share, method="sampled")
        subject = halves(problems, self.args.max_new_tokens)
        hesitation_stage(pair, subject, folder, StudyOptions(search=search), progress=True)

    # -- table --------------------------------------------------------------------------------------------------------

    def table(self) -> None:
        """Write what the paper has and what was measured, and print it at the end."""
        lines, layers = ["| set | figure | paper | measured |", "|---|---|---|---|"], ""
        for name in self.args.sets:
            results = read_results(self.folder(name))
            for row in [*faithfulness_rows(name), *(CIRCUIT_ROWS if name == self.args.studied else [])]:
                try:
                    measured = row.read(results)
                except KeyError:
                    measured = NOT_RUN
                lines.append(f"| {self.folder(name).name} | {row.figure} | {row.paper} | {measured} |")
            if "faithfulness" in results:
                layers += by_layer(self.folder(name).name, results)
        self.text = "\n".join(lines) + "\n" + layers
        Path(self.args.out).mkdir(parents=True, exist_ok=True)
        write_text(Path(self.args.out) / "table.md", self.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs and of table.md")
    parser.add_argument("--sets", nargs="+", default=SETS, help="names or folders of adapter sets")
    parser.add_argument("--studied", default=STUDIED, help="the set whose features and circuit are studied")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--base", help="folder or hub name of the base; by default what the set says")
    parser.add_argument("--target", help="likewise of the target")
    parser.add_argument("--traces", help="documents: a .jsonl file or a dataset (default: OpenThoughts3)")
    parser.add_argument("--documents", type=int, default=100, help="number of documents")
    parser.add_argument("--task", default="math500", metavar="NAME[=FILE]", help="problems of the circuit's study")
    parser.add_argument("--problems", type=int, default=240, help="number of problems, half of them to choose on")
    parser.add_argument("--max-new-tokens", type=int, default=10_000, help="longest answer")
    parser.add_argument("--share", type=float, default=0.03, help="size of the circuit, as a share of alive features")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    if args.studied not in args.sets:
        parser.error(f"--studied is {args.studied}, which is none of --sets")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    study = Study(args)
    if args.table:
        study.table()
    else:
        study.run()
    print(study.text)


if __name__ == "__main__":
    main()
