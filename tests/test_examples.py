"""The example of the paper's own model, on a tiny pair with adapters in the authors' layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_folders import write_pair
from helpers.random_models import randomise

from tl_adapters import organism
from tl_adapters.interop.authors_checkpoint import to_authors
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.results import read_results

EXAMPLE = Path(__file__).parents[1] / "examples" / "r1_distill_7b"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A set in the authors' layout, its target, and documents."""
    folder = tmp_path_factory.mktemp("example")
    pair = randomise(PairedModel.from_pretrained(*write_pair(folder / "models", "Qwen3", dtype=torch.float32)))
    to_authors(pair.installed_adapters(), folder / "set-l0-1.4", base=pair.base_id, target=pair.target_id)
    rows = [{"prompt": q, "response": r} for q, r in organism.reasoning_pairs("report", 6, 0)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"question": f"{n} + 1 = ?", "answer": f"#### {n + 1}"} for n in range(8)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return folder / "set-l0-1.4", Path(pair.target_id), folder


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / script), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_stage_runs_and_resumes_and_the_table_says_what_was_measured(folders: tuple[Path, Path, Path]) -> None:
    adapters, target, folder = folders
    out = folder / "runs"
    common = ["--sets", adapters, "--studied", adapters, "--target", target, "--traces", folder / "documents.jsonl"]
    common += ["--documents", 6, "--task", f"gsm8k={folder / 'problems.jsonl'}", "--max-new-tokens", 12]
    text = run("study.py", out, *common, "--stages", "open", "faithfulness")
    results = read_results(out / adapters.name)
    l0 = sum(figure["value"] for figure in results["faithfulness"]["l0_all_tokens"]) / len(
        results["faithfulness"]["l0"]
    )
    assert f"| L0 per token and layer | nan | {l0:.2f} |" in text and "| 5,623 of 229,376 | not yet run |" in text
    written = (out / adapters.name / "results.json").stat().st_mtime_ns
    run("study.py", out, *common, "--stages", "open", "faithfulness")
    assert (out / adapters.name / "results.json").stat().st_mtime_ns == written, "what is there is not run again"
    text = run("study.py", out, *common)
    results = read_results(out / adapters.name)
    assert results["features"]["documents"] == 6 and "hesitation" in results
    assert "not yet run" not in text and (out / "table.md").read_text() in text


def test_the_dry_run_needs_no_weights() -> None:
    text = run("dry_run.py", "--meta", "--shape", "tiny", "--features", 32)
    assert "replacement: logits (1, 256, 512)" in text and "a step of the objective: done" in text
    predicted = [line for line in text.splitlines() if line.endswith("GB predicted")]
    assert len(predicted) == 8
    text = run("dry_run.py", "--random", "--shape", "tiny", "--features", 32, "--device", "cpu", "--tokens", 200)
    assert [line.split(":")[0] for line in text.splitlines()] == ["pair", "faithfulness", "graph", "search"]
