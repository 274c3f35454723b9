"""One end-to-end demo on the built-in pair, small: its folder, its figures, its page in a browser."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_model

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.cli.main import main
from tl_adapters.organism.recipe import build_tokenizer
from tl_adapters.pages.report import write_report

N_LAYERS = json.loads((organism.TARGET / "config.json").read_text())["num_hidden_layers"]
BY_LAYER = ("kl_first", "kl_last", "kl_only", "nmse", "l0", "dead")


@pytest.fixture
def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def figures(value: Any) -> list[dict[str, Any]]:
    """Every figure in a block."""
    if isinstance(value, dict):
        if "bar" in value:  # a question and its verdict; the figures are those of the arms
            return []
        return [value] if "value" in value else [f for item in value.values() for f in figures(item)]
    return [f for item in value for f in figures(item)] if isinstance(value, list) else []


def test_the_folder(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "adapters", "answers.jsonl", "circuit.json", "config.json", "features", "graphs", "hesitation.html",
        "hesitation.jsonl", "local_metrics.jsonl", "metrics.jsonl", "report.html", "results.json", "run.json",
    }  # fmt: skip
    assert len(AdapterSet.from_pretrained(run / "adapters")) == N_LAYERS


def test_the_blocks_are_those_of_the_schema(results: dict[str, Any]) -> None:
    assert results["schema_version"] == 1
    assert set(results) == {
        "schema_version", "pair", "train", "faithfulness", "features", "behaviour", "baselines",
        "attribution", "moment_graphs", "hesitation", "seconds", "versions", "seeds", "files",
    }  # fmt: skip
    f = results["faithfulness"]
    assert set(f["kl"]) == {"hybrid", "replacement"}
    assert [len(f[k]) for k in BY_LAYER] == [N_LAYERS + (k == "nmse") for k in BY_LAYER]
    assert set(results["behaviour"]) == {"base", "target", "hybrid", "replacement", "recovered", "gained"}
    assert set(results["behaviour"]["gained"]["hybrid"]) == {"target", "replacement"}
    rate = results["behaviour"]["target"]
    assert set(rate) == {
        "n", "accuracy", "length", "hesitation_per_1k", "truncated", "think_opened", "ci", "split",
        "looping", "near_ties_per_1k",
    }  # fmt: skip
    assert results["train"]["steps"] == 30 and results["features"]["total"] == 32 * N_LAYERS


def test_every_figure_names_its_split_and_has_its_interval(results: dict[str, Any]) -> None:
    found = figures(results)
    assert len(found) > 40
    for figure in found:
        usual = set(figure) - {"undefined", "reason", "draws", "min", "max", "outcomes"}  # where there is one to tell
        assert usual == {"value", "low", "high", "n", "unit", "split", "seeds"}
        assert figure["split"] == "report" and figure["unit"]
        assert (figure["low"] is not None and figure["high"] is not None) or figure["reason"]
        if figure["low"] is not None:
            assert figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9


def test_even_a_short_training_comes_closer_than_the_hybrid(results: dict[str, Any]) -> None:
    kl = results["faithfulness"]["kl"]
    assert kl["replacement"]["value"] < 0.7 * kl["hybrid"]["value"]
    assert results["behaviour"]["target"]["accuracy"] > 0.8
    assert results["behaviour"]["hybrid"]["hesitation_per_1k"] <= 1


def test_the_page_is_self_contained_and_escaped(run: Path, tmp_path: Path) -> None:
    html = (run / "report.html").read_text()
    own = r'href="((?:graphs/|features/|hesitation\.html)[^"]*)"'  # pages of their own, in the same folder
    for link in re.findall(own, html):
        assert (run / link).is_file()
        html = html.replace(f'href="{link}"', "")
    assert not re.findall(r"""(?:src|href)=["']?(?!data:,|#)[^"'> ]+""", html.replace('xlink:href="#', 'href="#'))
    assert "@import" not in html and "<script" not in html
    assert "&lt;think&gt;" in html and "<think>" not in html
    evil = tmp_path / "run"
    shutil.copytree(run, evil)
    answer = json.loads((evil / "answers.jsonl").read_text().splitlines()[0])
    answer["target"] = "</pre><script>alert(1)</script> Wait"
    (evil / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    html = write_report(evil).read_text()
    assert "<script" not in html and "<mark>Wait</mark>" in html


@pytest.mark.browser
def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Rendered with the network blocked: nothing on the console, every plot drawn, every section there."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a Chromium; .ci/run installs one")
        pytest.skip("no Chromium on this machine")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1120,3000",
        "--dump-dom", (run / "report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    for heading in (
        "Training",
        "Faithfulness",
        "Simpler replacements for the same MLP difference",
        "Behavior",
        "Features by label",
        "Attribution of hesitations",
    ):
        assert f"<h2>{heading}</h2>" in done.stdout
    assert done.stdout.count("<svg") == 11
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_evaluate_measures_the_same_again(run: Path, results: dict[str, Any], tmp_path: Path) -> None:
    """On other traces through the command line; the training blocks stay as they were."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = [{"prompt": "47+85+19=?", "response": "<think>47+85=132.\n132+19=151.\n</think>151"}] * 3
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["evaluate", str(copy), "--data", str(tmp_path / "held_out.jsonl"), "--quiet"]) == 0
    again = json.loads((copy / "results.json").read_text())
    assert again["train"] == results["train"]
    assert again["faithfulness"]["kl"]["replacement"]["split"] == "held_out.jsonl"
    assert again["faithfulness"]["tokens"]["response"] < results["faithfulness"]["tokens"]["response"]


def test_train_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, config, out = tmp_path / "t.jsonl", tmp_path / "c.yaml", tmp_path / "run"
    data.write_text(json.dumps({"prompt": "47+85=?", "response": "<think>47+85=132.\n</think>132"}))
    config.write_text("training:\n  stages: [end_to_end]\n  steps: 3\n  n_features: 8\n  loss_weights: public_code\n")
    pair = ["--base", str(organism.BASE), "--target", str(organism.TARGET)]
    command = ["train", *pair, "--data", str(data), "--config", str(config), "--out", str(out), "--quiet"]
    assert main([*command, "--seed", "7"]) == 0
    assert f"next: tl-adapters evaluate {out} --data" in capsys.readouterr().out
    written = json.loads((out / "config.json").read_text())
    assert written["base"] == str(organism.BASE) and written["data"]["source"] == str(data)
    training = written["training"]
    assert training["seed"] == 7 and training["steps"] == 3 and training["loss_weights"]["forward_bridge"] == 2.0
    assert json.loads((out / "data.json").read_text())["used"] == 1
    assert json.loads((out / "results.json").read_text())["pair"]["target"] == str(organism.TARGET)
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_and_is_evaluated_from_folders(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer()
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=128)
    for name, seed in (("base", 1), ("target", 2)):
        random_model(seed, torch.float32, architecture, **shape).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "target")
    pairs = organism.reasoning_pairs("train", 12)
    lines = [json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": r}]})
             for q, r in pairs]  # fmt: skip
    (tmp_path / "traces.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.yaml").write_text(
        "dtype: bfloat16\ntraining: {stages: [end_to_end], steps: 6, n_features: 32, lr: 0.003}\n"
    )
    sides = [str(tmp_path / "base"), str(tmp_path / "target")]
    data, run = str(tmp_path / "traces.jsonl"), str(tmp_path / "run")
    assert main(["doctor", *sides, "--data", data]) == 0
    command = ["train", "--base", sides[0], "--target", sides[1], "--data", data, "--config", str(tmp_path / "c.yaml")]
    assert main([*command, "--out", run, "--quiet"]) == 0
    assert main(["evaluate", run, "--data", data, "--quiet"]) == 0
    kl = json.loads((tmp_path / "run" / "results.json").read_text())["faithfulness"]["kl"]
    assert kl["replacement"]["value"] < kl["hybrid"]["value"]
    assert "Training" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--base", "x", "--out", "o"], "--base and --target are given together"),
        (["train", "--base", "x", "--target", "y", "--out", "o"], "--data is missing"),
        (["demo", "--device", "tpu"], "--device 'tpu' is not known"),
        (["demo", "--device", "cuda:99"], "--device cuda:99: this machine does not have it"),
        (["train", "--resume", "r", "--seed", "1"], "leave out --seed"),
        (["train", "--resume", "nowhere"], "There is no folder nowhere"),
        (["train", "--out", "o", "--config", "papr"], "There is no file papr"),
        (["train", "--out", "o", "--data", "nothing.jsonl"], "There is no file nothing.jsonl"),
        (["evaluate", "nowhere"], "has no adapters"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_a_second_demo_takes_the_next_free_name_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(folder: Path, *args: object, **options: object) -> Path:
        folder.mkdir(parents=True)
        (folder / "report.html").write_text(str(len(list(folder.parent.iterdir()))))
        return folder / "report.html"

    monkeypatch.setattr("tl_adapters.study.demo.demo", short)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert main(["demo", "--quiet"]) == 0
    assert {p.parent.name: p.read_text() for p in tmp_path.rglob("report.html")} == {
        "demo": "1", "demo-2": "2", "demo-3": "3",
    }  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("next: tl-adapters evaluate runs/demo-3\n") == 1 and out.count("Intervals are wider") == 3
    *_, address, following = out.splitlines()
    assert address == (tmp_path / "runs" / "demo-3" / "report.html").resolve().as_uri() and "next:" in following
    assert main(["demo", "--full", "--out", "runs/a full one", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "Intervals are wider" not in out and "/runs/a%20full%20one/report.html\nnext: " in out
    assert main(["demo", "--out", "runs/a full one", "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [*printed["paths"]] == ["report", "figures", "adapters"] and [*printed["results"]] == ["seconds"]
    assert main(["demo", "--out", "runs/demo"]) == 0
    assert "runs/demo exists already and stays as it is; this run is runs/demo-4" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "..", "", "/", "file", "file/run", "x" * 300, "/proc/run"])
def test_a_demo_that_cannot_be_written_is_refused_before_anything_is_made(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tl_adapters.study.demo.demo", lambda *args, **options: pytest.fail("it started"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--quiet", "--out", out]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
