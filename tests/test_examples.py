"""The example of the paper's own model, on the built-in pair with random adapters in the authors' layout."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.fx.experimental._config as fx_config
from helpers.random_models import randomise

from tl_adapters import organism
from tl_adapters.interop.authors_checkpoint import to_authors
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.results import read_results

EXAMPLE = Path(__file__).parents[1] / "examples" / "r1_distill_7b"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A set in the authors' layout, its target, and documents and problems."""
    folder = tmp_path_factory.mktemp("example")
    pair = randomise(load_organism_pair())
    to_authors(pair.installed_adapters(), folder / "set-l0-1.4", base=pair.base_id, target=pair.target_id)
    rows = [{"prompt": q, "response": r} for q, r in organism.reasoning_pairs("report", 6, 0)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"question": p.question, "answer": f"#### {p.answer}"} for p in organism.problems("report", 16)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return folder / "set-l0-1.4", pair.target_id, folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script of the example in this process, as its command line does, and returns what it prints."""

    def script(name: str, *arguments: object) -> str:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        spec.loader.exec_module(module)
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return script


def test_every_stage_runs_and_resumes_and_the_table_says_what_was_measured(
    folders: tuple[Path, str, Path], run: Callable[..., str]
) -> None:
    adapters, target, folder = folders
    out = folder / "runs"
    common = ["--sets", adapters, "--studied", adapters, "--target", target, "--traces", folder / "documents.jsonl"]
    common += ["--documents", 6, "--task", f"gsm8k={folder / 'problems.jsonl'}", "--max-new-tokens", 60]
    text = run("study", out, *common, "--stages", "open", "faithfulness")
    results = read_results(out / adapters.name)
    by_layer = [figure["value"] for figure in results["faithfulness"]["l0_all_tokens"]]
    l0 = sum(by_layer) / len(by_layer)
    assert f"| L0 per token and layer | 1.4 | {l0:.2f} |" in text and "| 5,623 of 229,376 | not yet run |" in text
    off = "yes" if abs(l0 - 1.4) <= 0.14 else f"no: {l0 / 1.4 - 1:+.0%}"
    assert f"| L0 is that of the name, to 0.05 or a tenth | yes | {off} |" in text
    layers = text.split(f"## {adapters.name}, by layer")[1].strip().splitlines()[2:]
    assert [line.split(" | ")[0] for line in layers] == [f"| {layer}" for layer in range(len(by_layer))]
    assert f"| 0 | {by_layer[0]:.4f} (" in layers[0]
    written = (out / adapters.name / "results.json").stat().st_mtime_ns
    run("study", out, *common, "--stages", "open", "faithfulness")
    assert (out / adapters.name / "results.json").stat().st_mtime_ns == written, "what is there is not run again"
    text = run("study", out, *common)
    results = read_results(out / adapters.name)
    assert results["features"]["documents"] == 6 and "hesitation" in results
    assert "not yet run" not in text and (out / "table.md").read_text() in text


def test_the_dry_run_needs_no_weights(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fx_config, "meta_nonzero_assume_all_nonzero", False)  # given back at the end
    text = run("dry_run", "--meta", "--shape", "tiny", "--features", 32)
    assert "replacement: logits (1, 256, 512)" in text and "a step of the objective: done" in text
    predicted = [line for line in text.splitlines() if line.endswith("GB predicted")]
    assert len(predicted) == 8
    text = run("dry_run", "--random", "--shape", "tiny", "--features", 32, "--device", "cpu", "--tokens", 200)
    assert [line.split(":")[0] for line in text.splitlines()] == ["pair", "faithfulness", "graph", "search"]
