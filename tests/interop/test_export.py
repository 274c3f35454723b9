"""From a run to other people's tools: its figures go along, and what is missing is said in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.cli.main import main
from tl_adapters.interop.authors_checkpoint import authors_pair
from tl_adapters.interop.export import load_adapters_with_measurements
from tl_adapters.models.paired_model import PairedModel

TOKENS = torch.tensor([[273, 275, 22, 16, 10, 17, 21, 10, 17, 22, 262, 276, 277, 22, 16]])


@pytest.fixture(scope="module")
def pair(run: Path) -> PairedModel:
    found = PairedModel.from_pretrained(organism.BUILTIN_BASE, organism.BUILTIN_TARGET)
    found.load_adapters(AdapterSet.from_pretrained(run / "adapters"))
    return found


@torch.no_grad()
def logits(pair: PairedModel, route: str) -> torch.Tensor:
    with pair.routed(route):
        return pair.model(TOKENS)


def test_a_runs_adapters_carry_its_figures(run: Path) -> None:
    about = load_adapters_with_measurements(run).metadata
    results = json.loads((run / "results.json").read_text())
    assert about.figures["KL(target || replacement)"] == results["faithfulness"]["kl"]["replacement"]
    assert about.figures["L0, layer 2"] == results["faithfulness"]["l0"][2]
    assert about.figures["accuracy recovered against the hybrid"] == results["behaviour"]["recovered"]["hybrid"]
    assert about.datasets == [organism.BUILTIN_TEXT]
    assert about.fingerprints == results["pair"]["fingerprints"]
    assert [sorted(of_layer) for of_layer in results["pair"]["signal_to_noise"]] == 5 * [["energy", "noise"]]


@torch.no_grad()
def test_to_saelens(run: Path, pair: PairedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "saelens", "--out", str(tmp_path / "s")]) == 0
    assert f"saelens: {tmp_path / 's'}" in capsys.readouterr().out
    with pair.routed("replacement"):
        _, cache = pair.model.run_with_cache(TOKENS)
    for layer in range(pair.n_layers):
        transcoder = SAE.load_from_disk(tmp_path / "s" / f"layer_{layer}")
        acts = transcoder.encode(cache[transcoder.cfg.metadata.hook_name])
        assert (acts - cache[f"blocks.{layer}.mlp.adapter.hook_sae_acts_post"]).abs().max() < 1e-5
    assert "KL(target || replacement)" in transcoder.cfg.metadata.tl_adapters["figures"]
    # a folder of adapters does as well as a run, and the other form is there for who asks
    assert (
        main(["export", str(run / "adapters"), "--to", "saelens", "--reads", "mlp_input", "--out", str(tmp_path / "m")])
        == 0
    )
    assert SAE.load_from_disk(tmp_path / "m" / "layer_1").cfg.metadata.hook_name == "blocks.1.mlp.hook_in"


def test_to_the_authors_format_and_to_the_models(run: Path, pair: PairedModel, tmp_path: Path) -> None:
    for to in ("authors", "hybrid", "target"):
        assert main(["export", str(run), "--to", to, "--out", str(tmp_path / to)]) == 0
    theirs = authors_pair(tmp_path / "authors", organism.TARGET)
    for route in ("target", "hybrid", "replacement"):
        assert (logits(theirs, route) - logits(pair, route)).abs().max() < 1e-6
    for to in ("hybrid", "target"):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / to)
        with torch.no_grad():
            assert (stock(TOKENS).logits - logits(pair, to)).abs().max() < 1e-4
        assert (tmp_path / to / "tokenizer.json").is_file()


def test_push_and_pull(
    run: Path,
    hub: LoopbackHub,  # noqa: F811
    pair: PairedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["push", str(run), "user/repo", "--private"]) == 0
    assert f"commit: {hub.server.url}/user/repo/commit/" in capsys.readouterr().out
    card = hub.files["user/repo"]["README.md"].decode()
    assert re.search(r"\| KL\(target \\\|\\\| replacement\) \| [\d.e-]+ \| [\d.e-]+ to ", card)
    assert main(["pull", "user/repo", "--out", str(tmp_path / "pulled")]) == 0
    out = capsys.readouterr().out
    assert f"{pair.n_layers} of {pair.n_layers} layers, 32 features each" in out
    other = PairedModel.from_pretrained(organism.BUILTIN_BASE, organism.BUILTIN_TARGET)
    other.load_adapters(AdapterSet.from_pretrained(tmp_path / "pulled"))
    assert (logits(other, "replacement") - logits(pair, "replacement")).abs().max() < 1e-4


def test_one_line_says_what_is_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*argv: str) -> str:
        assert main(list(argv)) == 2
        err = capsys.readouterr().err.strip()
        assert err.startswith("error: ") and len(err.splitlines()) == 1
        return err

    out = str(tmp_path / "out")
    assert "is not a folder, and the hub did not give" in fails("export", "no/where", "--to", "saelens", "--out", out)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("adapters"))
    assert f"tl-adapters train --resume {unfinished}" in fails(
        "export", str(unfinished), "--to", "saelens", "--out", out
    )
    adapters = AdapterSet.from_pretrained(run / "adapters")
    object.__setattr__(adapters.metadata, "base", "")
    adapters.save_pretrained(tmp_path / "nameless")
    assert "do not say what their base are" in fails(
        "export", str(tmp_path / "nameless"), "--to", "hybrid", "--out", out
    )
    assert "exists already" in fails("export", str(run), "--to", "saelens", "--out", str(run))
    normalized = tmp_path / "normalized"
    adapters.normalized().save_pretrained(normalized)
    assert "not unfolded" in fails("export", str(normalized), "--to", "saelens", "--reads", "mlp_input", "--out", out)
    assert not Path(out).exists()
