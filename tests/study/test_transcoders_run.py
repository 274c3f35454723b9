"""The subcommand transcoders: trained, measured on held-out documents, saved as SAELens reads them."""

import json
from pathlib import Path

import pytest
from sae_lens import SAE

import tl_adapters.study.open_run as open_run
from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.cli.main import main
from tl_adapters.organism import BASE


def small(*words: str) -> list[str]:
    options = {"local.steps": 20, "local.tokens_per_step": 256, "n_features": 32, "activation": "batchtopk", "k": 4}
    return ["transcoders", *words, *(w for name, value in options.items() for w in ("--set", f"{name}={value}"))]


def test_transcoders_of_one_model_are_saved_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(open_run, "ORGANISM_TRACES", 200)
    out = tmp_path / "t"
    assert main(small("--out", str(out), "--json", "--quiet")) == 0
    layers = json.loads(capsys.readouterr().out)["results"]["layers"]
    figures = AdapterSet.from_pretrained(out).metadata.figures
    for layer in range(5):
        assert 0 < layers[layer]["fvu"] < 1
        assert figures[f"fraction of variance unexplained, layer {layer}"]["value"] == layers[layer]["fvu"]
        transcoder = SAE.load_from_disk(out / f"layer_{layer}")
        assert transcoder.cfg.metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out"
        assert transcoder.cfg.metadata.model_name == organism.BUILTIN_BASE
    assert figures["L0, layer 0"]["split"] == "held out"


def test_documents_of_a_file_are_measured_on_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, split in (("train", "train"), ("held_out", "report")):
        rows = [{"prompt": q, "response": r} for q, r in organism.reasoning_pairs(split, 40)]  # type: ignore[arg-type]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "held_out.jsonl")]
    assert main(small(str(BASE), *data, "--out", str(tmp_path / "t"), "--quiet")) == 0
    out = capsys.readouterr().out
    assert "| layer | fraction of variance unexplained |" in out
    assert f"transcoders: {tmp_path / 't'}" in out
    about = AdapterSet.from_pretrained(tmp_path / "t").metadata
    assert about.datasets == [str(tmp_path / "train.jsonl")]
    assert about.figures["L0, layer 4"]["n"] == 40
